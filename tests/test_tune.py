"""The training loop: what is learnt, chosen, enforced and reported."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from _tuning import ITEM, accuracy, images, job, net, shaken, task, taught  # noqa: E402
from edgepack import losses, metrics  # noqa: E402
from edgepack.compress._tune import Hold, Tune, tune  # noqa: E402
from edgepack.compress._tune_hold import Grid, masked, on_grids  # noqa: E402
from edgepack.compress._tune_steps import seed_of  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.errors import InputError  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return taught(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("features", [(), ("3",)])
def test_bfloat16_computes_layers_in_it_and_everything_else_in_float(
    tmp_path: Path, teacher: nn.Module, features: tuple[str, ...]
) -> None:
    scores, seen = {}, {"bfloat16": set[tuple[bool, Any]](), "float32": set[tuple[bool, Any]]()}
    for precision in seen:
        module, of = net(), task()
        run = job(tmp_path / precision, teacher, of)
        hook = module[5].register_forward_hook(
            lambda layer, inputs, result, own=seen[precision]: own.add((torch.is_grad_enabled(), result.dtype))
        )
        tune(module, of, run, Tune(epochs=4, lr=0.1, batch=32, precision=precision, features=features))
        hook.remove()
        scores[precision] = run.findings["tune"]["report"]["value"]
        assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert seen["bfloat16"] == {(True, torch.bfloat16), (False, torch.float32)}
    assert seen["float32"] == {(True, torch.float32), (False, torch.float32)}
    assert scores["bfloat16"] == pytest.approx(scores["float32"], abs=0.05)
    assert scores["bfloat16"] > 0.8


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("options", [{}, {"features": ("auto",)}, {"optimizer": "adamw", "norms": "train"}])
def test_what_was_lost_is_regained(tmp_path: Path, teacher: nn.Module, labels: bool, options: dict[str, Any]) -> None:
    module, of = shaken(teacher, 1.5), task(labels)
    before, keys = accuracy(module, of), list(module.state_dict())
    run = job(tmp_path, teacher, of)
    assert tune(module, of, run, Tune(epochs=2, batch=32, **options)) is module
    after = accuracy(module, of)
    assert before < 0.85
    assert after > 0.5 + before / 2
    assert not module.training
    assert list(module.state_dict()) == keys  # no projector, nothing of the loop
    assert all("forward" not in vars(layer) and not layer._forward_hooks for layer in module.modules())
    found = run.findings["tune"]
    assert found["labels"] is labels
    assert found["samples"] == 2 * 256
    assert [row["epoch"] for row in found["epochs"]] == [0, 1, 2]
    assert found["report"]["value"] > found["epochs"][0]["report"]["value"]
    assert found["report"]["samples"] == 100
    assert ("without labels: the training data have no targets" in run.notes[0]) is not labels
    assert "on 100 samples held out" in run.notes[-1]


def test_the_original_is_never_touched(tmp_path: Path, teacher: nn.Module) -> None:
    before = [
        (value.clone(), value.stride(), value.requires_grad) for value in teacher.state_dict(keep_vars=True).values()
    ]
    tune(shaken(teacher), task(), job(tmp_path, teacher, task()), Tune(epochs=1, features=("auto",)))
    for (value, stride, grad), now in zip(before, teacher.state_dict(keep_vars=True).values(), strict=True):
        assert torch.equal(value, now)
        assert (stride, grad) == (now.stride(), now.requires_grad)


@pytest.mark.parametrize("mixup", [False, True])
def test_one_step_is_what_pytorch_does_by_hand(tmp_path: Path, teacher: nn.Module, mixup: bool) -> None:
    """One epoch of one step against the same step written out, in Eval mode, with teacher and labels."""
    of = task(count=32)
    settings = Tune(
        epochs=1, batch=32, lr=0.1, warmup=0, weight_decay=0.01, share=0.7, temperature=3, held_out=0, clip=2,
        mixup=mixup,
    )  # fmt: skip
    module, reference = shaken(teacher), shaken(teacher)
    tune(module, of, job(tmp_path, teacher, of), settings)
    (batch,) = of.training.take(np.random.default_rng([0, 0, 1]).permutation(32).tolist())
    x, y = torch.from_numpy(batch.inputs["x"]), torch.from_numpy(batch.targets)
    torch.manual_seed(seed_of(0, 0, 1))
    share, other = (float(torch.rand(())), torch.randperm(32)) if mixup else (1.0, torch.arange(32))
    x, others = share * x + (1 - share) * x[other], y[other]
    groups = [{"params": [v for v in reference.parameters() if v.dim() > 1], "weight_decay": 0.01},
              {"params": [v for v in reference.parameters() if v.dim() == 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    scores, wanted = reference(x), teacher(x).detach()
    divergence = F.kl_div(F.log_softmax(scores / 3, 1), F.softmax(wanted / 3, 1), reduction="batchmean")
    labels = share * F.cross_entropy(scores, y) + (1 - share) * F.cross_entropy(scores, others)
    (0.3 * labels + 0.7 * 9 * divergence).backward()
    nn.utils.clip_grad_norm_(reference.parameters(), 2)
    optimizer.step()
    for name, value in module.named_parameters():
        torch.testing.assert_close(value, reference.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_what_is_no_image_cannot_be_mixed(tmp_path: Path) -> None:
    item = Input("x", (1, 6), dtype="int64")
    words = Arrays((item,), {"x": np.zeros((8, 6), np.int64)}, np.zeros(8, np.int64), True)
    module = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(18, 4))
    of = Task((item,), training=words, metric=metrics.find("top1", Path()))
    with pytest.raises(InputError, match="tune: mixup: an input holds whole numbers, which cannot be mixed"):
        tune(module, of, job(tmp_path, module, of), Tune(epochs=1, batch=4, held_out=0, mixup=True))


def test_masks_stay_and_everything_else_moves(tmp_path: Path, teacher: nn.Module) -> None:
    module = shaken(teacher)
    mask = torch.rand_like(module[0].weight) < 0.5
    seen = []

    def look() -> None:
        seen.append(float(module[0].weight[~mask].abs().max()))

    before = module[0].weight.detach().clone()
    hold = Hold(project=[masked(module[0].weight, mask), look])
    tune(module, task(), job(tmp_path, teacher, task()), Tune(epochs=1, batch=64), hold)
    assert seen == [0.0] * (1 + 4 + 1)  # before, after each step, at the end
    assert not torch.equal(module[0].weight[mask], before[mask])


def test_weights_end_on_their_grid(tmp_path: Path, teacher: nn.Module) -> None:
    module = shaken(teacher, 0)
    names = ["0.weight", "5.weight"]
    scales = [module.get_parameter(name).detach().abs().flatten(1).amax(1) / 3 for name in names]
    grids = {name: Grid(scale.view(-1, *[1] * (module.get_parameter(name).dim() - 1)), 3)
             for name, scale in zip(names, scales, strict=True)}  # fmt: skip
    with on_grids(module, grids):
        rounded = module[5].weight.detach().clone()
        tune(module, task(), job(tmp_path, teacher, task()), Tune(epochs=2, batch=32))
    for name, grid in grids.items():
        steps = module.get_parameter(name).detach() / grid.scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
        assert steps.abs().max() <= 3 + 1e-5
    assert not torch.equal(module[5].weight, rounded)
    assert [name for name, _ in module.named_parameters()] == [
        "0.bias",
        "0.weight",
        "1.weight",
        "1.bias",
        "5.bias",
        "5.weight",
    ]


def test_the_straight_through_gradient_stops_where_weights_are_clipped() -> None:
    weight = torch.tensor([0.26, -0.9, 0.04], requires_grad=True)
    rounded = Grid(torch.tensor(0.1), 7)(weight)
    torch.testing.assert_close(rounded, torch.tensor([0.3, -0.7, 0.0]))
    rounded.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 0, 1]


def test_schedules_losses_and_what_is_trained_beside(tmp_path: Path, teacher: nn.Module) -> None:
    module, beside, told = shaken(teacher), nn.Linear(1, 1), []
    hold = Hold(schedule=[told.append], settled=0.5, losses=[lambda: beside.weight.square().sum()], beside=beside)
    before = float(beside.weight.detach().abs())
    run = job(tmp_path, teacher, task())
    tune(module, task(), run, Tune(epochs=2, batch=64, lr=0.1), hold)
    steps = [step / 8 for step in range(8)]
    assert told == [0.0, *steps[:4], 0.5, *steps[4:], 1.0, 1.0]  # an epoch is judged where the next one begins
    assert float(beside.weight.detach().abs()) < before
    assert run.findings["tune"]["kept"] >= 1  # the network before its schedules settled is no choice


def test_without_settings_only_what_is_held_is_enforced(tmp_path: Path) -> None:
    module, told = net(), []
    mask = torch.zeros_like(module[0].weight)
    tune(
        module.train(),
        task(),
        job(tmp_path, module, task()),
        None,
        Hold(project=[masked(module[0].weight, mask)], schedule=[told.append]),
    )
    assert told == [1.0]
    assert not module[0].weight.any()
    assert not module.training


def test_learning_rate_rises_and_falls() -> None:
    from edgepack.compress._tune_steps import rate_at

    settings = Tune(lr=1.0, warmup=0.1)
    rates = [rate_at(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10:] == pytest.approx([(1 + math.cos(math.pi * step / 90)) / 2 for step in range(90)])
    assert [rate_at(0, 1, Tune(warmup=warm)) > 0 for warm in (0, 1)] == [True, True]


def test_norms_biases_and_positions_do_not_decay() -> None:
    from edgepack.compress._tune_steps import build

    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm([2, 3]), nn.MultiheadAttention(4, 1), nn.BatchNorm1d(3))
    module.register_parameter("positions", nn.Parameter(torch.zeros(1, 5, 3)))
    groups = build(module, nn.Module(), Tune(optimizer="adamw", weight_decay=0.1)).param_groups
    names = {value: name for name, value in module.named_parameters()}
    decaying = {names[v] for group in groups if group["weight_decay"] for v in group["params"]}
    assert decaying == {"0.weight", "2.in_proj_weight", "2.out_proj.weight"}
    assert {names[v] for group in groups for v in group["params"]} == set(names.values())


def test_frozen_parameters_stay(tmp_path: Path, teacher: nn.Module) -> None:
    module = shaken(teacher)
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    tune(module, task(), job(tmp_path, teacher, task()), Tune(epochs=1))
    assert torch.equal(module[0].weight, before)
    assert not module[0].weight.requires_grad
    assert module[5].weight.requires_grad


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path, teacher: nn.Module) -> None:
    found = []
    of = replace(task(), augment="crop-flip")
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # whatever happened before does not matter
        module = shaken(teacher)
        module.add_module("6", nn.Dropout(0.3).train())
        tune(
            module,
            of,
            job(tmp_path / str(number), teacher, of),
            Tune(epochs=1, batch=32, seed=seed, features=("auto",)),
        )
        found.append(module[0].weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@dataclass(frozen=True)
class Refusal:
    options: dict[str, Any]
    of: Task
    text: str


@pytest.mark.parametrize("case", [
    Refusal({}, Task((ITEM,)), "the task has no training data"),
    Refusal({"teacher": "none"}, task(labels=False), "nothing to learn from: the training data have no targets"),
    Refusal({"teacher": "none"}, Task((ITEM,), training=images(9)), "nothing to learn from: the task names no loss"),
    Refusal({"teacher": "missing.py:net"}, task(), "missing.py does not exist"),
    Refusal({"features": ("1.conv",)}, task(), "the network has no layer '1.conv'"),
    Refusal({"features": ("2=head",)}, task(), "the teacher has no layer 'head'"),
    Refusal({"features": ("0",)}, task(), "'0' is merged with its batch norm"),
    Refusal({"lr": 1e30}, task(), "the loss is nan in step 2 of 20"),
    Refusal({}, replace(task(), loss=losses.find("mse", Path())), "loss mse of outputs"),
], ids=lambda case: case.text)  # fmt: skip
def test_refusals(tmp_path: Path, teacher: nn.Module, case: Refusal) -> None:
    with pytest.raises(InputError, match=case.text.replace(".", r"\.")):
        tune(shaken(teacher), case.of, job(tmp_path, teacher, case.of), Tune(**case.options))


def test_a_teacher_for_another_task(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 7))\n"
    )
    run = replace(job(tmp_path, net(), task()), folder=tmp_path)
    with pytest.raises(InputError, match=r"the teacher's outputs are \[\(64, 7\)\], the network's \[\(64, 4\)\]"):
        tune(net(), task(), run, Tune(teacher="big.py:build"))
