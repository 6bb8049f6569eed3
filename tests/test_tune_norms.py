"""Tune mode: values and gradients of Eval, without what Eval stores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

from _networks import resnet20  # noqa: E402
from edgepack.compress._graph import GraphView  # noqa: E402
from edgepack.compress._tune_hold import Grid  # noqa: E402
from edgepack.compress._tune_norms import Pair, pairs_of, tuned  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

KINDS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


def with_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics: fresh ones hide mistakes."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.2, 3)
            if layer.affine:
                nn.init.normal_(layer.weight, 1)
                nn.init.normal_(layer.bias)
    return module.eval()


def gradients(module: nn.Module, x: Any) -> tuple[list[Any], Any]:
    """Of a sum of squares, for each parameter and the input; and the outputs."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().mean().backward()
    return [*(value.grad.clone() for value in module.parameters()), x.grad], y.detach()


def worst(these: Sequence[Any], those: Sequence[Any]) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(these, those, strict=True))


def pairs(module: nn.Module, shape: tuple[int, ...]) -> list[Pair]:
    return pairs_of(GraphView.of(module, Task((Input("x", shape),))))


@pytest.mark.parametrize(("kind", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_resnet_has_the_gradients_of_eval(kind: Any, limit: float) -> None:
    module = with_statistics(resnet20())
    found = pairs(module, (1, 3, 32, 32))
    assert len(found) == sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()) == 19
    module.to(kind)
    x = torch.randn(4, 3, 32, 32, dtype=kind)
    wanted, outputs = gradients(module, x)
    keys = list(module.state_dict())
    with tuned(found):
        given, same = gradients(module, x)
        assert list(module.state_dict()) == keys
    assert worst(given, wanted) < limit
    assert worst([same], [outputs]) < limit
    again, _ = gradients(module, x)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


@given(
    dims=st.sampled_from([1, 2, 3]),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    affine=st.booleans(),
    padding=st.integers(0, 1),
    stride=st.integers(1, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_every_kind_of_convolution(
    dims: int, transposed: bool, groups: int, bias: bool, affine: bool, padding: int, stride: int, seed: int
) -> None:
    convolution, transposing, norm = KINDS[dims]
    more = {"output_padding": stride - 1} if transposed else {"padding_mode": "reflect"}
    layer = (transposing if transposed else convolution)(4, 8, 3, stride, padding, groups=groups, bias=bias, **more)
    module = with_statistics(nn.Sequential(layer, norm(8, affine=affine), nn.ReLU()), seed).double()
    x = torch.randn(2, 4, *[6] * dims, dtype=torch.float64)
    wanted, outputs = gradients(module, x)
    with tuned([Pair("0", layer, module[1])]):
        given_, same = gradients(module, x)
    assert worst(given_, wanted) < 1e-9
    assert worst([same], [outputs]) < 1e-9


def test_linear_layers_too() -> None:
    module = with_statistics(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))).double()
    (pair,) = pairs(copy.deepcopy(module).float(), (1, 5))
    assert pair.path == "0"
    x = torch.randn(3, 5, dtype=torch.float64)
    wanted, _ = gradients(module, x)
    with tuned([Pair("0", module[0], module[1])]):
        assert worst(gradients(module, x)[0], wanted) < 1e-10


def test_weights_that_are_rounded_when_they_are_used() -> None:
    module = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    parametrize.register_parametrization(module[0], "weight", Grid(torch.tensor(0.05), 7))
    found = pairs(module, (1, 3, 8, 8))
    assert [pair.path for pair in found] == ["0"]
    x = torch.randn(2, 3, 8, 8)
    wanted, outputs = gradients(module, x)
    with tuned(found):
        given_, same = gradients(module, x)
    assert worst(given_, wanted) < 1e-4
    assert worst([same], [outputs]) < 1e-5


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(self.norm(self.conv(x))))


class Read(Twice):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return self.norm(y) + y


class Own(nn.Conv2d):
    def forward(self, input: Any) -> Any:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Twice(), (1, 3, 4, 4)),
        (Read(), (1, 3, 4, 4)),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), (1, 3, 4, 4)),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), (1, 3, 4, 4)),
        (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3)), (1, 3, 4)),
        (nn.Sequential(Own(3, 3, 1), nn.BatchNorm2d(3)), (1, 3, 4, 4)),
    ],
    ids=["shared", "read by others", "statistics of the batch", "not neighbours", "other axis", "another forward"],
)
def test_norms_that_stay_apart(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert pairs(module, shape) == []


def test_what_eval_stores_is_not_stored() -> None:
    layers = [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    module = with_statistics(nn.Sequential(*layers, *copy.deepcopy(layers)))
    x = torch.randn(8, 16, 16, 16)
    eval_bytes = stored(module, x)
    with tuned(pairs(module, (1, 16, 16, 16))):
        tune_bytes = stored(module, x)
    activations, merged_weights = 2 * 4 * x.numel(), 2 * 4 * layers[0].weight.numel()
    assert eval_bytes - tune_bytes == pytest.approx(activations - merged_weights, abs=1000)


def stored(module: nn.Module, x: Any) -> int:
    """Bytes kept for the backward pass, without parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(x)
    del result
    own = {value.untyped_storage().data_ptr() for value in module.parameters()}
    return sum(size for place, size in kept.items() if place not in own)
