"""Factored networks: faster by how much, and what training regains. Writes results/factorize.json, docs/factorize.md.

    python benchmarks/factorize.py write            # networks that are one layer each, in every form, for each engine
    python benchmarks/factorize.py times            # time them: nothing else should run; goes on where it stopped
    python benchmarks/factorize.py choose           # the pass, not trained
    python benchmarks/factorize.py export           # whole networks for the race; goes on where it stopped
    python benchmarks/factorize.py race             # time those: nothing else should run
    python benchmarks/factorize.py train            # the pass with its training (ResNet-32), scored on 10,000 images
    python benchmarks/factorize.py int8             # both networks in 8 bits, for race_int8
    python benchmarks/factorize.py race_int8
    python benchmarks/factorize.py document         # only write the page from the stored results

ResNet-32 for CIFAR-10 has trained weights; ResNet-50's are random, so only its latency means something.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import _factorize_page as page
import networks as zoo
import torch
from _cases import RANDOM
from torch import nn

from edgepack import metrics, models, parts
from edgepack.artifact import MANIFEST, Artifact
from edgepack.compress._decompose import factored
from edgepack.compress._graph import GraphView, put_layer
from edgepack.compress._response import moments
from edgepack.compress._spots import forms, survey
from edgepack.compress._stages import DENSE, Form
from edgepack.compress._stopwatch import Stopwatch
from edgepack.compress._tune import Tune, tune
from edgepack.compress.factorize import Factorize
from edgepack.compress.quantize import Quantize
from edgepack.compressing import COMPRESSED, PassRun, compress
from edgepack.contracts import Exporter, Settings
from edgepack.data import open_data
from edgepack.devices.host import Host
from edgepack.exporting import export
from edgepack.measurement import Ratio
from edgepack.plan import Plan
from edgepack.profiling import applied, profile, write_module
from edgepack.progress import Silent
from edgepack.task import Input, Task
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("onnx", "openvino")
PACKAGES = ("torch", "onnxruntime", "openvino")
CALIBRATION, TRAINING, CALIBRATION_INT8 = 512, 20000, 64
ROLES = ("before", "after", "by energy")
NAN = Ratio(float("nan"), float("nan"), float("nan"), "", "not run", float("nan"))


@dataclass(frozen=True)
class Case:
    """A network, its task and how it is factored."""

    name: str
    load: Callable[[Path], tuple[nn.Module, Task]]
    options: Factorize


def resnet32(data: Path, calibration: int = CALIBRATION) -> tuple[nn.Module, Task]:
    network = next(item for item in zoo.networks() if item.name == "resnet32 (CIFAR-10)")
    given = {name: open_data(table, network.inputs, data) for name, table in {
        "training": {"data": "cifar10_train20k.npz", "samples": TRAINING}, "evaluation": {"data": "cifar10_test.npz"},
        "calibration": {"data": "cifar10_train20k.npz", "samples": calibration}}.items()}  # fmt: skip
    task = Task(network.inputs, **given, metric=metrics.find("top1", ROOT), augment="crop-flip")
    return zoo.load(network, data).eval(), task


def resnet50(data: Path) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    models.prepare_torchvision()
    item = Input("input", (1, 3, 224, 224), **zoo.IMAGENET)
    return zoo.with_statistics(models.load(RANDOM["resnet50"], Path())).eval(), Task((item,))


def in_8_bits(target: str) -> Case:
    """Half ranks wherever they are faster in 8 bits."""
    options = Factorize(method="tucker", rank=0.5, targets=(target,), precision="int8")
    return Case(f"ResNet-32, CIFAR-10, in 8 bits for {page.NAMES[target]}", partial(resnet32, calibration=64), options)


CASES = {
    "resnet32": Case(
        "ResNet-32, CIFAR-10", resnet32,
        Factorize(method="auto", latency_ratio={"onnx": 0.7, "openvino": 0.74}, targets=TARGETS),
    ),
    "resnet50": Case(
        "ResNet-50, random weights", resnet50,
        Factorize(method="tucker", macs_ratio=0.5, latency_ratio=0.67, targets=TARGETS),
    ),
    **{f"resnet32-int8-{target}": in_8_bits(target) for target in TARGETS},
}  # fmt: skip
TUNE = Tune(epochs=14, lr=0.05, batch=64, held_out=300, precision="bfloat16", norms="train")


@dataclass
class Deferred:
    """A run that measures whole networks later: it writes them, by what they are compared as."""

    inner: PassRun
    race: Path | None
    roles: dict[str, list[nn.Module]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def measure(
        self, module: nn.Module, against: nn.Module | None = None, format: str = "onnx", then: object = ()
    ) -> Ratio:
        known = self.roles.setdefault(format, [])
        for item in (against, module):
            if item is not None and self.race is not None and not any(item is one for one in known):
                known.append(item)
                self.race.mkdir(parents=True, exist_ok=True)
                torch.save(item, self.race / f"{ROLES[len(known) - 1]}.pt")
        return NAN


def job(case: str, module: nn.Module, task: Task, work: Path, name: str | None) -> Deferred:
    run = PassRun(work / case, 0, Plan(), Silent(), copy.deepcopy(module), task)
    run.workdir.mkdir(parents=True, exist_ok=True)
    return Deferred(run, None if name is None else work / case / name)


def write(name: str, options: argparse.Namespace) -> None:
    """Each kind of layer in every form, for each target: what the pass would time."""
    case = CASES[name]
    module, task = case.load(options.data)
    spots, _ = survey(GraphView.of(module, task), case.options.leave)
    watch = Stopwatch(job(name, module, task, options.work, "race"), case.options.then)  # type: ignore[arg-type]
    wanted: dict[str, Any] = {}
    for spot in spots:
        own = forms(spot, case.options)
        for target in case.options.targets if own else ():
            for size in spot.sizes:
                keys, networks, small = watch.wanted(target, spot.dense, size, own)
                wanted.setdefault(json.dumps([target, keys]), (target, keys, networks, small))
    for number, (target, keys, networks, small) in enumerate(wanted.values()):
        folder = options.work / name / "layers" / f"{number:03}"
        if not (folder / "keys.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            for index, network in enumerate(networks):
                made, plan = applied(network, small, case.options.then, options.work / "quantized")
                write_module(made, small, folder / f"{index:03}", target, plan)
            (folder / "keys.json").write_text(json.dumps(keys))
        sys.stdout.write(f"{name}: {number + 1} of {len(wanted)} kinds of layers\n")
        sys.stdout.flush()
    for target in case.options.targets:
        folder = options.work / name / "layers" / f"whole-{target}"
        if not (folder / "keys.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            made, plan = applied(module, task, case.options.then, options.work / "quantized")
            write_module(made, task, folder / "000", target, plan)
            (folder / "keys.json").write_text(json.dumps([watch.key(target)]))


def times(name: str, options: argparse.Namespace) -> None:
    """Fill the stopwatch's file, until the seconds are over."""
    began = time.perf_counter()
    folders = sorted(path.parent for path in (options.work / name / "layers").glob("*/keys.json"))
    run = PassRun(options.work / name, 0, Plan(), Silent(), nn.Identity(), Task((Input("x", (1, 1)),)))
    watch = Stopwatch(run)
    for number, folder in enumerate(folders):
        keys = json.loads((folder / "keys.json").read_text())
        if all(key in watch.seen for key in keys):
            continue
        if time.perf_counter() - began > options.seconds:
            sys.stdout.write(f"{name}: {number} of {len(folders)} timed; run it again\n")
            return
        artifacts = [Artifact.open(folder / f"{index:03}") for index in range(len(keys))]
        settings = Settings(max_seconds=max(2.0, options.each * len(keys)), cold=False, instances=3, half_width=0.02)
        found = profile(artifacts, Host(), None, settings, Silent())
        watch.remember(zip(keys, [float(item.conditions["floor_ms"]) for item in found], strict=True))
    sys.stdout.write(f"{name}: all {len(folders)} timed\n")


def choose(name: str, options: argparse.Namespace) -> None:
    """The pass without training: ranks, predictions, and the files of the race."""
    module, task = CASES[name].load(options.data)
    run = job(name, module, task, options.work, "race")
    CASES[name].options.apply(module, task, run)  # type: ignore[arg-type]
    for note in run.notes:
        sys.stdout.write(f"{note}\n")
    page.RESULTS.store("choice", {"network": name, "title": CASES[name].name, **run.findings["factors"]}, facts())


def export_race(name: str, options: argparse.Namespace) -> None:
    """Those networks for each target; goes on where it was stopped."""
    _, task = CASES[name].load(options.data)
    for role in ROLES:
        stored = options.work / name / "race" / f"{role}.pt"
        for target in CASES[name].options.targets:
            folder = options.work / name / "race" / target / role
            if not (folder / MANIFEST).exists() or (folder / MANIFEST).stat().st_mtime < stored.stat().st_mtime:
                shutil.rmtree(folder, ignore_errors=True)
                network = torch.load(stored, weights_only=False)
                made, plan = applied(network, task, CASES[name].options.then, options.work / "quantized")
                write_module(made, task, folder, target, plan)


def race(name: str, options: argparse.Namespace) -> None:
    """Before, after, and ranks by energy with as many MACs, interleaved."""
    for target in (one for one in CASES[name].options.targets if one in options.targets):
        folder = options.work / name / "race" / target
        artifacts = [Artifact.open(folder / role) for role in ("before", "by energy", "after")]
        settings = Settings(max_seconds=options.seconds, cold=False)
        found = profile(artifacts, Host(), None, settings, Silent())
        beside = profile(artifacts[1:], Host(), None, settings, Silent())[1]
        row = {
            "network": name, "target": target, "state": found[2].conditions["state"],
            "ms": [item.conditions["floor_ms"] for item in found],
            "ratio": asdict(found[2].ratio), "by_energy": asdict(found[1].ratio),  # type: ignore[call-overload]
            "over_by_energy": asdict(beside.ratio),  # type: ignore[call-overload]
        }  # fmt: skip
        sys.stdout.write(f"{json.dumps(row)}\n")
        page.RESULTS.store("race", row, facts())


def train(name: str, options: argparse.Namespace) -> None:
    """What ``tune`` regains of the pass's network; goes on where it was stopped. Scored on every test image."""
    module, task = CASES[name].load(options.data)
    test, task = task.evaluation, replace(task, evaluation=None)
    run, plain = job(name, module, task, options.work, None), chosen(name, module, task)
    trained = tune(copy.deepcopy(plain), task, run, TUNE)  # type: ignore[arg-type]
    torch.save(trained, options.work / name / "trained.pt")
    found = run.findings["tune"]
    sys.stdout.write(f"{run.notes}\n")
    row = {"network": name, "samples": len(test), "images": TRAINING, "settings": asdict(TUNE)}
    row |= {key: found[key] for key in ("epochs", "kept", "seconds", "ended")}
    for word, network in (("trained", trained), ("factored", plain), ("original", module)):
        row[word] = stored_accuracy(network, test, options.work / name / f"{word}.json")
        sys.stdout.write(f"{word} {row[word]}\n")
        sys.stdout.flush()
    page.RESULTS.store("accuracy", row, facts())


def int8(name: str, options: argparse.Namespace) -> None:
    """The dense network and the factored one in 8 bits, for each target."""
    module, task = CASES[name].load(options.data)
    data = open_data({"data": "cifar10_train20k.npz", "samples": CALIBRATION_INT8}, task.inputs, options.data)
    small = Task(task.inputs, calibration=data)
    for role, network in (("dense", module), ("factored", chosen(name, module, task))):
        out = options.work / name / "int8" / role
        if not (out / COMPRESSED / MANIFEST).exists():
            compress(network, small, [Quantize(explain=False)], out, Silent())
        export(out, [parts.find(Exporter, target)() for target in options.targets], Silent())


def race_int8(name: str, options: argparse.Namespace) -> None:
    for target in options.targets:
        artifacts = [Artifact.open(options.work / name / "int8" / role / target) for role in ("dense", "factored")]
        found = profile(artifacts, Host(), None, Settings(max_seconds=options.seconds, cold=False), Silent())
        assert found[1].ratio is not None
        times = [item.conditions["floor_ms"] for item in found]
        row = {"network": name, "target": target, "ms": times, "ratio": asdict(found[1].ratio)}
        sys.stdout.write(f"{json.dumps(row)}\n")
        page.RESULTS.store("race_int8", row, facts())


def chosen(name: str, module: nn.Module, task: Task) -> nn.Module:
    """The network that the pass made when it chose, before training."""
    network = copy.deepcopy(module)
    (choice,) = (row for row in page.RESULTS.read()["choice"] if row["network"] == name)
    wanted = {row["layer"]: Form(row["form"], tuple(row["ranks"])) for row in choice["layers"]}
    spots = [spot for spot in survey(GraphView.of(network, task), ())[0] if wanted[spot.path] != DENSE]
    seen = moments(network, task, [spot for spot in spots if wanted[spot.path].method == "channel-svd"])
    for spot in spots:
        put_layer(network, spot.layer, factored(spot.layer, wanted[spot.path], seen.get(spot.layer)))
    return network


def stored_accuracy(module: nn.Module, data: Any, path: Path) -> float:
    """As ``accuracy``, once for these weights."""
    mark = float(sum(value.double().abs().sum() for value in module.state_dict().values()))
    if not path.exists() or (found := json.loads(path.read_text()))[0] != mark:
        found = [mark, accuracy(module, data)]
        path.write_text(json.dumps(found))
    return float(found[1])


def accuracy(module: nn.Module, data: Any) -> float:
    right = 0
    with torch.no_grad():
        for batch in data.batches(200):
            (images,) = batch.inputs.values()
            right += int((module(torch.from_numpy(images)).argmax(1).numpy() == batch.targets).sum())
    return right / len(data)


def facts() -> dict[str, Any]:
    return {"processor": Host().facts().get("processor", "unknown processor"), "versions": versions(*PACKAGES)}


STAGES: Mapping[str, Any] = {
    "write": write, "times": times, "choose": choose, "export": export_race, "race": race, "train": train, "int8": int8,
    "race_int8": race_int8,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "document"))
    parser.add_argument("--networks", nargs="+", choices=CASES, default=tuple(CASES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "factorize", help="files that are timed")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, per call (times) or race")
    parser.add_argument("--each", type=float, default=0.5, help="seconds for each form of a layer (times)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage == "document":
        page.RESULTS.rewrite()
        return
    for name in options.networks:
        STAGES[options.stage](name, options)


if __name__ == "__main__":
    main()
