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

from edgepack import losses, metrics  # noqa: E402
from edgepack.compress._tune import Hold, Tune, tune  # noqa: E402
from edgepack.compress._tune_hold import Grid, masked, on_grids  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.errors import InputError, Unsupported  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

ITEM = Input("x", (1, 3, 8, 8), scale=255, mean=(0.5,), std=(0.25,))


def net(width: int = 8, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, classes)).eval()


def images(count: int, seed: int = 0, labels: bool = True) -> Arrays:
    """Dark noise with a bright quarter that says the class."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 4, count)
    x = random.integers(0, 140, (count, 8, 8, 3), dtype=np.uint8)
    for image, quarter in zip(x, y, strict=True):
        image[4 * (quarter // 2) :, 4 * (quarter % 2) :][:4, :4] += 60
    return Arrays((ITEM,), {"x": x}, y if labels else None)


def task(labels: bool = True, count: int = 256, **options: Any) -> Task:
    top1 = metrics.find("top1", Path())
    return Task((ITEM,), training=images(count, 0, labels), evaluation=images(200, 1), metric=top1, **options)


def job(folder: Path, original: nn.Module, of: Task, seed: int = 0) -> PassRun:
    return PassRun(folder, seed, Plan(), Silent(), original, of)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A network that knows the task, taught by labels alone."""
    module, of = net(), task()
    run = job(tmp_path_factory.mktemp("teacher"), module, of)
    tune(module, of, run, Tune(epochs=6, lr=0.1, teacher="none", held_out=0, batch=32))
    assert accuracy(module, of) > 0.95
    return module


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


def accuracy(module: nn.Module, of: Task) -> float:
    (batch,) = of.evaluation.batches(1000)
    with torch.no_grad():
        found = module(torch.from_numpy(batch.inputs["x"])).argmax(1).numpy()
    return float((found == batch.targets).mean())


def shaken(module: nn.Module, amount: float = 0.5) -> nn.Module:
    """A copy that was spoiled."""
    import copy

    copied = copy.deepcopy(module)
    torch.manual_seed(1)
    for value in copied.parameters():
        value.data += amount * value.data.std(correction=0) * torch.randn_like(value)
    return copied


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


def test_one_step_is_what_pytorch_does_by_hand(tmp_path: Path, teacher: nn.Module) -> None:
    """One epoch of one step against the same step written out, in Eval mode, with teacher and labels."""
    of = task(count=32)
    settings = Tune(
        epochs=1, batch=32, lr=0.1, warmup=0, weight_decay=0.01, share=0.7, temperature=3, held_out=0, clip=2
    )
    module, reference = shaken(teacher), shaken(teacher)
    tune(module, of, job(tmp_path, teacher, of), settings)
    (batch,) = of.training.batches(32)
    x, y = torch.from_numpy(batch.inputs["x"]), torch.from_numpy(batch.targets)
    groups = [{"params": [v for v in reference.parameters() if v.dim() > 1], "weight_decay": 0.01},
              {"params": [v for v in reference.parameters() if v.dim() == 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    scores, wanted = reference(x), teacher(x).detach()
    divergence = F.kl_div(F.log_softmax(scores / 3, 1), F.softmax(wanted / 3, 1), reduction="batchmean")
    (0.3 * F.cross_entropy(scores, y) + 0.7 * 9 * divergence).backward()
    nn.utils.clip_grad_norm_(reference.parameters(), 2)
    optimizer.step()
    for name, value in module.named_parameters():
        torch.testing.assert_close(value, reference.get_parameter(name), rtol=1e-4, atol=1e-5)


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


def test_an_input_without_a_batch_axis(tmp_path: Path) -> None:
    item = Input("p", (5, 2), dynamic=())
    of = Task((item,), training=Arrays((item,), {"p": np.zeros((9, 5, 2), np.float32)}, None, True))
    with pytest.raises(Unsupported, match=r"input 'p' \[5, 2\] has no batch axis"):
        tune(nn.Linear(2, 2), of, job(tmp_path, nn.Linear(2, 2), of), Tune())


def test_a_teacher_for_another_task(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 7))\n"
    )
    run = replace(job(tmp_path, net(), task()), folder=tmp_path)
    with pytest.raises(InputError, match=r"the teacher's outputs are \[\(64, 7\)\], the network's \[\(64, 4\)\]"):
        tune(net(), task(), run, Tune(teacher="big.py:build"))
