"""Eight bits beside float and beside the engines' own tools: latency at batch 1, one thread, interleaved.

    python benchmarks/integer_latency.py --prepare --work FOLDER                # make all files first; nothing is timed
    python benchmarks/integer_latency.py --work FOLDER                          # then only measure: 20 quiet minutes
    python benchmarks/integer_latency.py --networks resnet20 --seconds 3 --results try.json --work FOLDER

One row is one network in one engine: edgepack's eight-bit file, its float file, and the tools' files, in one run of
the timing loop. Each row is stored as soon as it is known and replaces the old one. Quality stands beside speed: the
outputs' SQNR against the float network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import _integer_page as page
import torch
from _cases import Case, open_case
from _judge import Tally, caller, encoded
from _ours import DYNAMIC, OURS, STATIC, ours, ours_float
from _peers import PEERS, Peer

from edgepack import statistics
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, describe_files
from edgepack.contracts import Contender, Runtime, Settings
from edgepack.devices.host import Host
from edgepack.errors import EdgepackError
from edgepack.measurement import Profile, Ratio
from edgepack.runtimes.onnxruntime import Onnxruntime
from edgepack.runtimes.openvino import Openvino
from edgepack.runtimes.tflite import Tflite
from edgepack.statistics import Interval
from edgepack.versions import versions

NETWORKS = ("mobilenet_v2-random", "resnet50", "deit_small", "convnext_atto", "efficientnet_b0", "mobilenet_v1",
            "resnet20", "vit")  # fmt: skip
FORMATS = ("onnx", "openvino", "tflite")
GUARDS = {"convolutions": 30.0, "transformers": 19.0}  # dB, for random weights
SAMPLES = 500  # images that quality is read from
HEAVY = {"resnet50": 2.5, "deit_small": 2.5}  # of the time of a row, for as many blocks
PACKAGES = ("torch", "onnxruntime", "openvino", "ai-edge-litert", "nncf", "ai-edge-quantizer", "litert-torch")
FLOAT = "float"
Entry = dict[str, Any]


def engine(format: str, integer: bool) -> Runtime:
    """Float files in float32; OpenVINO computes what is left of an eight-bit file as it chooses."""
    if format == "openvino":
        return Openvino(precision="default" if integer else "float32")
    return Onnxruntime() if format == "onnx" else Tflite()


def rivals(format: str, case: Case) -> list[Peer]:
    """The tools whose files this engine runs: OpenVINO also those of ONNX Runtime. One calibration method is enough."""
    formats = (format, "onnx") if format == "openvino" else (format,)
    return [peer for peer in PEERS if peer.format in formats and peer.suits(case) and "Percentile" not in peer.name]


def files(case: Case, format: str, kind: str, theirs: bool = False) -> tuple[dict[str, Artifact], list[Entry]]:
    """Artifacts by label, edgepack's first, and a line for each that could not be made."""
    makers: dict[str, Callable[[], Artifact]] = {}
    if not theirs:
        makers = {f"edgepack {kind}": partial(ours, case, 0, format, kind), FLOAT: partial(ours_float, case, format)}
    makers |= {peer.name: partial(peer.artifact, case, 0) for peer in rivals(format, case)}
    found: dict[str, Artifact] = {}
    failed: list[Entry] = []
    for label, make in makers.items():
        try:
            found[label] = make()
        except EdgepackError as error:
            failed.append({"label": label, "exit": error.exit_status, "why": error.message})
        except Exception as error:  # tools fail with anything
            sentence = str(error).strip().partition("\n")[0][:200]
            failed.append({"label": label, "why": f"{type(error).__name__}: {sentence}"})
    return found, failed


def quality(case: Case, artifact: Artifact, format: str) -> float | None:
    """SQNR of the outputs in the engine that is timed, on images of the first fold, dB; kept beside the file."""
    path = artifact.folder.with_name(f"{artifact.folder.name}-{format}-{artifact.manifest.fingerprint[:8]}.json")
    if not path.exists():
        tally = Tally(case)
        with ExitStack() as stack:
            tally.add(0, caller(artifact, stack, engine(format, integer=True)), SAMPLES)
        path.write_text(json.dumps(tally.result()["sqnr_db"]))
    value: float | None = json.loads(path.read_text())
    return value


def settled(case: Case, artifact: Artifact, runtime: Runtime, folder: Path) -> Artifact:
    """A copy whose golden answers are what this engine gives, so that every contender is timed on the same picture."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(artifact.folder, folder)
    inputs = {artifact.manifest.inputs[0].name: encoded(artifact, case.folds[0].scored[0][0][:1])}
    session = runtime.load(artifact, 1)
    answers = session.run(inputs)
    session.close()
    Golden(inputs, answers, answers).save(folder / GOLDEN)
    manifest = replace(artifact.manifest, files=describe_files(folder))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder)


def kept(case: Case, sqnr_db: float | None) -> bool:
    """Whether a file may be called the best: those of networks with random weights need a quality."""
    if case.metric is not None or sqnr_db is None:
        return True
    return sqnr_db >= GUARDS["transformers" if case.transformer else "convolutions"]


def inverse(ratio: Ratio, settings: Settings) -> dict[str, Any]:
    """The same comparison, seen from the other side."""
    interval = Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    return {**interval._asdict(), "verdict": statistics.verdict(interval, settings.tolerance)}


def race(case: Case, format: str, kind: str, settings: Settings) -> Entry:
    """Time all files of one network in one engine."""
    artifacts, failed = files(case, format, kind)
    contenders = []
    for label, artifact in artifacts.items():
        runtime = engine(format, integer=label != FLOAT)
        place = case.folder / "timed" / f"{format}-{kind}-{label.replace(' ', '-').replace('/', '-').lower()}"
        contenders.append(Contender(label, settled(case, artifact, runtime, place), runtime))
    profiles = Host().measure(contenders, settings)
    entries = [{"label": profile.label, "p50_ms": profile.latency_ms.p50, "floor_ms": profile.conditions["floor_ms"],
                "sqnr_db": None if profile.label == FLOAT else quality(case, artifacts[profile.label], format),
                "size_ratio": round(artifacts[profile.label].size_bytes / case.float_bytes, 4),
                "ratio": None if profile.ratio is None else asdict(profile.ratio)} for profile in profiles]  # fmt: skip
    for entry in entries:
        entry["kept"] = kept(case, entry["sqnr_db"])
    best = compared(entries, profiles, settings)
    entries = sorted(entries + failed, key=lambda entry: not page.mine({"tool": entry["label"]}))
    return {"network": case.name, "format": format, "tool": f"edgepack {kind}", "best": best, "entries": entries,
            "conditions": profiles[-1].conditions}  # fmt: skip


def compared(entries: Sequence[Entry], profiles: Sequence[Profile], settings: Settings) -> str | None:
    """Ratios over float and over the best rival; returns that one's label."""
    floors = {entry["label"]: entry["floor_ms"] for entry in entries}
    good = [e for e in entries if e["kept"] and e["label"] != FLOAT and not page.mine({"tool": e["label"]})]
    best = min(good, key=lambda entry: float(entry["floor_ms"]), default=None)
    against = {profile.label: profile.ratio for profile in profiles}
    for entry in entries:
        if FLOAT in floors and entry["label"] != FLOAT:
            entry["over_float"] = {"value": entry["floor_ms"] / floors[FLOAT], "low": None}
    first = entries[0]
    if page.mine({"tool": first["label"]}):  # the reference of all ratios
        for key, label in (("over_float", FLOAT), ("over_best", None if best is None else best["label"])):
            if label is not None and (ratio := against.get(label)) is not None:
                first[key] = inverse(ratio, settings)
    return None if best is None else str(best["label"])


def run(options: argparse.Namespace) -> None:
    stored: list[Mapping[str, Any]] = []
    if options.results.exists():
        stored = json.loads(options.results.read_text())["rows"]
    for name in options.networks:
        case = open_case(name, options.data, options.work, options.samples)
        settings = Settings(threads=1, max_seconds=options.seconds * HEAVY.get(name, 1.0), cold=False)
        kinds = [kind for kind in OURS[case.linear] if kind in options.kinds]
        for format, kind in ((format, kind) for format in options.formats for kind in kinds):
            began = time.perf_counter()
            if options.prepare:
                found, failed = files(case, format, kind, options.only_theirs)
                said: object = {label: quality(case, a, format) for label, a in found.items() if label != FLOAT} | {
                    "failed": failed
                }
            else:
                row = {**race(case, format, kind, settings), "versions": versions(*PACKAGES)}
                key = (row["network"], row["format"], row["tool"])
                stored = [item for item in stored if (item["network"], item["format"], item["tool"]) != key] + [row]
                page.store(options.results, stored, NETWORKS, FORMATS, guards=GUARDS, processor=processor())
                said = "\n".join(["", *page.race(row)])
            sys.stdout.write(f"{name} {format} {kind} {time.perf_counter() - began:.0f} s {said}\n")
            sys.stdout.flush()


def processor() -> str:
    return Host().facts().get("processor", "unknown processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--kinds", nargs="+", choices=(STATIC, DYNAMIC), default=(STATIC, DYNAMIC))
    parser.add_argument("--seconds", type=float, default=22.0, help="at most, per row; large networks more")
    parser.add_argument("--samples", type=int, help="at most this many images, for trying things out")
    parser.add_argument("--prepare", action="store_true", help="make and judge all files, measure nothing")
    parser.add_argument("--only-theirs", action="store_true", help="prepare the tools' files, not edgepack's")
    torch.set_num_threads(1)
    page.answer(parser, page.LATENCY, run)


if __name__ == "__main__":
    main()
