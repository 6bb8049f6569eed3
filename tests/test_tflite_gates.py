"""SiLU, gates and the means before them are integers in TFLite: XNNPACK takes all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("litert_converter", reason="pip install 'edgepack[tflite]'")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="pip install 'edgepack[tflite-run]'")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _tflite_integers import SHAPE, compressed, model_of  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import export  # noqa: E402
from edgepack.progress import Silent  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Gated(nn.Module):
    """SiLU, channels weighted by what their means say, and a product with a number, which stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.squeeze, self.excite = nn.Conv2d(SHAPE[1], 16, 3), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.last(x) * 0.5


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("gated")
    compressed(folder, Gated())
    return export(folder, [Tflite()], Silent())[0].artifact


def test_gates_are_integers_between_integers(artifact: Artifact) -> None:
    manifest = artifact.manifest
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    counted = manifest.census["operators"]
    assert (counted["LOGISTIC"], counted["MEAN"]) == (3, 1)
    assert (counted["QUANTIZE"], counted["DEQUANTIZE"]) == (1, 1)
    assert manifest.census["notes"][-1].endswith("in 1 partition")


def test_sigmoids_have_the_grid_that_the_engine_has(artifact: Artifact) -> None:
    model = model_of(artifact)
    (main,) = model.subgraphs
    words = [model.operatorCodes[operator.opcodeIndex].builtinCode for operator in main.operators]
    grids = [
        main.tensors[operator.outputs[0]].quantization
        for operator, found in zip(main.operators, words, strict=True)
        if found == schema.BuiltinOperator.LOGISTIC
    ]
    assert len(grids) == 3
    assert all(np.array_equal(grid.scale, [1 / 256]) and np.array_equal(grid.zeroPoint, [-128]) for grid in grids)
