"""Convolutions born as products: conversions are exact, sizes are the formulas', the first variance is He's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from edgepack import losses  # noqa: E402
from edgepack._findings import findings  # noqa: E402
from edgepack.compress._apriori import (  # noqa: E402
    FORMS,
    Apriori,
    AprioriConv1d,
    AprioriConv2d,
    AprioriConv3d,
    parameters_of,
)
from edgepack.compress._stages import Form, Stage  # noqa: E402
from edgepack.compress._tune import Tune  # noqa: E402
from edgepack.compress.factorize import Factorize  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.contracts import Pass  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.errors import InputError, Unsupported  # noqa: E402
from edgepack.measurement import Ratio  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.recipe import build  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

SIZES = (9, 8, 7)
pair = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(FORMS), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4),
       st.integers(1, 3), st.booleans(), pair, pair, pair)  # fmt: skip
def test_both_conversions_are_exact(
    form: str, axes: int, groups: int, inputs: int, outputs: int, rank: int, bias: bool,
    kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...],
) -> None:  # fmt: skip
    padding = tuple(taps - 1 for taps in kernel)
    shape = (kernel[:axes], stride[:axes], padding[:axes], dilation[:axes])
    dense = Stage(groups * inputs, groups * outputs, *shape, groups, bias)
    try:
        layer = Apriori(dense, form, rank).double()
    except ValueError:
        assert (form, axes) in {("2-way", 1), ("shared", 3)} or (form == "cp" and max(shape[0]) == 1)
        return
    if bias:
        nn.init.normal_(layer.bias)
    assert sum(value.numel() for value in layer.parameters()) == parameters_of(dense, Form(form, (rank,)))
    x = torch.randn(2, groups * inputs, *SIZES[:axes], dtype=torch.float64)
    with torch.no_grad():
        wanted, rebuilt, chain = layer(x), layer.rebuilt(), layer.factored()
        assert type(rebuilt) is (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        assert torch.allclose(rebuilt(x), wanted, rtol=0, atol=1e-12)
        assert (chain is None) == (form == "2-way")
        if chain is not None:
            assert (chain(x) - wanted).abs().max() <= 1e-10 * wanted.abs().max().clamp_min(1)


def test_kernels_are_the_products_that_the_text_says() -> None:
    torch.manual_seed(0)
    layer = AprioriConv2d(3, 4, (5, 3), "3-way", rank=2, padding="same")
    a, u, v = (factor.detach() for factor in layer.factors)
    wanted = torch.einsum("orc,ori,orj->ocij", a.view(4, 2, 3), u.view(4, 2, 5), v.view(4, 2, 3))
    assert torch.allclose(layer.kernel(), wanted, atol=1e-6)
    assert sum(value.numel() for value in layer.parameters()) == 4 * 2 * (3 + 5 + 3) + 4
    two = AprioriConv2d(3, 4, 3, "2-way", rank=2, bias=False)
    u, v = two.factors
    assert torch.allclose(two.kernel(), torch.einsum("ocri,ocrj->ocij", u, v), atol=1e-6)
    assert sum(value.numel() for value in two.parameters()) == 4 * 3 * 2 * (3 + 3)
    line = AprioriConv1d(6, 4, 5, rank=2, bias=False)
    assert sum(value.numel() for value in line.parameters()) == 4 * 2 * (6 + 5)
    block = AprioriConv3d(6, 4, 3, "cp", rank=5, bias=False)
    assert sum(value.numel() for value in block.parameters()) == 5 * (6 + 4 + 9)
    assert block(torch.zeros(1, 6, 5, 5, 5)).shape == (1, 4, 3, 3, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_variance_of_a_new_kernel_is_that_of_he(form: str, rank: int) -> None:
    torch.manual_seed(1)
    found = np.mean([AprioriConv2d(32, 48, 3, form, rank).kernel().detach().var().item() for _ in range(60)])
    assert found == pytest.approx(2 / (32 * 9), rel=0.2)


@pytest.mark.parametrize(("options", "text"), [
    ({"form": "4-way"}, "form is one of 3-way, 2-way, shared, cp, not '4-way'"),
    ({"rank": 0}, "rank is a whole number from 1, not 0"),
])  # fmt: skip
def test_layers_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AprioriConv2d(3, 4, 3, **options)


ITEM = Input("x", (1, 3, 12, 12))


def net() -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.Conv2d(8, 16, 3, 2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *middle, *head).eval()


def apply(module: nn.Module, folder: Path, task: Task, **options: Any) -> tuple[nn.Module, PassRun]:
    run = PassRun(folder, 0, Plan(), Silent(), module, task)
    item = Factorize(when="before-training", **options)
    return item.apply(copy.deepcopy(module), task, run), run


def bright(count: int) -> Arrays:
    """Noise whose brightest channel is the class."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, count)
    x = random.normal(size=(count, 12, 12, 3)).astype(np.float32)
    x[np.arange(count), :, :, y] += 0.7
    return Arrays((ITEM,), {"x": x}, y)


def test_a_network_is_born_small_and_learns(tmp_path: Path) -> None:
    task = Task((ITEM,), training=bright(256), loss=losses.find("cross_entropy", tmp_path))
    training = Tune(epochs=4, lr=0.1, batch=32, teacher="none", norms="train", held_out=0)
    module, run = apply(net(), tmp_path, task, rank=2, targets=(), tune=training)
    assert {type(layer) for layer in module.modules() if not list(layer.children())} <= {
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}  # fmt: skip
    rows = {row["layer"]: row for row in run.findings["products"]["layers"]}
    assert set(rows) == {"0", "2"}
    assert rows["2"]["parameters"] == [8 * 16 * 9 + 16, 16 * 2 * (8 + 6) + 16]
    assert {name: row["written"] for name, row in rows.items()} == {"0": "factored", "2": "rebuilt"}  # fewer MACs
    (batch,) = bright(256).batches(256)
    with torch.no_grad():
        right = module(torch.from_numpy(batch.inputs["x"])).argmax(1).numpy() == batch.targets
    assert right.mean() > 0.9
    assert run.notes[-1].startswith("2 convolutions are products (3-way, rank 2): ")
    shown = findings({"manifest": {"history": [{"findings": run.findings}]}})["products"]
    assert shown is not None
    assert [(row["layer"], row["ranks"], row["written"]) for row in shown["rows"]] == [
        ("0", "2", "factored"), ("2", "2", "rebuilt")]  # fmt: skip


def test_the_faster_form_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time(self: PassRun, modules: Sequence[nn.Module], task: Task, format: str, then: Any) -> list[float]:
        return [1.0, 0.5 if task.inputs[0].shape[1] == 3 else 2.0]

    monkeypatch.setattr(PassRun, "time", time)
    monkeypatch.setattr(PassRun, "measure", lambda *_: Ratio(1, 1, 1, "", "same", 1))
    module, run = apply(net(), tmp_path, Task((ITEM,)), method="cp", rank=4)
    written = {row["layer"]: row["written"] for row in run.findings["products"]["layers"]}
    assert written == {"0": "factored", "2": "rebuilt"}
    assert isinstance(module[0], nn.Sequential)
    assert isinstance(module[2], nn.Conv2d)
    assert run.notes[0] == "nothing was trained: the new kernels are random"


def test_names_of_forms_and_methods_are_those_of_the_modules() -> None:
    from edgepack.compress import _stages, factorize

    assert factorize.FORMS == FORMS
    assert set(factorize.METHODS) == {*_stages.METHODS, "auto"}


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="factorize: 3-way 50 makes no convolution smaller"):
        apply(net(), tmp_path, Task((ITEM,)), rank=50, targets=())
    for options, text in (
        ({"when": "later"}, "when is 'after-training' or 'before-training', not 'later'"),
        ({"when": "before-training", "method": "tucker"}, "method is one of 3-way, 2-way, shared, cp before training"),
        ({"when": "before-training", "energy": 0.5}, "before training rank is a whole number"),
        ({"when": "before-training", "macs_ratio": 0.5}, "before training rank is a whole number"),
    ):
        with pytest.raises(InputError, match=text):
            build(Pass, {"use": "factorize", **options})
