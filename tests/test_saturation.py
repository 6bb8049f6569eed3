"""Layers whose 8-bit products saturate without VNNI: found exactly, and only those get 7-bit weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from torch import Tensor, fx, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.compress._saturation import saturates  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

aten = torch.ops.aten
PLAIN: dict[str, Any] = {
    "equalize": False, "bias_correct": False, "rounding": "nearest", "calibrate": "minmax", "explain": False,
}  # fmt: skip

# Two weights of 127 on activations of 255, at flat positions channel · 9 + tap of a 3×3 convolution of three channels:
# those that ONNX Runtime 1.32 added with saturation on an emulated Haswell (qemu-x86_64 -cpu Haswell), of all 351.
MEASURED = {
    (0, 9), (1, 18), (2, 11), (3, 20), (4, 13), (5, 22), (6, 15), (7, 24), (8, 17), (10, 19), (12, 21), (14, 23),
    (16, 25),
}  # fmt: skip


def layer(operator: Any, *more: Any) -> fx.Node:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    return graph.call_function(operator, (x, weight, None, *more))


def saturated_by_hand(read: np.ndarray, weight: np.ndarray, stride: int, padding: int, groups: int, zero: int) -> bool:
    """Every pair at every position of every output channel, one after the other."""
    if weight.shape[1] == 1 and weight.shape[0] == groups:
        return False
    read = np.pad(read, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=zero)
    rows, inside, size = weight.shape[0], weight.shape[1], weight.shape[2]
    for image, row in itertools.product(range(len(read)), range(rows)):
        first = row // (rows // groups) * inside
        places = range(0, read.shape[2] - size + 1, stride)
        for top, left in itertools.product(places, places):
            products = [
                int(read[image, first + channel, top + i, left + j]) * int(weight[row, channel, i, j])
                for i in range(size) for j in range(size) for channel in range(inside)
            ]  # fmt: skip
            for index in range(0, len(products) - 1, 2):
                if not -(2**15) <= products[index] + products[index + 1] <= 2**15 - 1:
                    return True
    return False


def test_pairs_are_those_that_an_engine_adds_in_16_bits() -> None:
    node = layer(aten.conv2d.default, [1, 1], [0, 0], [1, 1], 1)
    read = torch.full((1, 3, 3, 3), 255.0)
    found = set()
    for pair in itertools.combinations(range(27), 2):
        weight = torch.zeros(1, 27)
        weight[0, list(pair)] = 127
        if saturates(node, read, weight.view(1, 3, 3, 3), 0):
            found.add(pair)
    assert found == MEASURED


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 3), (4, 4)]),
    size=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    zero=st.sampled_from([0, 128, 255]),
    top=st.sampled_from([63, 100, 127]),
)
def test_what_is_found_is_what_a_slow_computation_finds(
    seed: int, channels: tuple[int, int], size: int, stride: int, padding: int, zero: int, top: int
) -> None:
    numbers = np.random.default_rng(seed)
    count, groups = channels
    shape = (2 * groups, count // groups, size, size)
    large = numbers.random(shape) < 0.15
    weight = np.where(large, numbers.choice([-top, top], shape), numbers.integers(-40, 41, shape))
    read = np.where(numbers.random((2, count, 4, 4)) < 0.3, 255, numbers.integers(0, 160, (2, count, 4, 4)))
    node = layer(aten.conv2d.default, [stride, stride], [padding, padding], [1, 1], groups)
    wanted = saturated_by_hand(read, weight, stride, padding, groups, zero)
    assert saturates(node, torch.tensor(read).float(), torch.tensor(weight).float(), zero) == wanted
    if top == 63:
        assert not wanted


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), columns=st.integers(1, 9))
def test_columns_of_linear_layers_pair_in_order(seed: int, columns: int) -> None:
    numbers = np.random.default_rng(seed)
    weight, read = numbers.integers(-127, 128, (3, columns)), numbers.integers(100, 256, (2, 5, columns))
    sums = [
        read[..., i].astype(int)[..., None] * weight[:, i] + read[..., i + 1].astype(int)[..., None] * weight[:, i + 1]
        for i in range(0, columns - 1, 2)
    ]
    wanted = any(((total > 2**15 - 1) | (total < -(2**15))).any() for total in sums)
    node = layer(aten.linear.default)
    assert saturates(node, torch.tensor(read).float(), torch.tensor(weight).float(), 0) == wanted


def test_depthwise_layers_do_not_and_unknown_layouts_are_judged_by_their_two_largest_weights() -> None:
    depthwise = layer(aten.conv2d.default, [1, 1], [0, 0], [1, 1], 4)
    assert not saturates(depthwise, torch.full((1, 4, 3, 3), 255.0), torch.full((4, 1, 3, 3), 127.0), 0)
    solid = layer(aten.conv3d.default, [1, 1, 1], [0, 0, 0], [1, 1, 1], 1)
    weight = torch.zeros(1, 2, 2, 2, 2)
    weight[0, 0, 0, 0, 0], weight[0, 1, 1, 1, 1] = 100, 20
    assert not saturates(solid, torch.zeros(1), weight, 0)
    weight[0, 1, 1, 1, 1] = 29
    assert saturates(solid, torch.zeros(1), weight, 0)
    line = layer(aten.conv1d.default, [1], [1], [1], 1)
    row = torch.tensor([[[0.0, 127.0, 0.0], [0.0, 127.0, 0.0]]])
    assert saturates(line, torch.full((1, 2, 5), 255.0), row, 0)
    assert not saturates(line, torch.full((1, 2, 5), 255.0), row.roll(1, 2) * torch.tensor([[[1.0], [0.0]]]), 0)


class Three(nn.Module):
    """The second layer's weights are large and of one sign; in the others signs alternate from channel to channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        with torch.no_grad():
            signs = torch.tensor([1.0, -1.0]).repeat(4)
            self.a.weight.copy_(self.a.weight.abs() * signs[:4].view(1, -1, 1, 1))
            self.a.bias.fill_(1.0)
            self.b.weight.copy_(self.b.weight.abs() + 0.05)
            self.c.weight.copy_(self.c.weight.abs() * signs)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu().amax((2, 3)))


def rounded(folder: Path, **options: Any) -> tuple[nn.Module, PassRun, Task]:
    values = np.random.default_rng(0).random((16, 4, 6, 6)).astype(np.float32)
    task = Task((Input("x", (1, 4, 6, 6)),), calibration=Samples(values))
    module = Three().eval()
    run = PassRun(folder, 0, Plan(), Silent(), module, task)
    return Quantize(**{**PLAIN, **options}).apply(module, task, run), run, task


@pytest.mark.parametrize("how", [{}, {"rounding": "gptq", "bias_correct": True, "equalize": True}])
def test_only_layers_that_saturate_get_seven_bits(tmp_path: Path, how: dict[str, Any]) -> None:
    plain, before, task = rounded(tmp_path, **how)
    module, run, _ = rounded(tmp_path, **how, target="avx2")
    bits = {name: entry["weight"]["bits"] for name, entry in run.plan.nodes.items() if "weight" in entry}
    assert bits == {"conv2d": 8, "conv2d_1": 7, "linear": 8}
    assert "7-bit weights where products saturate without VNNI: 1 of 3 layers: b" in run.notes
    assert run.findings["saturation"] == {"target": "avx2", "layers": ["b"]}
    scale, old = (one.plan.tensors["conv2d_1/weight_scale"] for one in (run, before))
    np.testing.assert_allclose(scale, 2 * old)
    whole = module.b.weight.detach().numpy() / scale.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(whole, np.rint(whole), atol=1e-3)
    assert np.abs(np.rint(whole)).max() <= 63
    np.testing.assert_allclose(
        module.b.weight.detach(), Three().b.weight.detach(), atol=scale.max() * (1 + 2 * len(how))
    )
    x = {"x": task.calibration.values}
    ours, exact = (run_graph(capture(one, task), x)["output"] for one in (module, Three().eval()))
    assert np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()
    again, other, _ = rounded(tmp_path, **how)
    assert {entry["weight"]["bits"] for entry in other.plan.nodes.values() if "weight" in entry} == {8}
    assert not any("7-bit" in note for note in other.notes)
    assert torch.equal(again.b.weight, plain.b.weight)


def test_other_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="target is 'avx2' or left out, not 'sse'"):
        Quantize(target="sse")
    with pytest.raises(ValueError, match="needs activations in fixed ranges: activations = 'static'"):
        Quantize(target="avx2", activations="dynamic")
