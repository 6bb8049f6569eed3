"""The C target beside the engines: latency at batch 1, one thread, interleaved; memory and size.

    python benchmarks/c_latency.py --prepare --work FOLDER            # make all files first; nothing is timed
    python benchmarks/c_latency.py --work FOLDER --networks resnet20  # then measure, a minute per network and form

One row is one network in one form (float32 or eight bits): the C files against ONNX Runtime, OpenVINO (float32 as
float32) and TFLite, all from the same compressed network, in one run of the timing loop. Ratios are C over engine.
Rows are stored in ``benchmarks/results/c_latency.json`` as soon as they are known.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _cases import Case, Fold, _whole, open_case
from _ours import STATIC, ours, ours_float

from edgepack import pipeline
from edgepack.artifact import Artifact
from edgepack.contracts import Contender, Runtime, Settings
from edgepack.devices.host import Host
from edgepack.measurement import Profile
from edgepack.recipe import load
from edgepack.runtimes.c import C
from edgepack.runtimes.onnxruntime import Onnxruntime
from edgepack.runtimes.openvino import Openvino
from edgepack.runtimes.tflite import Tflite
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "core" / "examples" / "digits"
RESULTS = Path(__file__).parent / "results" / "c_latency.json"
NETWORKS = ("digits", "resnet20", "mobilenet_v1")
FORMS = ("float", STATIC)
FORMATS: Mapping[str, tuple[str, type[Runtime]]] = {  # the C files first: ratios are against them
    "c": ("C", C), "onnx": ("ONNX Runtime", Onnxruntime), "openvino": ("OpenVINO", Openvino),
    "tflite": ("TFLite", Tflite),
}  # fmt: skip
PACKAGES = ("onnxruntime", "openvino", "ai-edge-litert")


def case_of(name: str, data: Path, work: Path) -> Case:
    """A network with its samples; the digits are part of edgepack."""
    if name != "digits":
        return open_case(name, data, work)
    recipe = load(DIGITS / "edgepack.toml")
    item = pipeline.task_of(recipe).inputs[0]
    calibration, _ = _whole(item, {"data": "train.npz", "samples": 256}, DIGITS)
    fold = Fold(calibration, (_whole(item, {"data": "test.npz"}, DIGITS),))
    return Case(name, pipeline.load_model(recipe).eval(), item, (fold,), work=work)


def artifacts(case: Case, form: str) -> dict[str, Artifact]:
    return {format: ours_float(case, format) if form == "float" else ours(case, 0, format, form) for format in FORMATS}


def runtime(format: str, form: str) -> Runtime:
    if format == "openvino":
        return Openvino(precision="float32" if form == "float" else "default")
    return FORMATS[format][1]()


def race(case: Case, form: str, seconds: float) -> dict[str, Any]:
    """Time the files of one network against each other."""
    found = artifacts(case, form)
    contenders = [Contender(FORMATS[f][0], artifact, runtime(f, form)) for f, artifact in found.items()]
    profiles = Host().measure(contenders, Settings(max_seconds=seconds, instances=3, cold=False))
    ours_p50 = profiles[0].latency_ms.p50
    print(f"{case.name} {form}: C {ours_p50:.4f} ms", file=sys.stderr)  # noqa: T201
    rows = [_row(profile) for profile in profiles]
    return {"network": case.name, "form": form, "rows": rows, "arena_bytes": arena(found["c"]),
            "state": profiles[0].conditions.get("state"), "size_bytes": {f: a.size_bytes for f, a in found.items()},
            "constants_bytes": sum((found["c"].manifest.census or {})["weight_bytes"].values())}  # fmt: skip


def _row(profile: Profile) -> dict[str, Any]:
    row = {"engine": profile.label, "p50_ms": profile.latency_ms.p50, "min_ms": profile.latency_ms.min}
    if profile.ratio is not None:  # engine over C → C over engine
        row |= {"c_over_engine": 1 / profile.ratio.value, "low": 1 / profile.ratio.high, "high": 1 / profile.ratio.low}
    print(f"  {json.dumps(row)}", file=sys.stderr)  # noqa: T201
    return row


def arena(artifact: Artifact) -> int:
    found = re.search(r"ARENA_BYTES (\d+)", (artifact.folder / "model.h").read_text(encoding="utf-8"))
    assert found is not None
    return int(found.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--seconds", type=float, default=20.0, help="per network and form")
    parser.add_argument("--prepare", action="store_true", help="only make the files")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "c")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.networks:
        case = case_of(name, options.data, options.work)
        for form in options.forms:
            if options.prepare:
                artifacts(case, form)
                continue
            _store(options.results, race(case, form, options.seconds))


def _store(path: Path, entry: dict[str, Any]) -> None:
    """Put a row in the place of the old one."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    key = (entry["network"], entry["form"])
    rows = [row for row in stored["rows"] if (row["network"], row["form"]) != key]
    stored = {"rows": [*rows, entry], "versions": versions(*PACKAGES), "machine": Host().facts()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
