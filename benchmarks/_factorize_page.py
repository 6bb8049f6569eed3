"""The results of ``factorize.py``: stored as JSON, shown as ``docs/factorize.md``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from _stored import Results, Row

NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def document(stored: Row) -> str:
    return "\n".join(_lines(stored)) + "\n"


def _lines(stored: Row) -> Iterator[str]:
    yield "# Factored layers: `factorize`"
    yield ""
    yield (
        "Written by `python benchmarks/factorize.py` from `benchmarks/results/factorize.json`; do not edit. Layers "
        "become chains of smaller ones (Tucker-2, spatial and channel SVD). Every form of every layer is timed on the "
        "engine before one is chosen; the choice keeps the budget with the least error that any choice has."
    )
    for stage, lines in (("race", _race), ("accuracy", _accuracy), ("race_int8", _int8), ("choice", _choice)):
        if stored.get(stage):
            yield ""
            yield from lines(stored)
    yield ""
    named = ", ".join(f"{name} {version}" for name, version in stored["facts"]["versions"].items())
    yield f"{stored['facts']['processor']}; {named}."


def _titles(stored: Row) -> dict[str, str]:
    return {row["network"]: row["title"] for row in stored["choice"]}


def _faster(ratio: Row) -> str:
    return f"{1 / ratio['value']:.3f} [{1 / ratio['high']:.3f}, {1 / ratio['low']:.3f}]"


def _race(stored: Row) -> Iterator[str]:
    choices = {row["network"]: row for row in stored["choice"]}
    yield "## Latency"
    yield ""
    yield (
        "Whole networks, float32 where the name does not say 8 bits, one thread, one image, interleaved; *× as fast* "
        "as the dense network with the 95 % interval. In 8 bits a layer stays dense unless half the rank of it is "
        "faster there. *Predicted* adds up the times of single layers. *By energy*: Tucker ranks that keep one share "
        "of the singular values' energy in every layer, chosen so that the network has as many multiply-accumulates, "
        "untimed."
    )
    yield ""
    yield ("| network | engine | MACs | parameters | × as fast [95 %] | predicted | ms dense → factored "
           "| by energy: × as fast | factored over by energy: × as fast |")  # fmt: skip
    yield "| --- " * 9 + "|"
    for row in stored["race"]:
        found = choices[row["network"]]
        share = [found[name][1] / found[name][0] for name in ("macs", "parameters")]
        predicted = 1 / found["targets"][row["target"]]["predicted"]
        yield (
            f"| {found['title']} | {NAMES[row['target']]} | {share[0]:.3f} | {share[1]:.3f} | {_faster(row['ratio'])} "
            f"| {predicted:.3f} | {row['ms'][0]:.3f} → {row['ms'][2]:.3f} | {_faster(row['by_energy'])} "
            f"| {_faster(row['over_by_energy'])} |"
        )


def _accuracy(stored: Row) -> Iterator[str]:
    yield "## Accuracy"
    yield ""
    yield (
        "Top-1 on the test images, none of which took part in any choice. The teacher is the dense network. Seconds "
        "are of a machine with other work on it, one thread."
    )
    yield ""
    yield "| network | images | dense | factored | trained | lost | training |"
    yield "| --- " * 7 + "|"
    for row in stored["accuracy"]:
        yield (
            f"| {_titles(stored)[row['network']]} | {row['samples']:,} | {100 * row['original']:.2f} % "
            f"| {100 * row['factored']:.2f} % | {100 * row['trained']:.2f} % "
            f"| {100 * (row['original'] - row['trained']):.2f} points "
            f"| {row['settings']['epochs']} epochs of {row['images']:,} images, {row['seconds']:.0f} s |"
        )


def _int8(stored: Row) -> Iterator[str]:
    yield "## In eight bits"
    yield ""
    yield (
        "The network factored for float32 in 8 bits beside the dense one in 8 bits, interleaved as above. Forms that "
        'are faster in float32 need not be in 8 bits: with `precision = "int8"` the pass times them there, and '
        "factors only the layers that gain (rows *in 8 bits* under *Latency*)."
    )
    yield ""
    yield "| network | engine | dense ms | factored ms | × as fast [95 %] |"
    yield "| --- " * 5 + "|"
    for row in stored["race_int8"]:
        yield (
            f"| {_titles(stored)[row['network']]} | {NAMES[row['target']]} | {row['ms'][0]:.3f} | {row['ms'][1]:.3f} "
            f"| {_faster(row['ratio'])} |"
        )
    for row in stored["choice"]:
        if not any(len(layer["ranks"]) for layer in row["layers"]):
            yield ""
            yield f"{row['title']}: nothing was factored, for no layer is faster by it (times are below)."


def _choice(stored: Row) -> Iterator[str]:
    yield "## Layer by layer"
    yield ""
    yield (
        "*Error*: squared distance of the results from those of the dense layer over their square, on calibration "
        "images (noise for random weights), before training. Microseconds of the layer alone, dense → chosen; what an "
        "engine spends around a call is in both."
    )
    for choice in stored["choice"]:
        targets, rivals = (
            sorted({name for row in choice["layers"] for name in row["ms"]}),
            choice.get("by_energy", {"layers": {}})["layers"],
        )
        yield ""
        yield f"### {choice['title']}"
        yield ""
        yield f"| layer | form | error | {' | '.join(f'{NAMES[name]} µs' for name in targets)} | by energy |"
        yield "| --- " * (4 + len(targets)) + "|"
        for row in choice["layers"]:
            times = [_times(row["ms"].get(name)) for name in targets]
            form = row["form"] if row["form"] != "dense" else f"dense: {row['why']}"
            ranks = "×".join(map(str, row["ranks"]))
            yield (f"| {row['layer']} | {form} {ranks} | {row['error']:.4f} | {' | '.join(times)} "
                   f"| {rivals.get(row['layer'], '–')} |")  # fmt: skip


def _times(pair: Any) -> str:
    return "–" if pair is None else f"{1e3 * pair[0]:.0f} → {1e3 * pair[1]:.0f}"


RESULTS = Results.of("factorize", document, "network", "target", "form")
