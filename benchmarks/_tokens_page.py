"""The results of ``tokens.py``: stored as JSON, shown as ``docs/tokens.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepack.artifact import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tokens.json"
DOCUMENT = ROOT / "docs" / "tokens.md"
PUBLISHED = {1.0: 4.6, 0.9: 4.0, 0.8: 3.5, 0.7: 3.0, 0.6: 2.6, 0.5: 2.3}  # G, DeiT-S, EViT's own table
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "tflite": "LiteRT"}
Row = Mapping[str, Any]


def store(stage: str, rows: Sequence[Row], key: Sequence[str], facts: Row) -> None:
    """Replace rows of the same key, and write the page."""
    stored: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if rows:
        new = {tuple(row[name] for name in key) for row in rows}
        old = [row for row in stored.get(stage, []) if tuple(row[name] for name in key) not in new]
        stored[stage] = sorted([*old, *rows], key=lambda row: [str(row[name]) for name in key])
        stored["facts"] = facts
    write_text(RESULTS, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    write_text(DOCUMENT, "\n".join(document(stored)) + "\n")


def document(stored: Row) -> Iterator[str]:
    yield "# Fewer tokens: `reorganize`"
    yield ""
    yield (
        "Written by `python benchmarks/tokens.py` from `benchmarks/results/tokens.json`; do not edit. "
        "The method is EViT's (Liang et al., arXiv:2202.07800): cuts behind the attention of three blocks, the "
        "others fused. Nothing here was trained after the cut."
    )
    for stage, lines in (("counts", _counts), ("race", _race), ("accuracy", _accuracy)):
        if stored.get(stage):
            yield ""
            yield from lines(stored)
    if "facts" in stored:
        yield ""
        named = ", ".join(f"{name} {version}" for name, version in stored["facts"]["versions"].items())
        yield f"{stored['facts']['processor']}; {named}."


def _counts(stored: Row) -> Iterator[str]:
    yield "## Tokens and multiply-accumulates"
    yield ""
    yield "Counted while the network runs (PyTorch's counter of operations), beside the formula and EViT's table."
    yield ""
    yield "| network | keep rate | tokens | counted G | formula G | published G |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in sorted(
        stored["counts"], key=lambda row: (row["formula"] > 5e9, row["network"] != "DeiT-S", -row["keep_rate"])
    ):
        published = f"{PUBLISHED[row['keep_rate']]:.1f}" if row["network"] == "DeiT-S" else "–"
        tokens = " → ".join(map(str, dict.fromkeys(row["tokens"])))
        yield (
            f"| {row['network']} | {row['keep_rate']:g} | {tokens} | {row['macs'] / 1e9:.3f} "
            f"| {row['formula'] / 1e9:.3f} | {published} |"
        )


def _fewer(stored: Row) -> str:
    """What the multiply-accumulates alone would allow."""
    macs = {row["keep_rate"]: row["formula"] for row in stored.get("counts", ()) if row["network"] == "DeiT-S"}
    rates = sorted({row["keep_rate"] for row in stored["race"]} & set(macs)) if 1.0 in macs else []
    said = ", ".join(f"{macs[1.0] / macs[rate]:.2f} times at {rate:g}" for rate in rates)
    return f" By MACs alone it would be {said}." if said else ""


def _race(stored: Row) -> Iterator[str]:
    yield "## Latency of DeiT-S"
    yield ""
    yield (
        "How many times as fast as the uncut network in the same form on the same engine, with the 95 % interval; "
        f"each row from one interleaved run (floors of block medians).{_fewer(stored)} Runs marked *contended* or "
        "*not reached* had other work on the machine, or ended before the interval was narrow."
    )
    yield ""
    yield "| engine | form | batch | threads | keep rate | × as fast [95 %] | p50 ms | run |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in stored["race"]:
        yield (
            f"| {NAMES[row['engine']]} | {row['form']} | {row['batch']} | {row['threads']} | {row['keep_rate']:g} "
            f"| {row['faster']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | {row['p50_ms']:.1f} | {row['state']} |"
        )


def _accuracy(stored: Row) -> Iterator[str]:
    yield "## Accuracy of a trained ViT without training"
    yield ""
    samples = stored["accuracy"][0]["samples"]
    yield (
        f"The ViT for CIFAR-10 of the example zoo (65 tokens, cuts in blocks 1, 3 and 4 of 0 … 5), {samples:,} test "
        "images. *Same tokens*: images on which every cut keeps exactly PyTorch's tokens; *largest difference*: of "
        "the logits on those, over the largest logit. Latency: one thread, one image, interleaved, × as fast."
    )
    yield ""
    engines = list(stored["accuracy"][0]["engines"])
    heads = [f"{NAMES[engine]}: top-1, same tokens, largest difference, × as fast" for engine in engines]
    yield f"| keep rate | MACs M | PyTorch top-1 | {' | '.join(heads)} |"
    yield f"{'| --- ' * (3 + len(engines))}|"
    for row in sorted(stored["accuracy"], key=lambda row: -row["keep_rate"]):
        cells = [_engine(row["engines"][engine], engine, row["keep_rate"], stored) for engine in engines]
        yield f"| {row['keep_rate']:g} | {row['macs'] / 1e6:.1f} | {100 * row['top1']:.2f} % | {' | '.join(cells)} |"


def _engine(found: Row, engine: str, rate: float, stored: Row) -> str:
    timed = [row for row in stored.get("race_vit", []) if row["engine"] == engine and row["keep_rate"] == rate]
    ratio = timed[0]["ratio"] if timed else None
    faster = "–" if ratio is None else f"{1 / ratio['value']:.2f} [{1 / ratio['high']:.2f}, {1 / ratio['low']:.2f}]"
    return f"{100 * found['top1']:.2f} %, {100 * found['same_tokens']:.2f} %, {found['max_rel']:.0e}, {faster}"
