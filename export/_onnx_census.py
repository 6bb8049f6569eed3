"""What is in an ONNX file, by reading it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edgepack import contents
from edgepack.contracts import Census


def census(path: Path, notes: Sequence[str]) -> Census:
    """Operators, bytes of weights by dtype, and contents of the weights of an ONNX file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load_model_from_string(path.read_bytes())
    operators = Counter(node.op_type for node in model.graph.node)
    weights: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        dtype = "bfloat16" if tensor.data_type == TensorProto.BFLOAT16 else None
        weights[dtype or str(helper.tensor_dtype_to_np_dtype(tensor.data_type))] += len(tensor.raw_data)
    if left := operators["BatchNormalization"]:
        notes = [*notes, f"{left} BatchNormalization nodes are left; the pass fold may help"]
    arrays = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    keys = (contents.key(array.astype("int8") if array.dtype.name == "int4" else array) for array in arrays)
    return Census(dict(operators), dict(weights), tuple(notes), tuple(filter(None, keys)))
