"""Concatenations of more values than XNNPACK joins at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("litert_converter", reason="pip install 'edgepack[tflite]'")
pytest.importorskip("ai_edge_litert", reason="pip install 'edgepack[tflite-run]'")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.export._tflite_concatenations import MOST  # noqa: E402
from edgepack.export.tflite import Tflite  # noqa: E402
from edgepack.exporting import export  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Many(nn.Module):
    """A concatenation of as many values as asked, all of different sizes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(5, 1 + (3 * place) % 4, 1) for place in range(count))
        self.last = nn.Conv2d(sum(part.out_channels for part in self.parts), 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([F.relu(part(x)) for part in self.parts], 1))


@pytest.mark.parametrize(("count", "operators"), [(MOST, 1), (MOST + 1, 2), (2 * MOST, 3)])
def test_concatenations_of_many_values_stay_in_one_partition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, operators: int
) -> None:
    torch.manual_seed(0)
    values = np.random.default_rng(0).standard_normal((8, 5, 6, 6)).astype(np.float32)
    task = Task((Input("x", (1, 5, 6, 6), layout="NCHW"),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(Many(count).eval(), task, [Quantize(equalize=False, explain=False)], tmp_path, Silent())
    manifest = export(tmp_path, [Tflite()], Silent())[0].artifact.manifest
    assert manifest.parity.status == "checked"
    assert manifest.census is not None
    assert manifest.census["operators"]["CONCATENATION"] == operators
    assert manifest.census["notes"][-1].endswith("in 1 partition")
    if count == MOST + 1:  # the engine takes no more
        monkeypatch.setattr("edgepack.export._tflite_concatenations.MOST", count)
        left = export(tmp_path, [Tflite(name="left")], Silent())[0].artifact.manifest.census
        assert left is not None
        assert left["notes"][-1].endswith("left: CONCATENATION 1")
