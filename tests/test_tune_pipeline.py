"""A pass that trains, as a newcomer writes it: recipe, schema, command line, history, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")

from edgepack import parts, pipeline, recipe
from edgepack.artifact import Artifact
from edgepack.compress._tune import Tune
from edgepack.contracts import Pass
from edgepack.errors import InputError, RecipeError
from edgepack.pipeline import Options

PASSES = '''
from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import ClassVar

from edgepack.compress._tune import Hold, Tune, tune
from edgepack.compress._tune_hold import masked
from edgepack.contracts import Pass, Run


@dataclass(frozen=True, kw_only=True)
class Thin(Pass):
    """Half of each convolution's weights become 0, the smaller half.

    Attributes:
        tune: how to train afterwards.
    """

    stage: ClassVar[int] = 20

    tune: Tune | None = None

    def apply(self, module, task, run: Run):
        weights = [value for value in module.parameters() if value.dim() == 4]
        masks = [value.detach().abs() > value.detach().abs().median() for value in weights]
        hold = Hold(project=[masked(*pair) for pair in zip(weights, masks)], schedule=[self._watch])
        return tune(module, task, run, self.tune, hold)

    def _watch(self, progress: float) -> None:
        if progress > float(os.environ.get("KILL_AT", "2")):
            os.kill(os.getpid(), signal.SIGKILL)
'''
MODELS = """
import torch
from torch import nn


def net(width=8):
    torch.manual_seed(width)
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 4)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), *head)


def far(outputs, targets):
    return (outputs.argmax(1) != targets).float().mean() + outputs.square().mean()
"""
RECIPE = """
[model]
module = "models.py:net"
[task]
input = {shape = [1, 3, 12, 12], mean = [0.4, 0.5, 0.6], std = [0.2, 0.2, 0.2], scale = 255}
training = {data = "data.npz", augment = "crop-flip"}
evaluation = {data = "data.npz", samples = 40}
metric = "top1"
loss = {use = "cross_entropy", label_smoothing = 0.1}
[[compress]]
use = "thin_out:Thin"
tune = {epochs = 2, batch = 16, held_out = 10, features = ["auto"]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random = np.random.default_rng(0)
    for name, text in (("models.py", MODELS), ("thin_out.py", PASSES), ("edgepack.toml", RECIPE)):
        (tmp_path / name).write_text(text)
    np.savez(
        tmp_path / "data.npz", x=random.integers(0, 256, (96, 12, 12, 3), dtype=np.uint8), y=random.integers(0, 4, 96)
    )
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("thin_out", None)
    return tmp_path


def weights(out: Path) -> dict[str, np.ndarray]:
    from edgepack.graph import load_graph

    artifact = Artifact.open(out / "compressed")
    program = load_graph(artifact.folder, artifact.manifest).program
    return {name: tensor.numpy() for name, tensor in program.state_dict.items()}


def test_killed_in_the_pipeline_and_run_again(folder: Path) -> None:
    program = "\n".join([
        "import sys", "from pathlib import Path", "from edgepack import pipeline, recipe",
        "out = Path(sys.argv[1], sys.argv[2])",
        "pipeline.compress_recipe(recipe.load(Path(sys.argv[1])), pipeline.Options(out=out))",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program, str(folder), "killed"], check=False, capture_output=True,
                          cwd=folder, env={**os.environ, "KILL_AT": "0.7"})  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = json.loads((folder / "killed" / "work" / "1-thin_out:Thin" / "tune" / "state.json").read_text())
    assert state["epochs"] == 1
    loaded = recipe.load(folder)
    resumed = pipeline.compress_recipe(loaded, Options(out=folder / "killed"))
    calm = pipeline.compress_recipe(loaded, Options(out=folder / "calm"))
    assert any("tune: went on after epoch 1" in note for note in resumed.notes)
    assert not any("went on" in note for note in calm.notes)
    one, other = weights(folder / "killed"), weights(folder / "calm")
    assert one.keys() == other.keys()
    assert all((one[key] == other[key]).all() for key in one)
    assert not (folder / "killed" / "work").exists()
    assert np.mean(one["0.weight"] == 0) == 0.5
    (entry,) = calm.manifest.history
    assert entry["options"]["tune"]["epochs"] == 2
    assert entry["findings"]["tune"]["report"]["samples"] == 10
    assert pipeline.compress_recipe(loaded, Options(out=folder / "calm")).up_to_date
    json.dumps(calm.to_json())


def test_set_reaches_into_the_table(edgepack: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    loaded = recipe.load(folder, ["compress.thin_out:Thin.tune.epochs=3", "compress.0.tune.lr=0.5"])
    tune = loaded.passes[0].tune  # type: ignore[attr-defined]
    assert (tune.epochs, tune.lr, tune.features, tune.rate) == (3, 0.5, ("auto",), 0.5)
    status, out, _ = edgepack("compress", folder, "--dry-run", "--json", "--set", "compress.0.tune.epochs=7")
    assert status == 0
    assert json.loads(out)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.epoch=3", "compress.thin_out:Thin: thin_out:Thin: tune has no option 'epoch', did you mean 'epochs'?"),
        ("tune.epochs=0", "compress.thin_out:Thin: tune: epochs is a whole number from 1, not 0"),
        ("tune.epochs=1.5", "compress.thin_out:Thin: tune.epochs: input should be a valid integer"),
        ("tune.optimizer='adam'", "tune: optimizer is one of sgd, adamw, not 'adam'"),
        ("tune.labels='perhaps'", "tune.labels: input should be a valid boolean"),
        ("tune.features='auto'", "tune.features: expected a list in square brackets, not 'auto'"),
        ("tune=3", "compress.thin_out:Thin: tune: "),
        ("tune.teacher='gone.py:net'", "compress.thin_out:Thin.tune.teacher: gone.py does not exist"),
        ("tune.teacher_weights='gone.pt'", "teacher_weights are of a teacher that is another network"),
        ("tune.minutes=0", "tune: minutes must be above 0, not 0.0"),
        ("tune.teacher='none'", "without a teacher there must be labels and no features"),
    ],
)
def test_a_wrong_table_is_named(folder: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(folder, [f"compress.0.{override}"])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.training.augment=crop-flop", "task.training.augment: augment is made of crop, pad, flip"),
        ("task.evaluation.augment=crop", "task.evaluation.augment: unknown key"),
        ("task.loss='nowhere.py:far'", "task.loss: nowhere.py does not exist"),
    ],
)
def test_a_wrong_task_is_named(folder: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(folder, [override])
    assert message in str(caught.value)


def test_the_task_knows_loss_and_augmentation(folder: Path) -> None:
    task = pipeline.task_of(recipe.load(folder))
    assert (task.augment, task.loss.name if task.loss else None) == ("crop-flip", "cross_entropy")
    task = pipeline.task_of(recipe.load(folder, ["task.loss={use='models.py:far', classifies=true}"]))
    assert task.loss is not None
    assert task.loss.classifies
    with pytest.raises(InputError, match="there is no loss 'cros_entropy'"):
        pipeline.task_of(recipe.load(folder, ["task.loss='cros_entropy'"]))


def test_another_network_as_teacher_is_part_of_what_a_result_is_made_from(folder: Path) -> None:
    (folder / "big.py").write_text(MODELS)
    loaded = recipe.load(folder, ["compress.0.tune={epochs=1, batch=16, teacher='big.py:net', features=['2=1']}"])
    first = pipeline.compress_recipe(loaded, Options())
    assert any("from teacher big.py:net and labels" in note for note in first.notes)
    assert pipeline.compress_recipe(loaded, Options()).up_to_date
    (folder / "big.py").write_text(MODELS.replace("width=8", "width=16"))
    again = pipeline.compress_recipe(loaded, Options())
    assert not again.up_to_date


def test_the_schema_has_the_table(folder: Path) -> None:
    tables: dict[str, dict[str, object]] = {}
    entry = recipe.part_schema("thin", parts.find(Pass, "thin_out:Thin"), tables)
    assert entry["properties"]["tune"]["anyOf"][0] == {"$ref": "#/$defs/Tune"}
    assert "$defs" not in entry
    assert tables["Tune"]["additionalProperties"] is False
    assert set(tables["Tune"]["properties"]) == set(Tune.__dataclass_fields__)  # type: ignore[call-overload]
    whole = recipe.schema()
    training = whole["$defs"]["TrainingSection"]["properties"]
    assert "augment" in training
    assert "loss" in whole["$defs"]["TaskSection"]["properties"]
