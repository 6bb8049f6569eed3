"""Compressed weights: our reading of each encoding against coremltools' own."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[coreml]'")
pytest.importorskip("coremltools", reason="pip install 'edgepack[coreml]'")

from torch import nn  # noqa: E402

from edgepack import parts  # noqa: E402
from edgepack.contracts import Exporter  # noqa: E402
from edgepack.graph import capture  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.runtimes import _mil  # noqa: E402
from edgepack.runtimes import _mil_constants as stored  # noqa: E402
from edgepack.silence import silence  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 32, 3, padding=1), nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    """The same network for iOS 16 in float32 and for iOS 18 in float16."""
    torch.manual_seed(0)
    graph = capture(Net().eval(), Task(inputs=(Input("x", (1, 8, 5, 6)),)))
    places = {}
    for target, precision in (("iOS16", "float32"), ("iOS18", "float16")):
        places[target] = tmp_path_factory.mktemp(target)
        exporter = parts.find(Exporter, "coreml")(target=target, precision=precision)
        exporter.write(exporter.lower(graph, Plan()), places[target])
    return {target: place / "model.mlpackage" for target, place in places.items()}


def linear(**options):
    import coremltools.optimize.coreml as cto

    return cto.linear_quantize_weights, cto.OpLinearQuantizerConfig(weight_threshold=0, **options)


def palette(**options):
    import coremltools.optimize.coreml as cto

    return cto.palettize_weights, cto.OpPalettizerConfig(mode="uniform", weight_threshold=0, **options)


def sparse(**options):
    import coremltools.optimize.coreml as cto

    return cto.prune_weights, cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0, **options)


def compressed(package: Path, steps, folder: Path):
    """The package after one or two compressions, saved and read again."""
    import coremltools as ct
    import coremltools.optimize.coreml as cto

    with silence():
        model = ct.models.MLModel(str(package), skip_model_load=True)
        for place, (compress, config) in enumerate(steps):
            more = {"joint_compression": True} if place else {}
            model = compress(model, cto.OptimizationConfig(global_config=config), **more)
        model.save(str(folder / "a.mlpackage"))
        return _mil.read(folder / "a.mlpackage")


CASES = {
    "int8": ("iOS16", [(linear, {"mode": "linear_symmetric", "dtype": "int8"})], {"affine_dequantize"}),
    "uint8": ("iOS16", [(linear, {"mode": "linear", "dtype": "uint8"})], {"affine_dequantize"}),
    "int8 tensor": ("iOS16", [(linear, {"granularity": "per_tensor"})], {"affine_dequantize"}),
    "palette 4": ("iOS16", [(palette, {"nbits": 4})], {"lut_to_dense"}),
    "palette 6": ("iOS16", [(palette, {"nbits": 6})], {"lut_to_dense"}),
    "sparse": ("iOS16", [(sparse, {})], {"sparse_to_dense"}),
    "int4 blocks": (
        "iOS18",
        [(linear, {"dtype": "int4", "granularity": "per_block", "block_size": 4})],
        {"blockwise_shift_scale"},
    ),
    "uint4": ("iOS18", [(linear, {"mode": "linear", "dtype": "uint4"})], {"blockwise_shift_scale"}),
    "palette groups": (
        "iOS18",
        [(palette, {"nbits": 3, "granularity": "per_grouped_channel", "group_size": 4})],
        {"lut_to_dense"},
    ),
    "palette 2": ("iOS18", [(palette, {"nbits": 2})], {"lut_to_dense"}),
    "sparse 18": ("iOS18", [(sparse, {})], {"sparse_to_dense"}),
    "sparse int8": (
        "iOS18",
        [(sparse, {}), (linear, {"dtype": "int8"})],
        {"sparse_to_dense", "sparse_blockwise_shift_scale"},
    ),
    "sparse palette": ("iOS18", [(sparse, {}), (palette, {"nbits": 4})], {"sparse_to_dense", "lut_to_sparse"}),
}


@pytest.mark.parametrize("name", CASES)
def test_compressed_weights_are_those_of_coremltools(packages, tmp_path, name):
    target, steps, kinds = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = compressed(packages[target], [(how(**options)) for how, options in steps], tmp_path)
        found = _mil.dense_constants(function)
        seen = set()
        for operator in function.operations:
            if not operator.op_type.startswith("constexpr_"):
                continue
            seen.add(operator.op_type.removeprefix("constexpr_"))
            wanted = operator.materialized_val_inference()
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            for output, value in zip(operator.outputs, wanted, strict=True):
                assert found[output.name].shape == value.shape
                assert found[output.name].dtype == value.dtype
                np.testing.assert_array_equal(found[output.name], value)
    assert seen >= kinds


def test_a_compressed_package_is_interpreted(packages, tmp_path):
    function = [linear(dtype="int4", granularity="per_block", block_size=4)]
    compressed(packages["iOS18"], function, tmp_path)
    x = {"x": torch.randn(1, 8, 5, 6, generator=torch.Generator().manual_seed(1))}
    exact = _mil.Program.load(packages["iOS18"]).run(x)["output"]
    coarse = _mil.Program.load(tmp_path / "a.mlpackage").run(x)["output"]
    difference = float((exact - coarse).norm() / exact.norm())
    assert 0.005 < difference < 0.2


def test_16_bit_weights_in_a_float32_program():
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float16)
    wide = stored.cast(values, "fp32")
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, values)


def test_vectors_in_look_up_tables():
    """A table of pairs along axis 0: four indices of two rows become eight rows."""
    lut = np.arange(2 * 4 * 2, dtype=np.float32).reshape(2, 1, 4, 2)
    indices = np.array([[0, 1, 2], [3, 0, 1], [2, 2, 2], [1, 0, 3]], np.uint8)
    dense = stored.lut_to_dense(indices, lut, vector_axis=0)
    assert dense.shape == (8, 3)
    for row in range(4):
        for column in range(3):
            pair = lut[row // 2, 0, indices[row, column]]
            np.testing.assert_array_equal(dense[2 * row : 2 * row + 2, column], pair)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_packed_indices_of_every_width(bits):
    lut = np.random.default_rng(bits).standard_normal(2**bits).astype(np.float32)
    indices = np.random.default_rng(0).integers(0, 2**bits, 35)
    stream = "".join(f"{index:0{bits}b}"[::-1] for index in indices)
    stream += "0" * (-len(stream) % 8)
    packed = np.array([int(stream[at : at + 8][::-1], 2) for at in range(0, len(stream), 8)], np.uint8)
    dense = stored.lut_to_dense(packed, lut, np.array([5, 7], np.uint32))
    np.testing.assert_array_equal(dense, lut[indices].reshape(5, 7))
