"""Random small networks: what the C files compute is what PyTorch computes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
needs_compiler()

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from _c_files import answers, drawn, write  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.parity import max_relative  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
TOGETHER = 10  # networks in one example: they are captured and compiled at once
LIMIT = 1e-4


class Grown(nn.Module):
    """A network of random layers; each reads one or two values that are there."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random, self.layers = np.random.default_rng(seed), nn.ModuleList()
        self.calls: list[Callable[[list[Tensor]], Tensor]] = []
        torch.manual_seed(seed)
        x = torch.zeros(1, 3, 11, 9)
        values = [x]
        for _ in range(int(self.random.integers(2, 8))):
            call = self._call(values)
            with torch.no_grad():
                values.append(call(values))
            self.calls.append(call)

    def _call(self, values: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
        place = int(self.random.integers(0, len(values)))
        _, channels, height, width = values[place].shape
        kind = self.random.choice(["conv", "depthwise", "pool", "function", "sum", "join", "move", "resize"])
        if kind in ("conv", "depthwise"):
            return self._convolution(place, channels, height, width, depthwise=kind == "depthwise")
        if kind == "pool" and min(height, width) > 3:
            pool, pad = self.random.choice([F.max_pool2d, F.avg_pool2d]), int(self.random.integers(0, 2))
            stride = int(self.random.integers(1, 4))
            return lambda v: pool(v[place], 3, stride, pad)
        if kind == "sum":
            fits = [index for index, value in enumerate(values) if value.shape == values[place].shape]
            other = int(self.random.choice(fits))
            return lambda v: v[place] + v[other]
        if kind == "join":
            fits = [index for index, value in enumerate(values) if value.shape[2:] == values[place].shape[2:]]
            other = int(self.random.choice(fits))
            return lambda v: torch.cat([v[place], v[other]], 1)
        if kind == "move":
            cut = int(self.random.integers(1, channels + 1))
            moves = (lambda v: v[:, :cut], lambda v: v.transpose(2, 3), lambda v: F.pad(v, (1, 0, 2, 1)))
            move = moves[int(self.random.integers(0, 3))]
            return lambda v: move(v[place])
        if kind == "resize" and max(height, width) < 20:
            mode = str(self.random.choice(["nearest", "bilinear"]))
            return lambda v: F.interpolate(v[place], scale_factor=2, mode=mode)
        function = self.random.choice([F.relu, F.relu6, torch.sigmoid, F.hardswish, F.leaky_relu, F.gelu, torch.tanh])
        return lambda v: function(v[place])

    def _convolution(
        self, place: int, channels: int, height: int, width: int, depthwise: bool
    ) -> Callable[[list[Tensor]], Tensor]:
        rows, columns = (int(self.random.integers(1, min(size, 4) + 1)) for size in (height, width))
        groups = channels if depthwise else int(self.random.choice([1, 1, channels]))
        outputs = groups if depthwise else groups * int(self.random.integers(1, 20))
        stride, padding = int(self.random.integers(1, 3)), int(self.random.integers(0, 2))
        index = len(self.layers)
        self.layers.append(nn.Conv2d(channels, outputs, (rows, columns), stride, padding, groups=groups))
        act = self.random.choice([lambda x: x, F.relu, F.relu6])
        return lambda v: act(self.layers[index](v[place]))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for call in self.calls:
            values.append(call(values))
        return values[-1]


class Side(nn.Module):
    def __init__(self, seeds: list[int]) -> None:
        super().__init__()
        self.all = nn.ModuleList(Grown(seed) for seed in seeds)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(x) for network in self.all)


def hold(seeds: list[int]) -> None:
    """The files of these networks give what PyTorch gives, with vectors and without."""
    with tempfile.TemporaryDirectory() as place:
        names = tuple(f"y{seed}" for seed in seeds)
        graph = capture(Side(seeds).eval(), Task((Input("x", (1, 3, 11, 9), dynamic=()),), output_names=names))
        artifact, simulation = write(graph, Path(place) / "c")
        inputs = drawn(simulation, seeds[0])
        wanted = run_graph(simulation, inputs)
        for level in (0, 2):
            found = answers(artifact, inputs, level)
            for name in wanted:
                assert max_relative(found[name], wanted[name]) <= LIMIT, f"{name} at level {level}"


SEEDS = st.lists(st.integers(0, 2**31), min_size=TOGETHER, max_size=TOGETHER, unique=True)
ROOMY = {"deadline": None, "derandomize": True, "database": None,
         "suppress_health_check": list(HealthCheck)}  # fmt: skip


@settings(max_examples=3, **ROOMY)  # type: ignore[arg-type]
@given(SEEDS)
def test_random_networks_equal_pytorch(seeds: list[int]) -> None:
    hold(seeds)


@pytest.mark.slow
@settings(max_examples=50, **ROOMY)  # type: ignore[arg-type]
@given(SEEDS)
def test_five_hundred_random_networks_equal_pytorch(seeds: list[int]) -> None:
    hold(seeds)
