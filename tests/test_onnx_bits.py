"""Layers of ±1 in ONNX as one operator: what it computes is the reference's, bit for bit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
onnx = pytest.importorskip("onnx", reason="pip install 'edgepack[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
needs_compiler()

from torch import nn  # noqa: E402

from _bits import Many  # noqa: E402
from _c_files import captured, compressed, write  # noqa: E402
from edgepack.artifact import Artifact, describe_files  # noqa: E402
from edgepack.compress._binary import Binary  # noqa: E402
from edgepack.deploy.linux import Linux  # noqa: E402
from edgepack.errors import InputError, MissingExtra, Unsupported  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.exporting import export  # noqa: E402
from edgepack.graph import capture  # noqa: E402
from edgepack.operators import BINARY_CONV  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.runtimes import _onnx_operators  # noqa: E402
from edgepack.runtimes.onnxruntime import Onnxruntime  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


@pytest.fixture(autouse=True)
def own_library() -> Any:
    """Compiled in this run, whatever one before it found."""
    _onnx_operators.operators.cache_clear()
    yield
    _onnx_operators.operators.cache_clear()


def answers(artifact: Artifact, inputs: dict[str, Any], optimize: bool = True) -> dict[str, Any]:
    return Onnxruntime(optimize=optimize).load(artifact, threads=1).run(inputs)


def binary(layer: nn.Module, shortcut: bool = False) -> Binary:
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    made = Binary(layer, torch.randn(channels) / 4, 1.0, shortcut)
    made.settle()
    return made


def test_random_layers_are_the_reference_bit_for_bit(tmp_path: Path) -> None:
    """Strides, dilation, groups, padding with −1 and 0, before the layer and in pairs that differ by side."""
    graph = captured(Many(1, 16), 1, 3, 11, 13)
    reference, packed = (write(graph, tmp_path / form, format="onnx", binary=form)[0] for form in ("float", "packed"))
    assert packed.manifest.census is not None
    assert packed.manifest.census["operators"][BINARY_CONV] >= 16
    inputs = {"x": np.random.default_rng(0).standard_normal((2, 3, 11, 13)).astype(np.float32)}
    for optimize in (True, False):
        wanted, found = (answers(artifact, inputs, optimize) for artifact in (reference, packed))
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


class Mixed(nn.Module):
    """A row of pixels, a product, a shortcut, a bias, strict comparison; and one layer that pads in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.row = binary(nn.Conv2d(40, 33, 3, 2, 1), False), binary(nn.Conv1d(33, 40, 3, padding=2))
        self.same, self.last = binary(nn.Conv2d(33, 33, 3, 1, 1), True), binary(nn.Linear(40, 7))
        self.plain = nn.Conv2d(33, 5, 3, padding=1)
        self.plain.weight.data.sign_()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.same(self.first(x))
        signs = torch.where(y > 0.5, 1.0, -1.0)
        twice = nn.functional.pad(signs, (1, 1, 1, 1), value=-1.0)
        z = self.row(y.flatten(2))
        return self.last(z.mean(2)), self.plain(signs), self.plain(twice), y


def test_rows_products_biases_and_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Task((Input("x", (1, 40, 9, 12)),))
    graph = capture(Mixed().eval(), task)
    reference, packed = (write(graph, tmp_path / form, format="onnx", binary=form)[0] for form in ("float", "packed"))
    assert packed.manifest.census is not None
    assert packed.manifest.census["operators"][BINARY_CONV] == 5
    assert packed.manifest.census["operators"]["Conv"] == 1  # padded with −1, then with 0
    for batch in (1, 3):
        inputs = {"x": np.random.default_rng(batch).standard_normal((batch, 40, 9, 12)).astype(np.float32)}
        for optimize, tolerance in (
            (False, 0.0),
            (True, 1e-5),
        ):  # the engine multiplies weights by a factor behind them
            wanted, found = (answers(artifact, inputs, optimize) for artifact in (reference, packed))
            for name in wanted:
                np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=tolerance, err_msg=name)
    assert packed.size_bytes < reference.size_bytes / 5


def test_an_artifact_is_proved_and_traced_as_others_are(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(5, 32, 3), nn.ReLU(), binary(nn.Conv2d(32, 32, 3, padding=1)), nn.Conv2d(32, 4, 3)
    )
    compressed(tmp_path, network, explain=False)
    (made,) = export(tmp_path, [Onnx(binary="packed")], Silent())
    manifest = made.artifact.manifest
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    assert manifest.census["operators"][BINARY_CONV] == 1
    assert manifest.census["weight_bytes"]["uint32"] == 32 * 9 * 4
    assert any(note.endswith("is needed by 1 layer") for note in manifest.census["notes"])
    with pytest.raises(Unsupported, match="the file has edgepack's own operator BinaryConv"):
        Linux().write(made.artifact, tmp_path / "package")
    steps = Onnxruntime().trace(made.artifact, dict(made.artifact.golden().inputs))
    (step,) = (step for step in steps if step.operator == BINARY_CONV)
    (sums,) = step.outputs.values()
    assert set(np.unique(sums % 2)) == {0.0}


def test_no_binary_layer_is_said(tmp_path: Path) -> None:
    artifact, _ = write(captured(nn.Conv2d(2, 2, 1), 1, 2, 3, 3), tmp_path / "a", format="onnx", binary="packed")
    assert artifact.manifest.census is not None
    assert artifact.manifest.census["notes"] == ["binary = 'packed', but no layer computes with ±1 on signs"]


def test_what_the_option_can_be() -> None:
    with pytest.raises(ValueError, match="binary is one of float, packed, not 'pakced'; did you mean 'packed'"):
        Onnx(binary="pakced")


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    artifact, _ = write(
        captured(binary(nn.Conv2d(3, 4, 1)), 1, 3, 5, 5), tmp_path / "a", format="onnx", binary="packed"
    )
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(MissingExtra, match=re.escape("there is no C compiler here (no-such-compiler)")):
        Onnxruntime().load(artifact)


def test_damaged_operators_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact, _ = write(
        captured(binary(nn.Conv2d(3, 4, 1)), 1, 3, 5, 5), tmp_path / "a", format="onnx", binary="packed"
    )
    path = artifact.file(".onnx")
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if node.op_type == BINARY_CONV)
    (outputs,) = (item for item in node.attribute if item.name == "outputs")
    outputs.i = 400
    onnx.save(model, path)
    session = Onnxruntime().load(sealed(artifact))
    with pytest.raises(Exception, match="BinaryConv has a threshold or weights of another size"):
        session.run({"x": np.zeros((1, 3, 5, 5), np.float32)})
    outputs.i = -1
    onnx.save(model, path)
    with pytest.raises(InputError, match="BinaryConv has an attribute out of range"):
        Onnxruntime().load(sealed(artifact))


def sealed(artifact: Artifact) -> Artifact:
    """With the hashes of what the files are now."""
    manifest = replace(artifact.manifest, files=describe_files(artifact.folder))
    (artifact.folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(artifact.folder)
