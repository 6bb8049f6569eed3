"""Quantization-aware training beside rounding after training, in real files. Writes results/qat.json and docs/qat.md.

    python benchmarks/qat.py                                      # everything that is not known yet
    python benchmarks/qat.py --kinds W4A4 --samples 500 --images 640 --results try.json
    python benchmarks/qat.py --document                           # only docs/qat.md, from what is stored

ResNet-20 is trained on training images, following the float network; the last epoch is taken. Every file is scored on
all 10,000 test images; only the learning rate was compared on some of them. A training that was interrupted goes on.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _cases import Case, open_case
from _integer_page import RESULTS, ROOT, TITLES
from _judge import Tally, caller
from _ours import source_hash

from edgepack import parts
from edgepack.artifact import MANIFEST, Artifact, write_text
from edgepack.compress._tune import Tune
from edgepack.compress.quantize import Quantize
from edgepack.compressing import BASELINE, COMPRESSED, compress
from edgepack.contracts import Exporter
from edgepack.data import open_data
from edgepack.errors import EdgepackError
from edgepack.exporting import export
from edgepack.progress import Silent
from edgepack.task import Task
from edgepack.versions import versions

NETWORK = "resnet20"
FORMATS = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "c": "C"}
KINDS: dict[str, dict[str, int]] = {
    "W4A4": {"weight_bits": 4, "activation_bits": 4},
    "W4A8": {"weight_bits": 4, "activation_bits": 8},
    "W8A8": {"weight_bits": 8, "activation_bits": 8},
}
METHODS = ("ptq", "qat")
EPOCHS = {"W4A4": 2, "W4A8": 1, "W8A8": 1}
TRAINING = {"data": "cifar10_train20k.npz"}
STORED = RESULTS / "qat.json"
DOCUMENT = ROOT / "docs" / "qat.md"
Row = dict[str, Any]


def settings(kind: str) -> Tune:
    """The last epoch is taken: the float network knows its training images, so that no choice on them says much."""
    return Tune(optimizer="adamw", epochs=EPOCHS[kind], held_out=0)


def task_of(case: Case, data: Path, images: int | None) -> Task:
    """With training images, all of them by default."""
    source = TRAINING if images is None else {**TRAINING, "samples": images}
    training = open_data(source, (case.item,), data)
    return replace(case.task(case.folds[0]), training=training, metric=case.metric, augment="crop-flip")


def compressed(case: Case, task: Task, kind: str, method: str) -> Path:
    """The folder with the compressed network; how long it took stands beside it."""
    images = len(task.training or ())
    out = case.folder / f"{kind}-{method}-{images if method == 'qat' else 0}-{source_hash()}"
    if not (out / COMPRESSED / MANIFEST).exists():
        began = time.perf_counter()
        tune = settings(kind) if method == "qat" else None
        compress(case.module, task, [Quantize(explain=False, method=method, tune=tune, **KINDS[kind])], out, Silent())
        (out / "seconds.json").write_text(json.dumps(time.perf_counter() - began))
        shutil.rmtree(out / BASELINE)
    return out


def scored(case: Case, out: Path, format: str) -> Row:
    """What one file makes of all images."""
    export(out, [parts.find(Exporter, format)()], Silent())
    artifact, tally = Artifact.open(out / format), Tally(case)
    with ExitStack() as stack:
        tally.add(0, caller(artifact, stack))
    census = artifact.manifest.census
    assert census is not None
    return {
        **tally.result(),
        "size_bytes": artifact.size_bytes,
        "size_ratio": round(artifact.size_bytes / case.float_bytes, 4),
        "notes": list(census["notes"]),
    }


def trained(out: Path, kind: str, images: int) -> Row:
    """What the history says of training."""
    (entry,) = Artifact.open(out / COMPRESSED).manifest.history
    found = entry["findings"]["tune"]
    return {
        "settings": asdict(settings(kind)), "images": images, "seconds": found["seconds"], "kept": found["kept"],
        "samples": found["samples"],
        "epochs": [{key: row.get(key) for key in ("epoch", "loss", "choice", "seconds")} for row in found["epochs"]],
    }  # fmt: skip


def run(options: argparse.Namespace, stored: Row) -> None:
    case = open_case(NETWORK, options.data, options.work, options.samples)
    task = task_of(case, options.data, options.images)
    for kind in options.kinds:
        for method in options.methods:
            for format in options.formats:
                key = {"kind": kind, "method": method, "format": format}
                old = next((row for row in stored["rows"] if key.items() <= row.items()), None)
                if old is not None and old["source"] == source_hash():
                    continue
                try:
                    out = compressed(case, task, kind, method)
                    found = scored(case, out, format)
                    if method == "qat":
                        found["training"] = trained(out, kind, len(task.training or ()))
                except EdgepackError as error:
                    found = {"exit": error.exit_status, "why": error.message}
                row = {**key, **found, "source": source_hash()}
                stored["rows"] = [item for item in stored["rows"] if item is not old] + [row]
                sys.stdout.write(f"{json.dumps(row)}\n")
                sys.stdout.flush()
                store(options.results, stored)


def store(path: Path, stored: Row) -> None:
    order = (list(KINDS), METHODS, list(FORMATS))
    stored["rows"].sort(key=lambda row: tuple(words.index(row[name]) for words, name in
                                              zip(order, ("kind", "method", "format"), strict=True)))  # fmt: skip
    stored["versions"] = versions("torch", "brevitas", "onnxruntime", "openvino")
    write_text(path, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    if path == STORED:
        write_text(DOCUMENT, document(stored))


def document(stored: Row) -> str:
    """The page."""
    text = (
        f"# Quantization-aware training\n\nWritten by `python benchmarks/qat.py` from `benchmarks/results/"
        f'{STORED.name}`; do not edit.\n\n{TITLES[NETWORK]}: `method = "ptq"`, from 512 calibration images, beside '
        '`method = "qat"`, which goes on from there and trains weights, biases, steps and ranges through brevitas\' '
        "quantizers to follow the float network. Real files, each in its own engine, one thread. *W4A4*: what layers "
        "with 4-bit weights multiply has 16 levels; the first and the last layer keep 8 bits, as do sums' other "
        "parts. *Lost*: points of top-1 on test images; the learning rate was compared on "
        "the first 1,000 of them, nothing else was chosen there. *Agreement*: same class as the "
        "float network.\n"
    )
    lines = ["| bits | method | engine | images | float % | score % | lost | agreement % | size ÷ float |",
             "| --- " * 9 + "|"]  # fmt: skip
    lines += [_line(row) for row in stored["rows"]]
    named = ", ".join(f"{name} {version}" for name, version in sorted(stored["versions"].items()))
    return "\n".join([text, "\n".join(lines) + "\n", _trainings(stored["rows"]), f"Versions: {named}.\n"])


def _line(row: Row) -> str:
    start = f"| {row['kind']} | {row['method']} | {FORMATS[row['format']]} |"
    if "why" in row:
        return f"{start} exit {row['exit']}: {row['why'].replace('|', '/')} | | | | | |"
    score = f"{row['float_score']:.2f} | {row['score']:.2f} | {row['lost'] + 0.0:.2f} | {row['agreement']:.2f}"
    return f"{start} {row['samples']} | {score} | {row['size_ratio']:.3f} |"


def _trainings(rows: list[Row]) -> str:
    found = {row["kind"]: row["training"] for row in rows if "training" in row}
    if not found:
        return ""
    lines = ["## Training\n", "One thread, on a machine with other work. *Loss*: mean of each epoch; of the labels and "
             "the float network's answers.\n",
             "| bits | images | epochs | seconds | images a second | loss per epoch | epoch kept |",
             "| --- " * 7 + "|"]  # fmt: skip
    for kind, facts in found.items():
        losses = ", ".join(f"{row['loss']:.4f}" for row in facts["epochs"] if row["loss"] is not None)
        lines.append(f"| {kind} | {facts['images']} | {facts['settings']['epochs']} | {facts['seconds']:.0f} | "
                     f"{facts['samples'] / facts['seconds']:.0f} | {losses} | {facts['kept']} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--samples", type=int, help="at most this many test images, for trying things out")
    parser.add_argument("--images", type=int, help="at most this many training images")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "qat")
    parser.add_argument("--results", type=Path, default=STORED)
    parser.add_argument("--document", action="store_true", help="only write the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(options.results.read_text()) if options.results.exists() else {"rows": []}
    if options.document:
        store(options.results, stored)
    else:
        run(options, stored)


if __name__ == "__main__":
    main()
