"""Small networks as C files, compiled without optimization: what is computed must not depend on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _samples import Samples
from edgepack import parts
from edgepack.artifact import Artifact, Manifest, describe_files
from edgepack.compress.quantize import Quantize
from edgepack.compressing import compress
from edgepack.contracts import Exporter, Graph, Runtime
from edgepack.exporting import Source
from edgepack.front import with_front
from edgepack.graph import capture, run_graph
from edgepack.parity import max_relative
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task

SHAPE = (1, 5, 9, 8)  # of networks in 8 bits


class Everything(nn.Module):
    """Strides by slicing, zero channels, depthwise, sums, a leaky ReLU, tables, a product, maxima, means."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(5, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.depthwise, self.point = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 24, 1)
        self.down, self.grouped = nn.Conv2d(24, 30, 3, 2, 1), nn.Conv2d(24, 6, (2, 3), 2, 1, groups=2)
        self.gate, self.last = nn.Conv2d(30, 30, 1), nn.Linear(60, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        y = F.relu6(self.point(F.leaky_relu(self.depthwise(x), 0.1)) + x)
        z = F.silu(self.down(y)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        z = z * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(z, 1)))
        y = torch.cat([F.max_pool2d(x, 3, 2, 1), z, self.grouped(x)[:, :, :5, :4]], 1)
        return self.last(y.mean((2, 3)))


def compressed(folder: Path, module: nn.Module, shape: tuple[int, ...] = SHAPE, **options: object) -> Source:
    """A network in 8 bits, calibrated on noise."""
    values = np.random.default_rng(0).standard_normal((24, *shape[1:])).astype(np.float32)
    layout = "NCHW" if len(shape) == 4 else None
    task = Task((Input("x", shape, layout=layout),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(module.eval(), task, [Quantize(**options)], folder, Silent())
    return Source.open(folder / "compressed")


def captured(module: nn.Module, *shape: int) -> Graph:
    return capture(module.eval(), Task((Input("x", shape),)))


def write(
    graph: Graph, folder: Path, plan: Plan | None = None, format: str = "c", **options: object
) -> tuple[Artifact, Graph]:
    """The files of a graph and its simulation, as an artifact without golden samples."""
    exporter = parts.find(Exporter, format)(**options)  # type: ignore[type-abstract]
    simulation = exporter.lower(with_front(graph, exporter.layout, exporter.normalize), plan or Plan())
    folder.mkdir(parents=True)
    census = exporter.write(simulation, folder)
    manifest = Manifest(
        format, format, simulation.dialect, simulation.inputs, simulation.outputs, describe_files(folder),
        census={"notes": list(census.notes), "operators": census.operators},
    )  # fmt: skip
    (folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder), simulation


def engine(level: int = 2, flags: tuple[str, ...] = ("-O0",)) -> Runtime:
    return parts.find(Runtime, "c")(level=level, flags=flags)  # type: ignore[type-abstract]


def drawn(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        spec.name: random.integers(0, 256, spec.shape).astype(np.uint8)
        if spec.dtype == "uint8"
        else random.standard_normal(spec.shape).astype(np.float32)
        for spec in graph.inputs
    }


def answers(artifact: Artifact, inputs: dict[str, np.ndarray], level: int = 2) -> dict[str, np.ndarray]:
    session = engine(level).load(artifact)
    found = session.run(inputs)
    session.close()
    return found


def worst(artifact: Artifact, simulation: Graph, level: int = 2) -> float:
    """Largest difference from the simulation, over the largest value of each output."""
    inputs = drawn(simulation)
    found, wanted = answers(artifact, inputs, level), run_graph(simulation, inputs)
    assert list(found) == list(wanted)
    return max(max_relative(found[name], wanted[name]) for name in wanted)
