"""Networks of other kinds in the training loop: pictures as answers, one memory layout, no batch axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from _tuning import job, shaken, task  # noqa: E402
from edgepack import metrics  # noqa: E402
from edgepack.compress._tune import Tune, tune  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.errors import Unsupported  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


class Upscale(nn.Module):
    """Twice the size, with a picture and a number as answers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1))

    def forward(self, x: Any) -> dict[str, Any]:
        wide = F.interpolate(x, scale_factor=2, mode="nearest")
        return {"mean": x.mean((1, 2, 3)), "picture": wide + F.pixel_shuffle(self.body(x), 2)}


def psnr_of(module: nn.Module, of: Task) -> float:
    (batch,) = of.evaluation.batches(1000)
    with torch.no_grad():
        found = module(torch.from_numpy(batch.inputs["x"]))["picture"].numpy()
    return float(np.mean(10 * np.log10(1 / np.square(found - batch.targets).mean((1, 2, 3)))))


@pytest.mark.parametrize("labels", [True, False])
def test_super_resolution_with_psnr(tmp_path: Path, labels: bool) -> None:
    random = np.random.default_rng(0)
    fine = random.random((96, 3, 5, 5), dtype=np.float32).repeat(4, 2).repeat(4, 3)[..., 2:18, 1:17]
    coarse = fine.reshape(96, 3, 8, 2, 8, 2).mean((3, 5))
    item = Input("x", (1, 3, 8, 8))
    whole = [
        Arrays((item,), {"x": coarse[rows].transpose(0, 2, 3, 1)}, fine[rows]) for rows in (slice(64), slice(64, 96))
    ]
    psnr = metrics.find({"use": "psnr", "output": "picture"}, Path())
    of = Task((item,), training=whole[0], evaluation=whole[1], metric=psnr, augment="flip")
    torch.manual_seed(0)
    original = Upscale()
    adam = {"optimizer": "adamw", "lr": 3e-3, "batch": 8}
    run = job(tmp_path / "teacher", original, of)
    tune(original, of, run, Tune(epochs=8, teacher="none", held_out=0, **adam))
    module = shaken(original, 1)
    run = job(tmp_path / "student", original, of)
    tune(module, of, run, Tune(epochs=4, labels=labels, **adam))
    report, before = run.findings["tune"]["report"], run.findings["tune"]["epochs"][0]["report"]["value"]
    assert report["metric"] == "psnr"
    assert report["value"] - before > 0.5 * (psnr_of(original, of) - before)


class Vector(nn.Module):
    """Views the memory of an image as a vector, which it can only be in one layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 4)

    def forward(self, x: Any) -> Any:
        return self.head(self.conv(x).view(len(x), -1))


def test_networks_that_bear_one_layout_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Vector()
    run = job(tmp_path, module, task())
    tune(module, task(), run, Tune(epochs=1, teacher="none"))
    assert module.conv.weight.is_contiguous()
    assert run.findings["tune"]["kept"] == 1


def test_an_input_without_a_batch_axis(tmp_path: Path) -> None:
    item = Input("p", (5, 2), dynamic=())
    of = Task((item,), training=Arrays((item,), {"p": np.zeros((9, 5, 2), np.float32)}, None, True))
    with pytest.raises(Unsupported, match=r"input 'p' \[5, 2\] has no batch axis"):
        tune(nn.Linear(2, 2), of, job(tmp_path, nn.Linear(2, 2), of), Tune())
