"""The pass quantize: ranges, grids, equalization, bias correction, and the plan it leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.compress._equalize import equalize, pairs  # noqa: E402
from edgepack.compress._gains import merge_gains  # noqa: E402
from edgepack.compress._graph import GraphView  # noqa: E402
from edgepack.compress._grid import TOP, round_to, weight_scale  # noqa: E402
from edgepack.compress._ranges import METHODS, Histogram, entropy, minmax, mse, percentile, squared_error  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.data import Batch  # noqa: E402
from edgepack.errors import EdgepackError, InputError, Unsupported  # noqa: E402
from edgepack.front import with_front  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


def network() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LeakyReLU(0.1),
        nn.Conv2d(8, 12, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    module[1].running_mean.normal_()
    module[1].running_var.uniform_(0.3, 3.0)
    with torch.no_grad():  # channels of very different size
        module[0].weight *= torch.logspace(-1, 1, 8).view(-1, 1, 1, 1)
    return module.eval()


def task(samples: int = 24) -> Task:
    values = np.random.default_rng(0).standard_normal((samples, 3, 8, 8)).astype(np.float32)
    return Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(values))  # type: ignore[arg-type]


def apply(module: nn.Module, tmp_path: Path, job: Task | None = None, **options: object) -> tuple[nn.Module, PassRun]:
    job = job or task()
    run = PassRun(tmp_path, 0, Plan(), Silent(), module, job)
    item = Quantize(**options)  # type: ignore[arg-type]
    copied = copy.deepcopy(module)
    item.check(copied, job)
    return item.apply(copied, job, run), run


def histogram(values: np.ndarray) -> Histogram:
    counts, _ = np.histogram(values, 2048)
    return Histogram(float(values.min()), float(values.max()), counts.astype(float))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["normal", "laplace", "lognormal", "uniform"]),
    shift=st.floats(-3, 3),
    slope=st.sampled_from([1.0, 0.1, 0.0]),
)
def test_mse_is_never_worse_than_minmax_on_its_own_metric(seed: int, kind: str, shift: float, slope: float) -> None:
    values = getattr(np.random.default_rng(seed), kind)(size=3000) + shift
    seen = histogram(values)
    assert squared_error(seen, *mse(seen, slope), slope) <= squared_error(seen, *minmax(seen), slope) * (1 + 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [np.linspace(1, 2, 500), -np.linspace(1, 2, 500), np.zeros(500)])
def test_ranges_hold_zero_and_stay_inside_what_was_seen(method: str, values: np.ndarray) -> None:
    low, high = METHODS[method](histogram(values))
    assert min(values.min(), 0) - 1e-9 <= low <= 0 <= high <= max(values.max(), 0) + 1e-9


def test_percentile_drops_one_value_in_ten_thousand_and_entropy_an_outlier() -> None:
    values = np.random.default_rng(0).standard_normal(100_000)
    low, high = percentile(histogram(values))
    assert low == pytest.approx(np.quantile(values, 1e-4), abs=0.05)
    assert high == pytest.approx(np.quantile(values, 1 - 1e-4), abs=0.05)
    assert entropy(histogram(np.append(values, 40.0)))[1] < 20


def test_mse_finds_the_clip_of_a_normal_distribution() -> None:
    """8 bits, one sided range scanned: about 3.9 to 4.3 sigma (Banner et al., arXiv:1810.05723, table 1: 3.92)."""
    low, high = mse(histogram(np.random.default_rng(0).standard_normal(2_000_000)))
    assert 3.6 < high < 4.5
    assert -4.5 < low < -3.6


@pytest.mark.parametrize("seed", range(5))
def test_weights_lie_on_their_grid_and_rows_round_at_least_as_well_as_with_the_widest_value(seed: int) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) ** 3
    weight[2] = 0
    scale = weight_scale(weight)
    rounded = round_to(weight, scale)
    whole = rounded / scale.view(-1, 1, 1, 1)
    assert bool((whole - whole.round()).abs().max() < 1e-4)
    assert whole.round().abs().max() <= TOP
    widest = (weight.abs().amax((1, 2, 3)) / TOP).clamp_min(1e-20)
    error = (rounded - weight).square().sum((1, 2, 3))
    assert bool((error <= (round_to(weight, widest) - weight).square().sum((1, 2, 3)) * (1 + 1e-5)).all())


CHAINS = {
    "relu": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)),
    "leaky, depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(),
        nn.Conv2d(6, 4, 1)),
    "pool, flatten, linear": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_equalization_is_exact_in_float(name: str) -> None:
    torch.manual_seed(1)
    module = CHAINS[name]().eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        before = module(x)
        view = GraphView.of(module, task())
        found = pairs(view)
        assert found
        for pair in found:
            channels = pair.first.layer.weight.shape[0]
            size = torch.rand(channels) * torch.logspace(-2, 2, channels)
            assert equalize(pair, -pair.slope * size, size) > 2
        torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.Conv2d(4, 4, 3)),
    ],
)
def test_what_is_not_homogeneous_is_not_equalized(module: nn.Module) -> None:
    assert pairs(GraphView.of(module.eval(), task())) == []


def test_a_depthwise_layer_gets_channels_of_one_size() -> None:
    module = CHAINS["leaky, depthwise"]().eval()
    pair = pairs(GraphView.of(module, task()))[0]
    size = torch.logspace(-2, 2, 6)
    before = pair.first.layer.weight.detach().clone()
    equalize(pair, -size * pair.slope, size)
    after = size * (pair.first.layer.weight / before)[:, 0, 0, 0].detach()
    torch.testing.assert_close(after, after.mean().expand(6))


@pytest.mark.parametrize("calibrate", METHODS)
def test_the_network_stays_close_and_the_plan_names_its_operators(tmp_path: Path, calibrate: str) -> None:
    module = network()
    smaller, run = apply(module, tmp_path, calibrate=calibrate)
    graph, plan = capture(smaller, task()), run.plan
    nodes = {node.name: node for node in graph.program.module(check_guards=False).graph.nodes}
    assert set(plan.nodes) - {"input:x"} <= set(nodes)
    assert not any("norm" in name for name in nodes)
    weighted = [name for name, entry in plan.nodes.items() if "weight" in entry]
    assert weighted == ["conv2d", "conv2d_1", "conv2d_2", "linear"]
    for name in weighted:
        scale = plan.tensors[f"{name}/weight_scale"]
        weight = smaller.get_submodule({"conv2d": "0", "conv2d_1": "3", "conv2d_2": "5", "linear": "10"}[name]).weight
        whole = weight.detach().numpy() / scale.reshape(-1, *[1] * (weight.dim() - 1))
        assert scale.dtype == np.float32
        assert np.abs(whole - np.rint(whole)).max() < 1e-3
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), module(x), rtol=0.1, atol=0.1)
    assert Plan.load(_saved(plan, tmp_path)).nodes == plan.nodes


def _saved(plan: Plan, folder: Path) -> Path:
    plan.save(folder)
    return folder


def test_bias_correction_takes_the_mean_error_out(tmp_path: Path) -> None:
    """Weights rounded so coarsely that the mean moves; corrected, the mean of every channel is back."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    job = task(48)
    assert isinstance(job.calibration, Samples)
    x = torch.from_numpy(job.calibration.values) + 1.0
    job.calibration.values = x.numpy()
    errors = []
    for correct in (False, True):
        smaller, _ = apply(module, tmp_path, job, bias_correct=correct, equalize=False)
        with torch.no_grad():
            errors.append(float((smaller(x) - module(x)).mean((0, 2, 3)).abs().max()))
    assert errors[1] < 0.6 * errors[0] + 1e-3


def test_biases_are_corrected_for_what_engines_round(tmp_path: Path) -> None:
    """Engines round once, behind a layer and its ReLU6. Most values before it fall outside of its range: rounding
    them there as well, in their own wide range, would move the mean, and be corrected for nothing."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1)).eval()
    with torch.no_grad():
        module[0].weight *= 1000
        for layer in (module[0], module[2]):
            layer.weight.copy_(round_to(layer.weight, layer.weight.abs().amax((1, 2, 3)) / TOP))
    smaller, _ = apply(module, tmp_path, equalize=False, rounding="nearest", calibrate="minmax")
    assert float((smaller[2].bias - module[2].bias).detach().abs().max()) < 0.5 * 6 / 255


def test_named_layers_stay_float(tmp_path: Path) -> None:
    smaller, run = apply(network(), tmp_path, leave=("5",))
    assert run.plan.nodes["conv2d_2"]["float"] == "'leave' names it"
    assert "weight" not in run.plan.nodes["conv2d_2"]
    assert run.notes[-1] == "8-bit weights in 3 layers, 1 left in float"
    del smaller


def test_calibration_is_streamed(tmp_path: Path) -> None:
    """No more samples at once than fit the limit, whatever their number."""
    asked = []

    class Counting(Samples):
        def batches(self, size: int) -> Iterator[Batch]:
            asked.append(size)
            return super().batches(size)

    job = Task((Input("x", (1, 3, 8, 8)),), calibration=Counting(np.zeros((300, 3, 8, 8), np.float32) + 1))  # type: ignore[arg-type]
    apply(network(), tmp_path, job)
    assert max(asked) <= 256


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 4}, "bits is 8, not 4"),
        ({"activations": "sometimes"}, "activations is one of static, dynamic, auto, not 'sometimes'"),
        ({"calibrate": "max"}, "calibrate is one of minmax, percentile, mse, entropy, not 'max'"),
        ({"leave": "conv1"}, "leave is a list of layer names or patterns, not 'conv1'"),
    ],
)
def test_options_are_checked(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Quantize(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "job", "options", "kind", "sentence"),
    [
        (network(), Task((Input("x", (1, 3, 8, 8)),)), {}, InputError, "no calibration data"),
        (network(), task(), {"leave": ("nothing",)}, InputError, "no layer is called 'nothing'"),
        (nn.ReLU(), task(), {}, Unsupported, "no convolution or linear layer"),
        (nn.Sequential(nn.Conv2d(3, 1, 1)), Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(
            np.full((4, 3, 8, 8), np.nan, np.float32))), {}, InputError, "not finite"),
    ],
)  # fmt: skip
def test_what_cannot_work_says_so(
    module: nn.Module, job: Task, options: dict[str, object], kind: type[EdgepackError], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=sentence):
        apply(module, tmp_path, job, **options)


def test_fronts_shift_names_and_alignment_finds_them(tmp_path: Path) -> None:
    from edgepack.export._alignment import aligned

    class Odd(nn.Module):
        """Has operators of the kinds that a front adds before them."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = (self.first(x) - 0.5) / 2.0
            return self.second(y).permute(0, 2, 3, 1) / 3.0

    job = task()
    job = Task((Input("x", (1, 3, 8, 8), mean=(0.5,), std=(0.2,), scale=255.0),), calibration=job.calibration)
    smaller, run = apply(Odd().eval(), tmp_path, job)
    graph = capture(smaller, job)
    plain = {node.name: name for node, name in aligned(graph.program.module(check_guards=False), run.plan).items()}
    assert all(name in (node, f"input:{node}") for node, name in plain.items())
    for layout, normalize in (("NHWC", False), (None, True)):
        fronted = with_front(graph, layout, normalize).program.module(check_guards=False)
        found = {name: node for node, name in aligned(fronted, run.plan).items()}
        assert set(found) == set(plain.values())
        assert found["div_1"] is list(fronted.graph.nodes)[-2]
        assert found["conv2d"].args[0] is found["input:x"]
        assert found["input:x"].op == "call_function"
    assert run_graph(graph, {"x": np.zeros((2, 3, 8, 8), np.float32)})


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, (3, 1), 2, (1, 0), groups=2),
     nn.Linear(6, 9)],
)  # fmt: skip
def test_gptq_errs_less_than_the_nearest_rounding_on_correlated_inputs(layer: nn.Module) -> None:
    from edgepack.compress._gptq import round_in_turn, second_moments

    torch.manual_seed(0)
    mixed = torch.relu(torch.randn(4, 2, 12, 12)).repeat(1, 3, 1, 1) + 0.2 * torch.randn(4, 6, 12, 12)
    x = torch.nn.functional.avg_pool2d(mixed, 3, 1, 1)
    x = x.permute(0, 2, 3, 1).contiguous() if isinstance(layer, nn.Linear) else x
    job = Task((Input("x", (1, *x.shape[1:])),))
    call = GraphView.of(layer.eval(), job).calls[0]
    weight, scale = layer.weight.detach().clone(), weight_scale(layer.weight) * 8
    moments = second_moments(call.node, [x], weight)
    assert moments is not None
    errors = []
    with torch.no_grad():
        exact = layer(x)
        for rounded in (round_to(weight, scale), round_in_turn(weight, scale, moments)):
            whole = rounded / scale.view(-1, *[1] * (weight.dim() - 1))
            assert float((whole - whole.round()).abs().max()) < 1e-3
            layer.weight.copy_(rounded)
            errors.append(float((layer(x) - exact).square().mean()))
    assert errors[1] < errors[0]


def test_gptq_without_correlation_is_the_nearest_rounding() -> None:
    from edgepack.compress._gptq import round_in_turn

    weight = torch.randn(5, 12)
    scale = weight_scale(weight)
    torch.testing.assert_close(
        round_in_turn(weight, scale, torch.eye(12, dtype=torch.float64)[None]), round_to(weight, scale)
    )


class Scaled(nn.Module):
    """Two residual branches behind learned gains, one of a convolution, one of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.tensor([0.5, -2.0, 0.25]))
        self.other = nn.Parameter(torch.tensor([3.0, 0.1, -1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.conv(x) * self.gain.reshape(1, -1, 1, 1)
        y = x.permute(0, 2, 3, 1)
        return y + self.other * self.fc(y)


def test_gains_go_into_layers_and_leave_the_network_the_same() -> None:
    torch.manual_seed(0)
    module, x = Scaled().eval(), torch.randn(2, 3, 4, 4)
    before = module(x)
    assert merge_gains(GraphView.of(module, Task((Input("x", (1, 3, 4, 4)),)))) == 2
    assert module.gain.tolist() == module.other.tolist() == [1.0] * 3
    torch.testing.assert_close(module(x), before)
