"""Bits chosen for each layer beside one width for all, at the same size.

    python benchmarks/mixed.py                                    # everything that is not known yet
    python benchmarks/mixed.py --networks mobilenet_v1 --samples 40 --results try.json
    python benchmarks/mixed.py --document                         # only docs/mixed.md, from what is stored

Weights alone are rounded; the network on its rounded weights is computed by PyTorch, as no file has a type for 6 or 3
bits. Every row is stored as soon as it is known and left alone while it is there. Needs the data folder (default:
../shared/data beside the repository).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cases import PICTURES, Array, Case, halves, open_case, whole
from _integer_page import RESULTS, ROOT, TITLES
from _judge import Tally
from torch import nn

from edgepack.artifact import write_text
from edgepack.compress.quantize import Quantize
from edgepack.compressing import PassRun
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.versions import versions

NETWORKS = ("mobilenet_v1", "mobilenet_v2", "resnet20")
WIDTHS = (8, 6, 5, 4, 3)
FILES = (8, 4)  # what files have a type for
KINDS = (
    *((width, None) for width in WIDTHS),
    *((widths, width) for width in (6, 5, 4) for widths in (WIDTHS, FILES)),
)  # bits for all; or bits to choose from, at the size of this many for all
STORED = RESULTS / "mixed.json"
DOCUMENT = ROOT / "docs" / "mixed.md"
Row = dict[str, Any]


def kind_of(widths: int | tuple[int, ...], size: int | None) -> str:
    if isinstance(widths, int):
        return f"W{widths}"
    return f"{', '.join(map(str, widths))} at the size of W{size}"


def rounded(case: Case, number: int, widths: int | tuple[int, ...], share: float) -> tuple[nn.Module, Row]:
    """The network of one fold, and what its size is made of."""
    choices = (widths,) if isinstance(widths, int) else widths
    task = case.task(case.folds[number])
    run = PassRun(Path(), 0, Plan(), Silent(), case.module, task)
    quantize = Quantize(weight_bits=choices, size_ratio=share, explain=False)
    return quantize.apply(copy.deepcopy(case.module), task, run), dict(run.findings["mixed"]["chosen"])


def cropped(case: Case, data: Path, samples: int | None) -> Case:
    """The case scored on ten crops of each picture: the corners, the middle, and all of these mirrored.

    Three hundred pictures seen once cannot tell two good roundings apart.
    """
    side, whole_side = case.item.shape[-1], case.item.resize
    assert isinstance(whole_side, int)
    room = whole_side - side
    pictures, targets = whole(replace(case.item, shape=(1, 3, whole_side, whole_side)), PICTURES, data)
    assert targets is not None
    places = [*product((0, room), (0, room)), (room // 2, room // 2)]
    folds = []
    for fold, (_, rows) in zip(case.folds, halves(len(pictures), samples), strict=True):
        both = [np.ascontiguousarray(one) for one in (pictures[rows], pictures[rows][..., ::-1])]
        crops = [one[..., top : top + side, left : left + side] for one in both for top, left in places]
        folds.append(replace(fold, scored=tuple((crop, targets[rows]) for crop in crops)))
    return replace(case, folds=tuple(folds))


def hits(case: Case, tally: Tally) -> list[int]:
    """How many views of each picture are recognized, all folds in turn."""
    right = iter(np.concatenate(tally.this)[:, 0].astype(int))
    found: list[int] = []
    for fold in case.folds:
        views = [list(islice(right, len(images))) for images, _ in fold.scored]
        found += [int(sum(one)) for one in zip(*views, strict=True)]
    return found


def measured(case: Case, widths: int | tuple[int, ...], share: float) -> Row:
    """One row: all folds, each with its own choice."""
    tally, chosen = Tally(case), []
    for number in range(len(case.folds)):
        module, found = rounded(case, number, widths, share)
        chosen.append(found)

        def call(images: Array, module: nn.Module = module) -> Array:
            with torch.no_grad():
                return module(torch.from_numpy(images)).numpy()  # type: ignore[no-any-return]

        tally.add(number, call)
    sizes = {name: round(max(one[name] for one in chosen), 5) for name in ("size_ratio", "stored_ratio")}
    seen = {"views": len(case.folds[0].scored), "hits": " ".join(map(str, hits(case, tally)))}
    return {**tally.result(), **sizes, **seen, "layers": [one["layers"] for one in chosen]}


def run(options: argparse.Namespace, stored: Row) -> None:
    for name in options.networks:
        case = open_case(name, options.data, options.work, options.samples)
        case = cropped(case, options.data, options.samples) if case.item.resize else case
        for widths, size in (kind for kind in KINDS if not options.kinds or kind_of(*kind) in options.kinds):
            key = {"network": name, "kind": kind_of(widths, size)}
            if any(key.items() <= row.items() for row in stored["rows"]):
                continue
            same = [row for row in stored["rows"] if (row["network"], row["kind"]) == (name, f"W{size}")]
            row = {**key, **measured(case, widths, same[0]["size_ratio"] + 5e-6 if same else 1.0)}
            stored["rows"].append(row)
            sys.stdout.write(f"{json.dumps(row)}\n")
            sys.stdout.flush()
            store(options.results, stored)


def store(path: Path, stored: Row) -> None:
    order = [kind_of(*kind) for kind in KINDS]
    stored["rows"].sort(key=lambda row: (NETWORKS.index(row["network"]), order.index(row["kind"])))
    stored["versions"] = versions("torch", "scipy")
    write_text(path, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    if path == STORED:
        write_text(DOCUMENT, document(stored))


def document(stored: Row) -> str:
    """The page."""
    text = (
        "# Bits of each layer\n\nWritten by `python benchmarks/mixed.py` from `benchmarks/results/mixed.json`; do not "
        "edit.\n\nWeights in one width for all layers (*W6*), and with the width of each layer chosen by an integer "
        "programme within the same size (`weight_bits = [8, 6, 5, 4, 3]`, `size_ratio`). Activations stay float; "
        "rounding and bias correction are the defaults. *Size*: bits of all parameters over 32 bits each; *in files*: "
        "where weights lie in 8 or 4 bits. *Layers*: how many have each width (per fold, where there are two). The "
        "rounded networks were computed by PyTorch. Each picture of the ImageNet sample is scored in ten crops "
        "(corners, middle, mirrored), one by one, those of one half by a network calibrated on the other half; *beside "
        "uniform*: points more than one width for all layers at the same size, with the standard error over the "
        "pictures.\n"
    )
    head = ("| network | weights | images | float % | score % | beside uniform | agreement % | SQNR dB | size "
            "| in files | layers |")  # fmt: skip
    lines = [head, "| --- " * 11 + "|", *(_line(row, stored["rows"]) for row in stored["rows"])]
    named = ", ".join(f"{name} {version}" for name, version in sorted(stored["versions"].items()))
    return "\n".join([text, "\n".join(lines) + "\n", f"Versions: {named}.\n"])


def _line(row: Row, rows: list[Row]) -> str:
    found = [", ".join(f"{count} × {bits}" for bits, count in one.items() if count) for one in row["layers"]]
    layers = "; ".join(dict.fromkeys(found))
    seen = f"{row['samples'] // row['views']}" + (f" × {row['views']}" if row["views"] > 1 else "")
    score = f"{row['float_score']:.2f} | {row['score']:.2f} | {_gain(row, rows)}"
    near = f"{row['agreement']:.2f} | {row['sqnr_db']:.1f}"
    size = f"{row['size_ratio']:.4f} | {row['stored_ratio']:.4f}"
    return f"| {TITLES[row['network']]} | {row['kind']} | {seen} | {score} | {near} | {size} | {layers} |"


def _gain(row: Row, rows: list[Row]) -> str:
    """Points over the uniform width of the same size, with their standard error."""
    _, mixed, width = row["kind"].partition(" at the size of ")
    same = [one for one in rows if (one["network"], one["kind"]) == (row["network"], width)]
    if not mixed or not same:
        return ""
    ours, theirs = (np.array(one["hits"].split(), float) for one in (row, same[0]))
    gain = 100 * (ours - theirs) / row["views"]
    return f"{gain.mean():+.2f} ± {gain.std(ddof=1) / math.sqrt(len(gain)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--kinds", nargs="+", choices=[kind_of(*kind) for kind in KINDS], help="only these rows")
    parser.add_argument("--samples", type=int, help="at most this many images, for trying things out")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mixed")
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
