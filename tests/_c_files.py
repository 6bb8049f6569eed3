"""Small networks as C files, compiled without optimization: what is computed must not depend on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgepack import parts
from edgepack.artifact import Artifact, Manifest, describe_files
from edgepack.contracts import Exporter, Graph, Runtime
from edgepack.front import with_front
from edgepack.graph import capture, run_graph
from edgepack.parity import max_relative
from edgepack.plan import Plan
from edgepack.task import Input, Task


class Network(nn.Module):
    """A function of layers and inputs."""

    def __init__(self, function: Callable, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(*self.layers, x)


def captured(module: nn.Module, *shape: int) -> Graph:
    return capture(module.eval(), Task((Input("x", shape),)))


def write(graph: Graph, folder: Path, plan: Plan | None = None, **options: object) -> tuple[Artifact, Graph]:
    """The files of a graph and its simulation, as an artifact without golden samples."""
    exporter = parts.find(Exporter, "c")(**options)  # type: ignore[type-abstract]
    simulation = exporter.lower(with_front(graph, exporter.layout, exporter.normalize), plan or Plan())
    folder.mkdir(parents=True)
    census = exporter.write(simulation, folder)
    manifest = Manifest(
        "c", "c", simulation.dialect, simulation.inputs, simulation.outputs, describe_files(folder),
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
