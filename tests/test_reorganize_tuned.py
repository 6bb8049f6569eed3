"""Training after a cut: the keep rate falls on its schedule, accuracy comes back, a killed run goes on."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402

from _networks import ZOO  # noqa: E402
from _reorganizing import vit  # noqa: E402
from edgepack import metrics, pipeline, recipe  # noqa: E402
from edgepack.compress import _cuts  # noqa: E402
from edgepack.compress._cuts import cuts_of, set_progress  # noqa: E402
from edgepack.compress._tune import Tune  # noqa: E402
from edgepack.compress.reorganize import Reorganize  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.pipeline import Options  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

ITEM = Input("x", (1, 3, 32, 32), scale=255, mean=(0.5,), std=(0.25,))
TUNE = Tune(epochs=3, batch=32, lr=5e-3, optimizer="adamw", held_out=40)


def pictures(count: int, seed: int) -> Arrays:
    """64 patches of noise, some of them bright: the class says how many."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count)
    pixels = random.integers(0, 100, (count, 8, 4, 8, 4, 3), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        bright = (random.permutation(64) < 6 * label + 5).reshape(8, 1, 8, 1, 1)
        image += bright.astype(np.uint8) * np.uint8(100)
    return Arrays((ITEM,), {"x": pixels.reshape(count, 32, 32, 3)}, labels)


def task(count: int = 256) -> Task:
    top1 = metrics.find("top1", Path())
    return Task((ITEM,), training=pictures(count, 0), evaluation=pictures(200, 1), metric=top1)


def job(folder: Path, original: nn.Module, of: Task, identity: str = "") -> PassRun:
    return PassRun(folder, 0, Plan(), Silent(), original, of, identity=identity)


def reorganized(network: nn.Module, run: PassRun, **options: Any) -> nn.Module:
    found: nn.Module = Reorganize(**options).apply(copy.deepcopy(network), run.task, run)
    return found


def accuracy(module: nn.Module, of: Task) -> float:
    assert of.evaluation is not None
    (batch,) = of.evaluation.batches(1000)
    with torch.no_grad():
        found = module(torch.from_numpy(batch.inputs["x"])).argmax(1).numpy()
    return float((found == batch.targets).mean())


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A small transformer that knows the task, taught by labels alone and uncut."""
    run = job(tmp_path_factory.mktemp("taught"), vit(depth=3), task())
    found = reorganized(run.original, run, keep_rate=1.0, tune=replace(TUNE, epochs=8, teacher="none"))
    assert accuracy(found, run.task) > 0.9
    return found


@pytest.mark.parametrize("shrink", [0.3, 0.5, 0.0])
def test_the_keep_rate_falls_from_one_to_its_own(
    tmp_path: Path, taught: nn.Module, shrink: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    original = _cuts.set_progress

    def told(module: nn.Module, progress: float, share: float) -> None:
        original(module, progress, share)
        seen.append(cuts_of(module)[0].rate)

    monkeypatch.setattr("edgepack.compress._reorganizing.set_progress", told)
    run = job(tmp_path, taught, task(64))
    found = reorganized(taught, run, keep_rate=0.4, shrink=shrink, tune=replace(TUNE, epochs=2, batch=8))
    steps = [seen[0], *seen[1:9], *seen[10:18]]  # one more at the end of each epoch, one at the very end
    progress = [0.0, *(step / 16 for step in range(16))]
    wanted = [0.4 + 0.3 * (1 + np.cos(np.pi * min(at / shrink, 1))) if shrink else 0.4 for at in progress]
    assert steps == pytest.approx(wanted)
    assert seen[9] == pytest.approx(0.4 if shrink <= 0.5 else 1)
    assert seen[18:] == [0.4, 0.4]
    assert [cut.rate for cut in cuts_of(found)] == [0.4] * 2
    assert run.findings["tune"]["kept"] >= (shrink > 0)  # the network whose tokens are all there is no choice


def test_what_the_cut_lost_comes_back(tmp_path: Path, taught: nn.Module) -> None:
    of = task()
    plain = job(tmp_path / "plain", taught, of)
    lost = accuracy(reorganized(taught, plain, keep_rate=0.2), of)
    run = job(tmp_path / "tuned", taught, of)
    found = reorganized(taught, run, keep_rate=0.2, tune=TUNE)
    assert accuracy(taught, of) - lost > 0.05
    assert accuracy(found, of) > lost + 0.6 * (accuracy(taught, of) - lost)
    assert any(note.startswith("tune: 3 epochs of 256 samples from teacher original and labels") for note in run.notes)
    assert run.findings["tune"]["teacher"] == "original"
    assert run.findings["tokens"]["keep_rate"] == 0.2
    assert list(found.state_dict()) == list(taught.state_dict())


def test_interrupted_in_the_schedule_it_goes_on_to_the_same_weights(
    tmp_path: Path, taught: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, options = task(96), {"keep_rate": 0.5, "shrink": 0.6, "tune": replace(TUNE, epochs=3)}
    calm = reorganized(taught, job(tmp_path / "calm", taught, of), **options)

    def stop(module: nn.Module, progress: float, share: float) -> None:
        if progress > 0.5:
            raise KeyboardInterrupt
        set_progress(module, progress, share)

    with monkeypatch.context() as patch:
        patch.setattr("edgepack.compress._reorganizing.set_progress", stop)
        with pytest.raises(KeyboardInterrupt):
            reorganized(taught, job(tmp_path / "killed", taught, of), **options)
    run = job(tmp_path / "killed", taught, of)
    resumed = reorganized(taught, run, **options)
    assert any("went on after epoch 1" in note for note in run.notes)
    wanted = calm.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())


RECIPE = """
[model]
module = "models.py:VisionTransformer"
options = {width = 16, depth = 3, heads = 2}
[task]
input = {shape = [1, 3, 32, 32], scale = 255, mean = [0.5], std = [0.25]}
training = {data = "data.npz"}
metric = "top1"
[[compress]]
use = "reorganize"
keep_rate = 0.5
tune = {epochs = 2, batch = 16, held_out = 4}
"""


def test_a_recipe_trains_it(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text((ZOO / "models.py").read_text())
    (tmp_path / "edgepack.toml").write_text(RECIPE)
    data = pictures(80, 0)
    np.savez(tmp_path / "data.npz", x=data.raw["x"], y=data.targets)
    loaded = recipe.load(tmp_path, ["compress.reorganize.tune.epochs=1", "compress.reorganize.shrink=0.5"])
    found = pipeline.compress_recipe(loaded, Options(out=tmp_path / "out"))
    (entry,) = found.manifest.history
    assert (entry["options"]["tune"]["epochs"], entry["options"]["shrink"]) == (1, 0.5)
    assert entry["findings"]["tune"]["samples"] == 64
    assert entry["findings"]["tokens"]["blocks"][-1]["tokens"] == [34, 19]
    assert any("score before is the uncut" in note for note in found.notes)


@pytest.mark.parametrize("shrink", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(shrink: float) -> None:
    with pytest.raises(ValueError, match=f"shrink is at least 0 and below 1, not {shrink}"):
        Reorganize(shrink=shrink)
