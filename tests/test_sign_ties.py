"""The sign of 0 is +1: in training, in PyTorch's graph, in ONNX and in C, wherever a sum lies on its threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")

from torch import nn  # noqa: E402

from _c_files import answers, captured, write  # noqa: E402
from edgepack.compress._binary import Binary, Sign, Signs  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.plan import Plan  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
ZEROS = torch.tensor([0.0, -0.0])
INPUTS = 8


def tied() -> nn.Module:
    """Two binary layers without a norm between: half of all sums of eight signs are 0, a tie of the second's signs."""
    torch.manual_seed(0)
    layers = [Binary(nn.Conv2d(INPUTS, 96, 1, bias=False), torch.zeros(INPUTS), 1.0, False),
              Binary(nn.Conv2d(96, 33, 3, padding=1, bias=False), torch.zeros(96), 1.0, False)]  # fmt: skip
    for layer in layers:
        layer.settle()
        layer.scale.weight.data.sign_()  # a negative factor makes −0 of 0
        layer.scale.weight.data[::2] *= -1
    return nn.Sequential(*layers).eval()


def drawn() -> dict[str, np.ndarray]:
    """Zeros of both signs among the numbers."""
    random = np.random.default_rng(0)
    x = random.choice(np.array([-1.0, -0.0, 0.0, 1.0], np.float32), (1, INPUTS, 9, 10))
    return {"x": x}


def by_hand(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """Both layers as integers, with NumPy alone."""
    first, second = (layer.layer.weight.detach().numpy().astype(np.int64) for layer in module)
    one, two = (layer.scale.weight.detach().numpy().astype(np.int64) for layer in module)
    bits = np.where(x[0] >= 0, 1, -1)
    sums = np.einsum("oc,chw->ohw", first[:, :, 0, 0], bits) * one
    assert (sums == 0).mean() > 0.2
    bits = np.pad(np.where(sums >= 0, 1, -1), ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    shifted = np.stack([bits[:, r : r + 9, c : c + 10] for r in range(3) for c in range(3)], 1)
    found: np.ndarray = np.einsum("ock,ckhw->ohw", second.reshape(*second.shape[:2], 9), shifted) * two
    return found[None].astype(np.float32)


def test_training_takes_the_sign_of_zero_as_one() -> None:
    sign = Sign(torch.zeros(1), 1.0)
    assert sign(ZEROS).tolist() == [1.0, 1.0]
    with torch.no_grad():
        assert sign(ZEROS).tolist() == [1.0, 1.0]
    assert Signs()(ZEROS).tolist() == [1.0, 1.0]
    assert Sign(torch.tensor([0.3]), 1.0)(torch.tensor([0.3])).tolist() == [1.0]


def test_pytorch_computes_what_integers_do() -> None:
    module, inputs = tied(), drawn()
    wanted = by_hand(module, inputs["x"])
    with torch.no_grad():
        np.testing.assert_array_equal(module(torch.from_numpy(inputs["x"])).numpy(), wanted)
    (found,) = run_graph(captured(module, 1, INPUTS, 9, 10), inputs).values()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("form", ["xnor", "tree"])
def test_c_computes_what_integers_do(form: str, tmp_path: Path) -> None:
    needs_compiler()
    module, inputs = tied(), drawn()
    artifact, _ = write(captured(module, 1, INPUTS, 9, 10), tmp_path / "c", binary=form)
    assert artifact.manifest.census["operators"]["tree_bits" if form == "tree" else "sign_bits"] == 1
    for level in (0, 1, 2):
        (found,) = answers(artifact, inputs, level).values()
        np.testing.assert_array_equal(found, by_hand(module, inputs["x"]))


@pytest.mark.parametrize("form", ["float", "packed"])
def test_onnx_computes_what_integers_do(form: str, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
    pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
    options = ort.SessionOptions()
    if form == "packed":
        needs_compiler()
        from edgepack.runtimes._onnx_operators import operators

        options.register_custom_ops_library(str(operators()))
    module, inputs = tied(), drawn()
    exporter = Onnx(binary=form)
    exporter.write(exporter.lower(captured(module, 1, INPUTS, 9, 10), Plan()), tmp_path)
    session = ort.InferenceSession(tmp_path / "model.onnx", options, ["CPUExecutionProvider"])
    (found,) = session.run(None, inputs)
    np.testing.assert_array_equal(found, by_hand(module, inputs["x"]))
