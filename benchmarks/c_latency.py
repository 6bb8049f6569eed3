"""The C target beside the engines: latency at batch 1, one thread, interleaved; memory, sizes, instructions.

    python benchmarks/c_latency.py --stages prepare --work FOLDER     # make all files first; nothing is timed
    python benchmarks/c_latency.py --stages race --work FOLDER        # then time them, a minute per network and form
    python benchmarks/c_latency.py --stages facts emulated            # sizes, arenas, equality; instructions under QEMU
    python benchmarks/c_latency.py --stages set5                      # IMDN as C, scored on the pictures of Set5
    python benchmarks/c_latency.py --stages document                  # only docs/c.md, from what is stored

One row is one network in one form (float32 or eight bits): the C files against ONNX Runtime, OpenVINO (float32 as
float32) and TFLite, all from the same compressed network, in one run of the timing loop. Ratios are C over engine.
What a stage finds out is stored in ``benchmarks/results/c_latency.json`` and shown in ``docs/c.md`` as soon as it is
known.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _c_facts
import _c_page as page
from _cases import Case, Fold, open_case, whole
from _ours import STATIC, ours, ours_float

from edgepack import pipeline
from edgepack.artifact import Artifact
from edgepack.contracts import Contender, Runtime, Settings
from edgepack.devices.host import Host
from edgepack.errors import ParityError
from edgepack.measurement import Profile
from edgepack.recipe import load
from edgepack.runtimes.c import C
from edgepack.runtimes.onnxruntime import Onnxruntime
from edgepack.runtimes.openvino import Openvino
from edgepack.runtimes.tflite import Tflite

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "core" / "examples" / "digits"
NETWORKS = ("digits", "resnet20", "mobilenet_v1")
FORMS = ("float", STATIC)
FORMATS: Mapping[str, tuple[str, type[Runtime]]] = {  # the C files first: ratios are against them
    "c": ("C", C), "onnx": ("ONNX Runtime", Onnxruntime), "openvino": ("OpenVINO", Openvino),
    "tflite": ("TFLite", Tflite),
}  # fmt: skip
STAGES = ("prepare", "race", "facts", "emulated", "set5", "document")


def case_of(name: str, data: Path, work: Path) -> Case:
    """A network with its samples; the digits are part of edgepack."""
    if name != "digits":
        return open_case(name, data, work)
    recipe = load(DIGITS / "edgepack.toml")
    item = pipeline.task_of(recipe).inputs[0]
    calibration, _ = whole(item, {"data": "train.npz", "samples": 256}, DIGITS)
    fold = Fold(calibration, (whole(item, {"data": "test.npz"}, DIGITS),))
    return Case(name, pipeline.load_model(recipe).eval(), item, (fold,), work=work)


def artifacts(case: Case, form: str) -> tuple[dict[str, Artifact], dict[str, str]]:
    """The files of a network by format, and by engine why there is none."""
    made: dict[str, Artifact] = {}
    refused: dict[str, str] = {}
    for format, (engine, _) in FORMATS.items():
        try:
            made[format] = ours_float(case, format) if form == "float" else ours(case, 0, format, form)
        except ParityError as error:
            refused[engine] = f"not written (exit {error.exit_status}): {error.message}"
    return made, refused


def runtime(format: str, form: str) -> Runtime:
    if format == "openvino":
        return Openvino(precision="float32" if form == "float" else "default")
    return FORMATS[format][1]()


def race(case: Case, form: str, seconds: float) -> dict[str, Any]:
    """Time the files of one network against each other, those whose answers are right."""
    made, refused = artifacts(case, form)
    contenders = [Contender(FORMATS[f][0], artifact, runtime(f, form)) for f, artifact in made.items()]
    settings, profiles = Settings(max_seconds=seconds, instances=3, cold=False), list[Profile]()
    while not profiles:
        try:
            profiles = list(Host().measure(contenders, settings))
        except ParityError as error:
            engine = error.message.partition(":")[0]
            refused[engine] = f"not timed: differs{error.message.partition(' differs')[2].partition(', so ')[0]}"
            contenders = [contender for contender in contenders if contender.label != engine]
    rows = [_row(profile) for profile in profiles]
    rows += [{"engine": engine, "why": why} for engine, why in refused.items()]
    return {"rows": rows, "state": profiles[0].conditions.get("state")}


def _row(profile: Profile) -> dict[str, Any]:
    row = {"engine": profile.label, "p50_ms": profile.latency_ms.p50, "min_ms": profile.latency_ms.min}
    if profile.ratio is not None:  # engine over C → C over engine
        row |= {"c_over_engine": 1 / profile.ratio.value, "low": 1 / profile.ratio.high, "high": 1 / profile.ratio.low}
    return row


def find_out(stage: str, case: Case, form: str, seconds: float) -> dict[str, Any]:
    """What a stage says of one network in one form."""
    if stage == "race":
        return race(case, form, seconds)
    made, _ = artifacts(case, form)
    if stage == "facts":
        return _c_facts.beside(made)
    return {"emulated": list(_c_facts.on_processors(made["c"], case.work / "emulated"))} if stage == "emulated" else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["race"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--seconds", type=float, default=20.0, help="per network and form")
    parser.add_argument("--pictures", type=int, default=5, help="of Set5")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "c")
    parser.add_argument("--results", type=Path, default=page.RESULTS)
    options = parser.parse_args()
    if "set5" in options.stages:
        case = open_case("imdn", options.data, options.work, options.pictures)
        _store(options.results, case.name, "float", _c_facts.scored(case))
    todo = [stage for stage in options.stages if stage not in ("set5", "document")]
    for name in options.networks if todo else ():
        case = case_of(name, options.data, options.work)
        for form in options.forms:
            for stage in todo:
                _store(options.results, name, form, find_out(stage, case, form, options.seconds))
    if "document" in options.stages:
        page.write()


def _store(path: Path, network: str, form: str, found: dict[str, Any]) -> None:
    sys.stderr.write(f"{network} {form}: {json.dumps(found)}\n")
    if found:
        page.store(path, {"network": network, "form": form}, found, Host().facts())


if __name__ == "__main__":
    main()
