"""Small networks, their TFLite files, and how far the engine's answers lie from the simulation's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from _networks import Network, Pair
from edgepack import parts
from edgepack.artifact import Artifact, Manifest, describe_files
from edgepack.contracts import Census, Exporter, Graph, Runtime
from edgepack.front import with_front
from edgepack.graph import capture, run_graph
from edgepack.parity import max_relative
from edgepack.plan import Plan
from edgepack.task import Input, Task

Written = tuple[Artifact, Graph, Census]
IMAGE = (Input("x", (1, 8, 12, 10), layout="NCHW"),)


class Normed(nn.Module):
    """A small image classifier with everything that batch normalization and shortcuts bring."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.down = nn.Conv2d(24, 24, 3, 2, 1, groups=24)
        self.back, self.gamma = nn.Conv2d(24, 24, 1), nn.Parameter(torch.rand(24))
        self.head = nn.Linear(24, 10)
        for value in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias):
            nn.init.uniform_(value, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = functional.relu6(self.down(functional.max_pool2d(x, 3, 1, 1)))
        x = x + self.back(x) * self.gamma.reshape(1, -1, 1, 1)
        return self.head(x.mean((2, 3)))


def conv(outputs: int = 6, **options: int) -> nn.Module:
    return nn.Conv2d(8, outputs, 3, **options)


def resized(**options: object) -> Callable:
    return lambda layer, x: functional.interpolate(layer(x), **options)


def apply(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


def row(*shape: int) -> tuple[Input, ...]:
    return (Input("x", shape),)


CASES = {
    "grouped": (apply, (conv(12, groups=4, padding=1),), IMAGE),
    "transposed": (apply, (nn.ConvTranspose2d(8, 6, 3, 2, 1, 1),), IMAGE),
    "transposed_1d": (apply, (nn.ConvTranspose1d(8, 6, 3, 2, 1, 1),), row(1, 8, 20)),
    "conv_1d": (apply, (nn.Conv1d(8, 6, 3, 2, 1),), row(1, 8, 20)),
    "conv_3d": (apply, (nn.Conv3d(4, 6, 3, 2, 1),), row(1, 4, 6, 8, 8)),
    "bilinear": (resized(scale_factor=1.3, mode="bilinear"), (conv(),), IMAGE),
    "bicubic": (resized(scale_factor=2, mode="bicubic"), (conv(),), IMAGE),
    "nearest": (resized(size=(17, 23), mode="nearest"), (conv(),), IMAGE),
    "antialias": (resized(size=(5, 5), mode="bilinear", antialias=True), (conv(),), IMAGE),
    "shuffle": (lambda c, x: functional.pixel_shuffle(c(x), 2), (conv(12),), IMAGE),
    "unshuffle": (lambda c, x: c(functional.pixel_unshuffle(x, 2)), (nn.Conv2d(32, 6, 3),), IMAGE),
    "repeated": (lambda c, x: c(x.repeat(1, 2, 1, 1) + x.tile(2, 1, 1)), (nn.Conv2d(16, 6, 3),), IMAGE),
    "gelu": (lambda a, n, x: functional.gelu(n(a(x))), (nn.Linear(16, 16), nn.LayerNorm(16)), row(1, 5, 16)),
    "attention": (lambda a, x: a(x, x, x)[0], (nn.MultiheadAttention(16, 4, batch_first=True),), row(1, 7, 16)),
    "lstm": (lambda a, b, x: b(a(x)[0][:, -1]), (nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)), row(1, 4, 8)),
    "sorted": (
        lambda a, x: torch.cat([torch.topk(a(x), 3)[0], *torch.sort(a(x), dim=1), a(x).argsort(descending=True)], 1),
        (nn.Linear(8, 8),),
        row(1, 8),
    ),
}  # fmt: skip


@functools.cache
def graph_of(name: str) -> Graph:
    torch.manual_seed(0)
    if name == "normed":
        image = Input("image", (1, 3, 16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), scale=255.0)
        return capture(Normed().eval(), Task(inputs=(image,), labels=("cat", "köter")))
    if name == "pair":
        inputs = (Input("ids", (1, 7), dtype="int64"), Input("x", (1, 8)))
        return capture(Pair().eval(), Task(inputs=inputs, output_names=("scores", "best")))
    function, layers, inputs = CASES[name]
    return capture(Network(function, *layers).eval(), Task(inputs=inputs))


def write(graph: Graph, folder: Path, **options: object) -> tuple[Artifact, Graph, Census]:
    exporter = parts.find(Exporter, "tflite")(**options)  # type: ignore[type-abstract]
    if exporter.layout or exporter.normalize:
        graph = with_front(graph, exporter.layout, exporter.normalize)
    simulation = exporter.lower(graph, Plan())
    folder.mkdir()
    census = exporter.write(simulation, folder)
    manifest = Manifest("tflite", "a", "float", simulation.inputs, simulation.outputs, describe_files(folder))
    (folder / "artifact.json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder), simulation, census


def engine(**options: object) -> Runtime:
    return parts.find(Runtime, "tflite")(**options)  # type: ignore[type-abstract]


def arrays_for(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tops = {"uint8": 255, "int64": 49}
    return {
        spec.name: (
            random.integers(0, tops[spec.dtype], spec.shape)
            if spec.dtype in tops
            else random.standard_normal(spec.shape)
        ).astype(spec.dtype)
        for spec in graph.inputs
    }


def worst(artifact: Artifact, simulation: Graph, **options: object) -> float:
    session = engine(**options).load(artifact, threads=1)
    arrays = arrays_for(simulation)
    found, wanted = session.run(arrays), run_graph(simulation, arrays)
    session.close()
    assert list(found) == [spec.name for spec in simulation.outputs]
    assert [value.dtype for value in found.values()] == [value.dtype for value in wanted.values()]
    return max(max_relative(found[name], wanted[name]) for name in wanted)


def maker(root: Path) -> Callable[..., Written]:
    """Artifacts of the small networks under ``root``, each written once."""
    found: dict[Path, Written] = {}

    def make(name: str, precision: str = "float32", layout: str | None = None, normalize: bool = False) -> Written:
        folder = root / f"{name}-{precision}-{layout}-{normalize}"
        if folder not in found:
            found[folder] = write(graph_of(name), folder, precision=precision, layout=layout, normalize=normalize)
        return found[folder]

    return make
