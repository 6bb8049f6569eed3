"""What the self-test of C files computes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from edgepack.artifact import GOLDEN, Golden
from edgepack.contracts import Arrays, Graph
from edgepack.graph import run_graph
from edgepack.samples import count, take

LIMIT = 1 << 17  # values, as text in the file; at least one sample


def samples(simulation: Graph, folder: Path) -> tuple[Arrays, Arrays]:
    """Inputs and answers: golden samples where the folder has them, else numbers of a fixed seed."""
    path = folder / GOLDEN
    inputs = Golden.load(path).inputs if path.exists() else _drawn(simulation)
    one = sum(math.prod(map(int, spec.shape)) for spec in (*simulation.inputs, *simulation.outputs))
    rows = min(count(simulation.inputs, inputs), max(1, LIMIT // one))
    inputs = take(simulation.inputs, inputs, 0, rows)
    return inputs, run_graph(simulation, inputs)


def _drawn(simulation: Graph) -> Arrays:
    random = np.random.default_rng(0)
    found = {}
    for spec in simulation.inputs:
        shape = tuple(map(int, spec.shape))
        values = random.integers(0, 256, shape) if spec.dtype == "uint8" else random.standard_normal(shape)
        found[spec.name] = values.astype(spec.dtype)
    return found
