"""Cut networks as files of several engines, with golden answers, and whether a file may be timed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from edgepack import parts
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, Manifest, Parity, describe_files
from edgepack.compress.reorganize import Reorganize
from edgepack.compressing import PassRun
from edgepack.contracts import INTEGERS, Exporter, Graph, Pass, Runtime
from edgepack.graph import nudged, run_graph
from edgepack.parity import check, least_db
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Task

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {"onnx": "onnxruntime", "openvino": "openvino", "tflite": "tflite"}


def cut(module: nn.Module, task: Task, rate: float, blocks: Sequence[int] = ()) -> nn.Module:
    """A copy of the network at a keep rate; at 1 just a copy."""
    copied = copy.deepcopy(module)
    return copied if rate == 1 else applied(Reorganize(keep_rate=rate, blocks=tuple(blocks)), copied, task)[0]


def applied(item: Pass, module: nn.Module, task: Task) -> tuple[nn.Module, Plan]:
    run = PassRun(ROOT / "build" / "work", 0, Plan(), Silent(), module, task)
    return item.apply(module, task, run).eval(), run.plan


def write(engine: str, graph: Graph, plan: Plan, task: Task, folder: Path) -> Artifact:
    """One artifact, with golden answers that are compared before it is timed."""
    exporter = parts.find(Exporter, engine)()
    simulation = exporter.lower(graph, plan)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    census = exporter.write(simulation, folder)
    inputs = task.samples(1)
    inputs = {name: values.astype(np.float32) for name, values in inputs.items()}
    answers = run_graph(simulation, inputs)
    Golden(inputs, answers, answers).save(folder / GOLDEN)
    parity = Parity("not run")
    if simulation.dialect.startswith(INTEGERS):
        parity = replace(parity, least_db=least_db(answers, run_graph(nudged(simulation), inputs)))
    manifest = Manifest(
        engine, folder.name, simulation.dialect, simulation.inputs, simulation.outputs, describe_files(folder),
        parity=parity, census={"operators": dict(census.operators), "notes": list(census.notes)},
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder)


def accepted(folder: Path, runtime: Runtime) -> Artifact:
    """An artifact that gives its golden answers; of an integer one it is noted how far off it is."""
    artifact = Artifact.open(folder)
    if artifact.manifest.parity.status != "checked":
        manifest = replace(artifact.manifest, parity=check(artifact, runtime))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder)
