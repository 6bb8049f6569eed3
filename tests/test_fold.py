"""Batch norm folding is exact where it is done: any layer, order, padding and precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from _folding import check, fold, norms, scramble, task  # noqa: E402
from _networks import resnet20  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
SHARED = Path(__file__).parents[2] / "shared" / "data"
FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=150)


@st.composite
def layers(draw: Any) -> tuple[nn.Module, int, int, int, bool]:
    """A convolution, transposed convolution or linear layer, its channels in and out, its dimensions, its taps."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    dims = draw(st.integers(0, 3))
    bias = draw(st.booleans())
    if dims == 0:
        return nn.Linear(6, 5, bias=bias), 6, 5, 0, True
    groups = draw(st.sampled_from([1, 2, 6]))
    channels_out = draw(st.sampled_from([6, 12]))
    kernel, stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, 2))
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    if draw(st.booleans()):
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        layer = TRANSPOSED[dims - 1](6, channels_out, kernel, padding=padding, output_padding=extra, **options)
        return layer, 6, channels_out, dims, stride == 1 and padding - extra >= dilation * (kernel - 1)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    layer = CONV[dims - 1](6, channels_out, kernel, padding=padding, padding_mode=mode, **options)
    return layer, 6, channels_out, dims, padding == 0 or mode != "zeros"


def norm(dims: int, channels: int, **options: Any) -> nn.Module:
    return NORM[max(dims, 1) - 1](channels, **options)


def norm_after(drawn: Any, affine: bool, seed: int) -> None:
    layer, _, channels, dims, _ = drawn
    module = scramble(nn.Sequential(layer, norm(dims, channels, affine=affine)), seed, hard=True)
    check(module, 1, 6, *[7] * dims)


def norm_before(drawn: Any, affine: bool, seed: int) -> None:
    layer, channels, _, dims, exact = drawn
    module = scramble(nn.Sequential(norm(dims, channels, affine=affine), layer), seed, hard=True)
    notes = check(module, 1, 6, *[7] * dims, left=0 if exact else 1)
    assert exact or "left 0: its input is the network's input, 1 sees zeros beside its output" in notes.text


def norms_around(drawn: Any, affine: bool, seed: int) -> None:
    layer, inner, channels, dims, exact = drawn
    module = nn.Sequential(norm(dims, inner, affine=affine), layer, norm(dims, channels), norm(dims, channels))
    check(scramble(module.double(), seed), 1, 6, *[7] * dims, left=0 if exact else 1, limit=1e-10, dtype="float64")


@FEW
@given(layers(), st.booleans(), st.integers(0, 1000))
def test_norm_after_any_layer_goes(drawn: Any, affine: bool, seed: int) -> None:
    norm_after(drawn, affine, seed)


@FEW
@given(layers(), st.booleans(), st.integers(0, 1000))
def test_norm_before_a_layer_goes_only_where_exact(drawn: Any, affine: bool, seed: int) -> None:
    norm_before(drawn, affine, seed)


@FEW
@given(layers(), st.booleans(), st.integers(0, 1000))
def test_in_double_precision_folding_is_exact_to_1e_10(drawn: Any, affine: bool, seed: int) -> None:
    norms_around(drawn, affine, seed)


@pytest.mark.slow
@pytest.mark.parametrize("order", [norm_after, norm_before, norms_around])
def test_every_order_on_many_layers(order: Callable[[Any, bool, int], None]) -> None:
    MANY(given(layers(), st.booleans(), st.integers(0, 1000))(order))()


@pytest.mark.parametrize("transposed", [False, True])
def test_zero_padding_is_exact_where_the_norm_does_not_shift(transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = scramble(nn.Sequential(nn.BatchNorm2d(4), kind(4, 6, 3, padding=1, stride=2)))
    module[0].bias.data = module[0].running_mean * module[0].weight.data * 0
    module[0].running_mean.zero_()
    check(module, 1, 4, 8, 8)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_given_as_a_word(padding: str) -> None:
    check(scramble(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, padding=padding))), 1, 4, 8, 8)
    module = scramble(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=padding)))
    check(module, 1, 4, 8, 8, left=int(padding == "same"))


def test_norms_in_a_row_become_one_and_then_none() -> None:
    check(scramble(nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3))), 1, 4, 8, 8)
    check(scramble(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6))), 1, 4, 8, 8)
    notes = check(scramble(nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4))), 1, 4, 8, 8, left=1)
    assert "left 0: its input is the network's input, its output goes to the network's output" in notes.text


@pytest.mark.parametrize(
    ("between", "shape", "left"),
    [
        (nn.ReLU(), (1, 4, 8, 8), 1),
        (nn.MaxPool2d(2), (1, 4, 8, 8), 1),
        (nn.Dropout(), (1, 4, 8, 8), 0),
        (nn.Dropout2d(), (1, 4, 8, 8), 0),
        (nn.Identity(), (1, 4, 8, 8), 0),
        (nn.ReflectionPad2d(2), (1, 4, 8, 8), 0),
        (nn.ZeroPad2d(2), (1, 4, 8, 8), 1),
        (nn.ConstantPad2d(1, 3.0), (1, 4, 8, 8), 1),
        (nn.ZeroPad2d(-1), (1, 4, 8, 8), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_may_stand_between(between: nn.Module, shape: tuple[int, ...], left: int) -> None:
    check(scramble(nn.Sequential(nn.Conv2d(4, 6, 3), between, nn.BatchNorm2d(6))), *shape, left=left)
    check(scramble(nn.Sequential(nn.BatchNorm2d(4), between, nn.Conv2d(4, 6, 3))), *shape, left=left)


def test_sync_batch_norm_goes() -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    assert isinstance(module[1], nn.SyncBatchNorm)
    check(scramble(module), 1, 4, 8, 8)


class Tokens(nn.Module):
    """Linear layers on (batch, tokens, channels) with a norm over the channels, in three spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Any) -> Any:
        y = self.first(x)
        x = x + self.norm1(y.flatten(0, 1)).reshape_as(y)
        x = F.gelu(self.norm2(self.second(x).transpose(1, 2)).transpose(1, 2))
        return self.third(self.norm3(x.permute(0, 2, 1)).permute(0, 2, 1))


def test_norms_of_tokens_go_through_reshaping() -> None:
    check(scramble(Tokens()), 1, 5, 6)


def test_half_precision_folds() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))).half()
    folded, _ = fold(module, task(1, 4, 8, 8, dtype="float16"))
    assert norms(folded) == 0
    assert folded[0].weight.dtype == folded[0].bias.dtype == torch.float16


def test_a_norm_that_brings_its_activation_leaves_it() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.SiLU()

        def forward(self, x: Any) -> Any:
            return self.act(self.drop(super().forward(x)))

    module = scramble(nn.Sequential(nn.Conv2d(4, 6, 3), NormAct(6), nn.Conv2d(6, 4, 1)))
    check(module, 1, 4, 8, 8)
    assert isinstance(module[1].act, nn.SiLU)


def test_a_network_that_amplifies_its_own_rounding_is_not_blamed_on_folding() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Any) -> Any:
            return (self.norm(self.conv(x)) * 1000).sin()

    torch.manual_seed(0)
    folded, notes = fold(scramble(Steep()), task(1, 4, 8, 8))
    assert norms(folded) == 0
    assert notes.text.startswith("folded 1 batch norm")


def test_a_traced_graph_folds_like_any_module() -> None:
    module = torch.fx.symbolic_trace(scramble(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())))
    check(module, 1, 4, 8, 8)


def test_folding_twice_changes_nothing() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)))
    once, _ = fold(module, task(1, 4, 8, 8))
    state = {key: value.clone() for key, value in once.state_dict().items()}
    twice, _ = fold(once, task(1, 4, 8, 8))
    assert state.keys() == twice.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in twice.state_dict().items())


def test_the_note_gives_counts_and_the_largest_scale() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.0), nn.ReLU()))
    module[1].running_var.fill_(1.0)
    module[1].weight.data.fill_(-5.0)
    notes = check(module, 1, 4, 8, 8)
    assert notes.lines[0].startswith("folded 1 batch norm, left 0; outputs within ")
    assert notes.lines[0].endswith("largest scale 5 at 1")


def test_a_fixed_batch_works() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Any) -> Any:
            return self.norm(self.conv(x)).reshape(1, 6, 36)

    folded, _ = fold(scramble(Fixed()), Task(inputs=(Input("x", (1, 4, 8, 8), dynamic=()),)))
    assert norms(folded) == 0


def test_resnet20_with_its_trained_weights() -> None:
    if not SHARED.exists():
        pytest.skip("the trained weights are not there")
    from safetensors.torch import load_file

    module = resnet20()
    module.load_state_dict(load_file(SHARED / "resnet20_cifar10.safetensors"))
    notes = check(module.eval(), 1, 3, 32, 32)
    assert "folded 19 batch norms, left 0" in notes.text


ZOO = {
    "torchvision:resnet18": 0,
    "torchvision:resnet50": 0,
    "torchvision:mobilenet_v2": 0,
    "torchvision:shufflenet_v2_x1_0": 0,
    "torchvision:densenet121": 62,
    "torchvision:ssdlite320_mobilenet_v3_large": 0,
    "timm:resnet50": 0,
    "timm:efficientnet_b0": 0,
    "timm:deit_small_patch16_224": 0,
    "timm:convnext_atto": 0,
    "timm:levit_128s": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "left"), ZOO.items(), ids=list(ZOO))
def test_zoo(name: str, left: int) -> None:
    from edgepack.models import prepare_torchvision

    prepare_torchvision()
    source, _, model = name.partition(":")
    library = pytest.importorskip(source, reason=f"pip install {source}")
    torch.manual_seed(0)
    if source == "timm":
        module = library.create_model(model)
    elif "ssdlite" in model:
        from torchvision.models import detection

        module = FirstOf(getattr(detection, model)(weights=None, weights_backbone=None).backbone)
    else:
        module = getattr(library.models, model)(weights=None)
    # Wilder statistics make a deep random network amplify its own float32 rounding beyond the bound.
    notes = check(scramble(module, calm=True), 1, 3, 224, 224, left=left)
    assert not left or "its input is a concatenation" in notes.text


class FirstOf(nn.Module):
    """Last feature map of a backbone that returns several."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Any) -> Any:
        return list(self.backbone(x).values())[-1]
