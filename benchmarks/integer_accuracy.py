"""Eight bits beside the engines' own tools: score, agreement, noise and size on the same images.

    python benchmarks/integer_accuracy.py                                  # everything that is not known yet
    python benchmarks/integer_accuracy.py --networks resnet20 --samples 200 --results try.json
    python benchmarks/integer_accuracy.py --only-ours                      # edgepack's rows again, the tools' stay
    python benchmarks/integer_accuracy.py --document                       # only docs/integer.md, from what is stored

Every row is stored as soon as it is known. A row is left alone while its network, samples, versions and (for
edgepack's) source are those it was made from. ``--work`` keeps the files that the tools wrote. Needs the data folder
(default: ../shared/data beside the repository), and nncf, ai-edge-quantizer and torchao for their rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import _integer_page as page
import torch
from _cases import Case, open_case
from _judge import Tally, caller
from _ours import OURS, ours, source_hash
from _peers import PEERS, PT2E, Peer, pt2e

from edgepack.artifact import Artifact
from edgepack.errors import EdgepackError
from edgepack.versions import versions

NETWORKS = ("resnet20", "mobilenet_v1", "vit", "resnet32", "imdn", "mobilenet_v2")
FORMATS = ("onnx", "openvino", "tflite", "coreml", "torch")
FIXED = ("tflite",)  # formats of one size per file
INTERPRETED = {"coreml": 1000}  # images that are scored where an interpreter computes
ENGINE = {"onnx": ("onnxruntime",), "openvino": ("openvino",), "tflite": ("ai-edge-litert",),
          "coreml": ("coremltools",), "torch": ("torch", "torchao")}  # fmt: skip
Row = dict[str, Any]
Job = tuple[str, str, Mapping[str, Any], Callable[[], Row]]  # format, tool, what decides, how to find out


def jobs(case: Case, formats: tuple[str, ...], whose: str) -> list[Job]:
    """All rows of one network."""
    found: list[Job] = []
    for kind in OURS[case.linear] if whose != "theirs" else ():
        for format in formats:
            if format != "torch":
                facts = {"source": source_hash(), **versions("torch", "onnx", *ENGINE[format])}
                found.append((format, f"edgepack {kind}", facts, partial(our_row, case, format, kind)))
    if whose == "ours":
        return found
    for peer in PEERS:
        if peer.format in formats and peer.suits(case):
            facts = versions("torch", *peer.packages, *ENGINE[peer.format])
            found.append((peer.format, peer.name, facts, partial(peer_row, case, peer)))
    if "torch" in formats:
        found.append(("torch", PT2E, versions("torch", "torchao"), partial(pt2e_row, case)))
    return found


def our_row(case: Case, format: str, kind: str) -> Row:
    try:
        if format in FIXED and case.any_size:
            return sized_row(case, format, kind)
        artifacts = [ours(case, number, format, kind) for number in range(len(case.folds))]
        return {**judged(case, artifacts, INTERPRETED.get(format)), "dialect": artifacts[0].manifest.dialect}
    except EdgepackError as error:
        return {"exit": error.exit_status, "why": error.message}


def sized_row(case: Case, format: str, kind: str) -> Row:
    """One file per size of picture, all from the same compressed network; the figures of size are the first one's."""
    tally, made = Tally(case), dict[tuple[int, ...], Artifact]()
    for number, fold in enumerate(case.folds):
        for images, _ in fold.scored:
            size = images.shape[2:]
            made[size] = made[size] if size in made else ours(case, number, format, kind, size)
        with ExitStack() as stack:
            calls = {size: caller(artifact, stack) for size, artifact in made.items()}
            tally.add(number, lambda images, calls=calls: calls[images.shape[2:]](images))  # type: ignore[misc]
    first = next(iter(made.values()))
    facts = {"size_bytes": first.size_bytes, "size_ratio": round(first.size_bytes / case.float_bytes, 4)}
    return {**tally.result(), **facts, "dialect": first.manifest.dialect, "files": len(made)}


def peer_row(case: Case, peer: Peer) -> Row:
    if peer.format in FIXED and case.any_size:
        return {"why": "its files have fixed shapes, these pictures have different sizes"}
    return judged(case, [peer.artifact(case, number) for number in range(len(case.folds))])


def judged(case: Case, artifacts: list[Artifact], limit: int | None = None) -> Row:
    tally = Tally(case)
    for number, artifact in enumerate(artifacts):
        with ExitStack() as stack:
            tally.add(number, caller(artifact, stack), limit)
    weights = sum(facts.size_bytes for name, facts in artifacts[0].manifest.files.items() if name.endswith(".bin"))
    return {
        **tally.result(),
        "size_bytes": artifacts[0].size_bytes,
        "size_ratio": round(artifacts[0].size_bytes / case.float_bytes, 4),
        "weights_ratio": round(weights / case.float_bytes, 4) if artifacts[0].manifest.format == "openvino" else None,
    }


def pt2e_row(case: Case) -> Row:
    tally = Tally(case)
    for number, fold in enumerate(case.folds):
        tally.add(number, pt2e(case, fold))
    return {**tally.result(), "size_bytes": None, "size_ratio": None}


def found_out(row: Callable[[], Row]) -> Row:
    """The row, or why there is none: what a tool fails at is a result too."""
    began = time.perf_counter()
    try:
        found = row()
    except Exception as error:  # tools fail with anything
        found = {"why": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def run(options: argparse.Namespace) -> None:
    stored: list[Row] = json.loads(options.results.read_text())["rows"] if options.results.exists() else []
    for name in options.networks:
        case = open_case(name, options.data, options.work, options.samples)
        todo = jobs(case, tuple(options.formats), options.only)
        for number, (format, tool, facts, row) in enumerate(todo, 1):
            decides = json.dumps({"case": case.fingerprint, **facts}, sort_keys=True)
            key = {"network": name, "format": format, "tool": tool}
            old = next((item for item in stored if key.items() <= item.items()), None)
            made_from = hashlib.sha256(decides.encode()).hexdigest()[:16]
            if old is not None and old["made_from"] == made_from and not (options.again or options.only == "ours"):
                continue
            new = {**key, **found_out(row), "made_from": made_from, "versions": dict(facts)}
            stored = [item for item in stored if item is not old] + [new]
            sys.stdout.write(f"{name} {number}/{len(todo)} {page.line(new)}\n")
            sys.stdout.flush()
            page.store(options.results, stored, NETWORKS, FORMATS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--samples", type=int, help="at most this many images, for trying things out")
    parser.add_argument(
        "--only-ours",
        action="store_const",
        dest="only",
        const="ours",
        default="",
        help="make edgepack's rows again, and no other",
    )
    parser.add_argument("--only-theirs", action="store_const", dest="only", const="theirs", help="leave edgepack's out")
    parser.add_argument("--again", action="store_true", help="make every row again")
    torch.set_num_threads(1)
    page.answer(parser, page.ACCURACY, run)


if __name__ == "__main__":
    main()
