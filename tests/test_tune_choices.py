"""Which epoch of a training is kept: judged on which samples, by what, and when it ends early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402

from _tuning import ITEM, images, job, shaken, task, taught  # noqa: E402
from edgepack import metrics  # noqa: E402
from edgepack.compress._tune import Tune, tune  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.task import Task  # noqa: E402


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return taught(tmp_path_factory.mktemp("teacher"))


def test_stops_without_a_better_epoch_and_keeps_the_best(tmp_path: Path, teacher: nn.Module) -> None:
    module = shaken(teacher, 0)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    of = replace(task(), training=Arrays((ITEM,), images(256).raw, (images(256).targets + 1) % 4))  # wrong labels
    run = job(tmp_path, teacher, of)
    tune(module, of, run, Tune(epochs=9, lr=0.1, batch=16, patience=2, teacher="none"))
    assert run.findings["tune"]["ended"] == "no better epoch"
    assert run.findings["tune"]["kept"] == 0
    assert len(run.findings["tune"]["epochs"]) == 3
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_time_budget_ends_it(tmp_path: Path, teacher: nn.Module) -> None:
    run = job(tmp_path, teacher, task())
    tune(shaken(teacher), task(), run, Tune(epochs=1000, batch=32, minutes=1e-9))
    assert run.findings["tune"]["ended"] == "the time budget"
    assert run.findings["tune"]["epochs"][-1]["steps"] == 1


def test_without_evaluation_data_training_samples_are_held_out(tmp_path: Path, teacher: nn.Module) -> None:
    of = Task((ITEM,), training=images(400, labels=False))
    run = job(tmp_path, teacher, of)
    tune(shaken(teacher), of, run, Tune(epochs=1, batch=30))
    found = run.findings["tune"]
    assert (found["report"]["metric"], found["report"]["samples"]) == ("loss", 20)
    assert found["epochs"][1]["steps"] == (400 - 40) // 30
    assert "loss" in run.notes[-1]


def test_epochs_are_chosen_by_the_loss_where_the_samples_were_learnt_from(tmp_path: Path, teacher: nn.Module) -> None:
    of = replace(task(count=400), evaluation=None)
    run = job(tmp_path, teacher, of)
    tune(shaken(teacher), of, run, Tune(epochs=3, batch=32))
    found = run.findings["tune"]
    choices = [row["choice"] for row in found["epochs"]]
    assert found["report"]["metric"] == "top1"
    assert max(choices) < 0  # losses
    assert found["kept"] == max(range(4), key=lambda epoch: choices[epoch])
    assert min(choices) < max(choices)


def test_agreement_is_judged_against_the_original(tmp_path: Path, teacher: nn.Module) -> None:
    of = replace(task(labels=False), metric=metrics.find("agreement", Path()))
    run = job(tmp_path, teacher, of)
    tune(shaken(teacher, 1.5), of, run, Tune(epochs=2, batch=32))
    assert run.findings["tune"]["report"]["value"] > 0.9
