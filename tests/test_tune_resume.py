"""Training that is killed goes on to the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from edgepack.compress import _tune_state as checkpoint  # noqa: E402
from edgepack.compress._tune import Tune, tune  # noqa: E402
from edgepack.compress._tune_state import State  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

# A training in a process of its own. The parent kills it at random moments and starts it again.
PROGRAM = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
import torch
from torch import nn
import torch._dynamo  # optimizers load it; once here instead of in each child
from safetensors.torch import save_file
from edgepack import metrics
from edgepack.compress import _tune_loop
from edgepack.compress._tune import Hold, Tune, tune
from edgepack.compressing import PassRun
from edgepack.data import Arrays
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task

torch.set_num_threads(1)
settings = Tune(epochs=8, batch=16, held_out=8, norms="eval", **json.loads(sys.argv[2]))
item = Input("x", (1, 3, 8, 8), scale=255)


def train(folder, log):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()]
    original = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 3)).eval()
    torch.manual_seed(1)
    module = __import__("copy").deepcopy(original)
    for value in module.parameters():
        value.data.add_(torch.randn_like(value), alpha=0.3)
    module[7].train()
    random_ = np.random.default_rng(0)
    x, y = random_.integers(0, 256, (160, 8, 8, 3), dtype=np.uint8), random_.integers(0, 3, 160)
    data = Arrays((item,), {"x": x}, y)
    task = Task((item,), training=data, metric=metrics.find("top1", Path()), augment="crop-flip")
    run = PassRun(folder / "work", 0, Plan(), Silent(), original, task)

    def told(progress):
        with log.open("a") as file:
            file.write(f"{progress}\\n")
        time.sleep(0.004)

    scale = nn.Linear(2, 2)
    hold = Hold(schedule=[told], beside=scale, losses=[lambda: scale.weight.square().sum()])
    tune(module, task, run, settings, hold)
    save_file({**module.state_dict(), "scale": scale.weight.detach()}, folder / "weights.safetensors")


def child(folder, log):
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            train(folder, log)
            os._exit(0)
        except BaseException:
            __import__("traceback").print_exc()
            os._exit(1)
    return pid


place, kills, draw = Path(sys.argv[1]), 0, random.Random(5)
assert os.waitpid(child(place / "calm", place / "calm.log"), 0)[1] == 0
while True:
    log = place / f"killed-{kills}.log"
    pid = child(place / "killed", log)
    wait = draw.randint(1, 15)
    while kills < 10 and (not log.exists() or log.read_text().count("\\n") < wait):
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.01))
    if kills < 10:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        break
    kills += 1
print(json.dumps({"kills": kills, "status": os.WEXITSTATUS(status)}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its trainings with fork")
@pytest.mark.parametrize("options", [
    {"features": ["auto"], "lr": 0.05, "mixup": True},
    pytest.param({"optimizer": "adamw", "labels": False}, marks=pytest.mark.slow),
])  # fmt: skip
def test_killed_ten_times(tmp_path: Path, options: dict[str, Any]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(options)], check=True,
                          capture_output=True, text=True, env=environment)  # fmt: skip
    assert json.loads(done.stdout) == {"kills": 10, "status": 0}, done.stderr
    calm, killed = (load_file(tmp_path / name / "weights.safetensors") for name in ("calm", "killed"))
    assert calm.keys() == killed.keys()
    assert all(torch.equal(calm[key], killed[key]) for key in calm)
    steps = 9 * 8  # 144 samples in steps of 16
    texts = [(tmp_path / f"killed-{number}.log").read_text() for number in range(11)]
    logs = [[float(line) * steps for line in text.splitlines()] for text in texts]
    starts, ends = [round(log[1]) if len(log) > 1 else 0 for log in logs], [round(log[-1]) for log in logs]
    for start, end in zip(starts[1:], ends[:-1], strict=True):
        assert start % 9 == 0
        assert end - start < 9 + 1  # at most the epoch that was cut short is done again
    assert max(starts) > 9


ITEM = Input("x", (1, 4))


def run_once(
    folder: Path, settings: Tune, identity: str = "", shift: float = 0.0
) -> tuple[nn.Module, PassRun, list[float]]:
    torch.manual_seed(0)
    module, original = nn.Linear(4, 3), nn.Linear(4, 3)
    with torch.no_grad():
        module.weight.add_(shift)
    x = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    task = Task((ITEM,), training=Arrays((ITEM,), {"x": x}, None, True))
    run = PassRun(folder, 0, Plan(), Silent(), original, task, identity=identity)
    told: list[float] = []
    from edgepack.compress._tune import Hold

    tune(module, task, run, settings, Hold(schedule=[told.append]))
    return module, run, told


def test_what_is_done_is_not_done_again_unless_something_changed(tmp_path: Path) -> None:
    settings = Tune(epochs=2, batch=16, held_out=0)
    first, _, told = run_once(tmp_path, settings)
    assert len(told) == 1 + 2 * (4 + 1) + 1
    again, run, told = run_once(tmp_path, settings)
    assert told == [0.0, 1.0]
    assert not any("begun anew" in note for note in run.notes)
    assert torch.equal(first.weight, again.weight)
    assert run.findings["tune"]["epochs"][-1]["epoch"] == 2
    for change in (
        {"identity": "another pass"},
        {"shift": 0.1},
        {"settings": Tune(epochs=2, batch=16, held_out=0, seed=3)},
    ):
        _, run, told = run_once(tmp_path, **{"settings": settings, **change})
        assert any("begun anew" in note for note in run.notes)
        assert len(told) == 1 + 2 * (4 + 1) + 1, change
        run_once(tmp_path, settings)


def test_a_checkpoint_is_plain_files_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    state = State("x", epochs=3, rows=[{"epoch": 0}], tensors={"module/a": torch.arange(3.0), "best/a": torch.ones(2)})
    state.save(tmp_path / "tune")
    assert sorted(path.name for path in (tmp_path / "tune").iterdir()) == ["state.json", "state.safetensors"]
    assert json.loads((tmp_path / "tune" / "state.json").read_text())["epochs"] == 3
    found = checkpoint.load(tmp_path / "tune", "x")
    assert found is not None
    assert (found.epochs, found.rows, found.part("best")["a"].tolist()) == (3, [{"epoch": 0}], [1, 1])
    assert checkpoint.load(tmp_path / "tune", "y") is None
    assert checkpoint.load(tmp_path / "other", "x") is None
    (tmp_path / "tune" / "state.safetensors").write_bytes(b"\x00" * 40)
    assert checkpoint.load(tmp_path / "tune", "x") is None
    (tmp_path / "tune" / "state.json").write_text("[1]")
    assert checkpoint.load(tmp_path / "tune", "x") is None
