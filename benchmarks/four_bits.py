"""Four-bit weights in real files: what they cost in score, what they save in bytes, and whether they are as fast.

    python benchmarks/four_bits.py                                   # everything that is not known yet
    python benchmarks/four_bits.py --networks resnet20 --formats onnx --samples 500 --results try.json
    python benchmarks/four_bits.py --latency                         # a quiet minute: ratios of ResNet-20's files
    python benchmarks/four_bits.py --document                        # only docs/four_bits.md, from what is stored

Every row is stored as soon as it is known, and left alone while it is there and was made from the same source. Needs
the data folder (default: ../shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from _cases import Case, open_case
from _integer_page import DOCUMENT as INTEGER_PAGE
from _integer_page import ENGINES, RESULTS, ROOT, TITLES
from _judge import Tally, caller
from _ours import EXPORTS, source_hash

from edgepack import parts
from edgepack.artifact import MANIFEST, Artifact, write_text
from edgepack.compressing import BASELINE, COMPRESSED, compress
from edgepack.contracts import Device, Exporter, Pass, Settings
from edgepack.errors import EdgepackError
from edgepack.exporting import export
from edgepack.profiling import profile
from edgepack.progress import Silent
from edgepack.recipe import build
from edgepack.versions import versions

NETWORKS = ("resnet20", "resnet32", "mobilenet_v1", "vit")
FORMATS = ("onnx", "openvino", "tflite", "coreml")
NEAREST = {"rounding": "nearest", "bias_correct": False}
KINDS: dict[str, dict[str, Any]] = {
    "W4": {"weight_bits": 4},
    "W4, nearest": {"weight_bits": 4, **NEAREST},
    "W4, AdaRound": {"weight_bits": 4, "rounding": "adaround"},
    "W4, groups of 32": {"weight_bits": 4, "group_size": 32},
    "W4, tables per 8 channels": {"weight_bits": 4, "codebook": 8},
    "W4, one table": {"weight_bits": 4, "codebook": 1 << 20},
    "W4A8": {"weight_bits": 4, "activation_bits": 8},
    "W4A8, nearest": {"weight_bits": 4, "activation_bits": 8, **NEAREST},
    "W8A16": {"weight_bits": 8, "activation_bits": 16},
    "W8A8": {},
}
SCORED = tuple(kind for kind in KINDS if kind != "W8A8")
TARGETS = {"coreml": {"target": "iOS18"}}
INTERPRETED = 1000  # images, where an interpreter or one operator after the other computes
RACERS = (("W8A8", None), ("W4A8", "fast"), ("W4A8", "packed"), ("W4", "packed"))  # all against the first
RACED = ("onnx", "openvino")
STORED = RESULTS / "four_bits.json"
DOCUMENT = ROOT / "docs" / "four_bits.md"
HEAD = (
    "# Four-bit weights\n\nWritten by `python benchmarks/four_bits.py` from `benchmarks/results/four_bits.json`; do "
    "not edit.\n"
)
Row = dict[str, Any]


def compressed(case: Case, number: int, kind: str) -> tuple[Path, float]:
    """The folder of one fold, and how long the compression took."""
    out = case.folder / f"{number}-four-{kind.replace(', ', '-')}-{source_hash()}"
    clock = out / "seconds.json"
    if not (out / COMPRESSED / MANIFEST).exists():
        began = time.perf_counter()
        quantize = build(Pass, {"use": "quantize", "explain": False, **KINDS[kind]})
        compress(case.module, case.task(case.folds[number]), [quantize], out, Silent())
        clock.write_text(json.dumps(time.perf_counter() - began))
        shutil.rmtree(out / BASELINE)
    return out, float(json.loads(clock.read_text()))


def written(out: Path, format: str, weights: str | None = None) -> Artifact:
    options = {**EXPORTS.get(format, {}), **TARGETS.get(format, {})}
    name = f"{format}-{weights or 'default'}"
    export(out, [parts.find(Exporter, format)(name=name, weights=weights, **options)], Silent())
    return Artifact.open(out / name)


def scored(case: Case, format: str, kind: str) -> Row:
    """One row: all folds, each with its own file."""
    tally, seconds, files = Tally(case), 0.0, []
    for number in range(len(case.folds)):
        out, spent = compressed(case, number, kind)
        seconds = max(seconds, spent)
        files.append(written(out, format))
        with ExitStack() as stack:
            tally.add(number, caller(files[-1], stack), INTERPRETED if format == "coreml" or kind == "W8A16" else None)
    first = files[0]
    assert first.manifest.census is not None
    weights = sum(facts.size_bytes for name, facts in first.manifest.files.items() if name.endswith(".bin"))
    return {
        **tally.result(),
        "size_bytes": first.size_bytes,
        "size_ratio": round(first.size_bytes / case.float_bytes, 4),
        "weights_ratio": round(weights / case.float_bytes, 4) if weights else None,
        "int4_bytes": sum(first.manifest.census["weight_bytes"].get(kind, 0) for kind in ("int4", "uint4")),
        "dialect": first.manifest.dialect,
        "compress_seconds": round(seconds, 1),
    }


def accuracy(options: argparse.Namespace, stored: Row) -> None:
    for name in options.networks:
        case = open_case(name, options.data, options.work, options.samples)
        for kind in options.kinds:
            for format in options.formats:
                key = {"network": name, "format": format, "kind": kind}
                old = next((row for row in stored["rows"] if key.items() <= row.items()), None)
                if old is not None and old["source"] == source_hash():
                    continue
                try:
                    found = scored(case, format, kind)
                except EdgepackError as error:
                    found = {"exit": error.exit_status, "why": error.message}
                row = {**key, **found, "source": source_hash()}
                stored["rows"] = [item for item in stored["rows"] if item is not old] + [row]
                sys.stdout.write(f"{json.dumps(row)}\n")
                sys.stdout.flush()
                store(options.results, stored)


def latency(options: argparse.Namespace, stored: Row) -> None:
    """Files of ResNet-20, interleaved, one thread; prepares them first, so that a second call only measures."""
    case = open_case("resnet20", options.data, options.work, options.samples)
    device, settings = parts.find(Device, "host")(), Settings(max_seconds=options.seconds, cold=False)
    for format in RACED:
        files = [written(compressed(case, 0, kind)[0], format, weights) for kind, weights in RACERS]
        if options.prepare:
            continue
        found = profile(files, device, None, settings, Silent())
        for (kind, weights), measured in zip(RACERS[1:], found[1:], strict=True):
            assert measured.ratio is not None
            ratio = {name: getattr(measured.ratio, name) for name in ("value", "low", "high", "verdict")}
            row = {"format": format, "kind": kind, "weights": weights, "over_w8a8": ratio, "source": source_hash()}
            same = ("format", "kind", "weights")
            kept = [item for item in stored["races"] if any(item[name] != row[name] for name in same)]
            stored["races"] = [*kept, row]
            sys.stdout.write(f"{json.dumps(row)}\n")
            store(options.results, stored)


def store(path: Path, stored: Row) -> None:
    stored["rows"].sort(key=lambda row: (NETWORKS.index(row["network"]), list(KINDS).index(row["kind"]),
                                         FORMATS.index(row["format"])))  # fmt: skip
    stored["versions"] = versions("torch", "onnxruntime", "openvino", "ai-edge-litert", "coremltools")
    write_text(path, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    if path == STORED:
        write_text(DOCUMENT, document(stored))


def document(stored: Row) -> str:
    """The page."""
    text = (
        "Real files, each in its own engine (Core ML: interpreted). *W4*: 4-bit weights, float activations, the files "
        "packed. *W4A8*: 8-bit activations beside them, files as each format writes them by default. *nearest*: "
        "without edgepack's rounding and bias correction. *AdaRound*: rounding learned. *Groups*: a scale per 32 "
        "columns of linear layers and 1×1 convolutions. *Tables*: weights looked up in tables of 16 values found by "
        "k-means (Core ML's palettized weights). *W8A16*: 8-bit weights, 16-bit activations with one exponent per "
        "tensor. *Lost*: points of top-1. *Size*: of the files over four "
        "bytes per parameter (OpenVINO: also its `.bin` alone). *Seconds*: of the whole compression, on a machine "
        "with other work. The eight-bit files are in [Eight bits](" + INTEGER_PAGE.name + ").\n"
    )
    lines = ["| network | engine | weights and activations | images | float % | score % | lost | size ÷ float "
             "| 4-bit bytes | seconds |", "| --- " * 10 + "|"]  # fmt: skip
    lines += [_line(row) for row in stored["rows"]]
    parts = [HEAD, text, "\n".join(lines) + "\n"]
    if stored["races"]:
        parts.append(_races(stored["races"]))
    named = ", ".join(f"{name} {version}" for name, version in sorted(stored["versions"].items()))
    return "\n".join([*parts, f"Versions: {named}.\n"])


def _line(row: Row) -> str:
    start = f"| {TITLES[row['network']]} | {ENGINES[row['format']]} | {row['kind']} |"
    if "why" in row:
        return f"{start} exit {row['exit']}: {row['why'].replace('|', '/')} | | | | | | |"
    size = f"{row['size_ratio']:.3f}" + (f" ({row['weights_ratio']:.3f})" if row["weights_ratio"] else "")
    score = f"{row['float_score']:.2f} | {row['score']:.2f} | {row['lost'] + 0.0:.2f}"
    return f"{start} {row['samples']} | {score} | {size} | {row['int4_bytes']} | {row['compress_seconds']:g} |"


def _races(races: list[Row]) -> str:
    lines = ["## Speed\n", "ResNet-20, batch 1, one thread, all files of an engine interleaved: time over that of the "
             "eight-bit file (W8A8), with its 95 % interval.\n",
             "| engine | weights and activations | stored | ÷ W8A8 | verdict |", "| --- " * 5 + "|"]  # fmt: skip
    for row in races:
        ratio = row["over_w8a8"]
        shown = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        lines.append(f"| {ENGINES[row['format']]} | {row['kind']} | {row['weights']} | {shown} | {ratio['verdict']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--kinds", nargs="+", choices=SCORED, default=SCORED)
    parser.add_argument("--samples", type=int, help="at most this many images, for trying things out")
    parser.add_argument("--latency", action="store_true", help="measure speed, not score")
    parser.add_argument("--prepare", action="store_true", help="with --latency: make the files only")
    parser.add_argument("--seconds", type=float, default=25.0, help="of measuring, per engine")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "four_bits")
    parser.add_argument("--results", type=Path, default=STORED)
    parser.add_argument("--document", action="store_true", help="only write the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = options.results.exists()
    stored = json.loads(options.results.read_text()) if known else {"rows": [], "races": []}
    if options.document:
        store(options.results, stored)
    else:
        (latency if options.latency else accuracy)(options, stored)


if __name__ == "__main__":
    main()
