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
TINY = 0.0005  # of the time: what the uncut network spends on it is nothing
SHOWN = 0.003  # of the time: smaller kinds of operators are one row
MOST = 4  # operators that are named
Row = Mapping[str, Any]


def store(stage: str, rows: Sequence[Row], key: Sequence[str], facts: Row) -> None:
    """Replace rows of the same key, and write the page."""
    stored: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if rows:

        def named(row: Row) -> list[str]:
            return [str(row.get(name)) for name in key]

        new = [named(row) for row in rows]
        old = [row for row in stored.get(stage, []) if named(row) not in new]
        stored[stage] = sorted([*old, *rows], key=named)
        stored["facts"] = facts
    write_text(RESULTS, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    write_text(DOCUMENT, "\n".join(document(stored)) + "\n")


def document(stored: Row) -> Iterator[str]:
    yield "# Fewer tokens: `reorganize`"
    yield ""
    yield (
        "Written by `python benchmarks/tokens.py` from `benchmarks/results/tokens.json`; do not edit. "
        "The method is EViT's (Liang et al., arXiv:2202.07800): cuts behind the attention of three blocks, the "
        "others fused. Nothing was trained after the cut where it does not say so."
    )
    for stage, lines in SECTIONS.items():
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


def _equal(stored: Row) -> Iterator[str]:
    yield "## More tokens at equal cost"
    yield ""
    yield (
        "DeiT-S on larger images, positions interpolated (`interpolate = true` in `[model]`), and the keep rate that "
        "`cost_of = 224` finds: no more multiply-accumulates than uncut on 224 × 224. Weights are random; what it is "
        "worth in accuracy was not measured."
    )
    yield ""
    yield "| image | keep rate | tokens | uncut G | cut G | ÷ uncut on 224 × 224 |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in stored["equal"]:
        tokens = " → ".join(map(str, row["tokens"]))
        yield (
            f"| {row['side']} × {row['side']} | {row['keep_rate']:g} | {tokens} | {row['uncut'] / 1e9:.3f} "
            f"| {row['macs'] / 1e9:.3f} | {row['macs'] / row['small']:.3f} |"
        )


def _explain(stored: Row) -> Iterator[str]:
    yield "## Where the time goes"
    yield ""
    runs = stored["explain"][0]["runs"]
    yield (
        f"One image, one thread, float32, by the engine's own clock: medians of {runs} runs of every operator, uncut "
        "and cut in turns, added up by kind. *Beyond the MACs*: what the cut network takes more than the uncut one's "
        "time times the share of multiply-accumulates that is left; these add up to what is lost against the ratio of "
        "MACs. The clock itself costs time, so the sums are a little longer than latencies. LiteRT's Python package "
        "shows no times of operators."
    )
    for row in stored["explain"]:
        yield from _clocked(row, _macs_left(stored, row))


def _clocked(row: Row, left: float) -> Iterator[str]:
    whole, fewer = (sum(times[side] for times in row["operators"].values()) for side in (0, 1))
    new = {kind: after for kind, (before, after) in row["operators"].items() if before < TINY * whole}
    most = ", ".join(f"{kind} {new[kind]:.2f}" for kind in sorted(new, key=lambda kind: -new[kind])[:MOST])
    yield ""
    yield (
        f"{row['network']}, {NAMES[row['engine']]}, keep rate {row['keep_rate']:g}: {whole:.1f} → {fewer:.1f} ms, "
        f"{whole / fewer:.2f} times as fast where the MACs allow {1 / left:.2f}. Operators that the uncut network "
        f"has (almost) none of, which rank, choose and join tokens, take {sum(new.values()):.2f} ms, "
        f"{100 * sum(new.values()) / fewer:.1f} % of the time ({most})."
    )
    yield ""
    yield "| operators | uncut ms | cut ms | cut ÷ uncut | beyond the MACs, ms |"
    yield "| --- | --- | --- | --- | --- |"
    shown = {kind: times for kind, times in row["operators"].items() if max(times) >= SHOWN * fewer}
    others = [sum(times[side] for kind, times in row["operators"].items() if kind not in shown) for side in (0, 1)]
    for kind, (before, after) in {**shown, "all others": others, "sum": (whole, fewer)}.items():
        ratio = f"{after / before:.3f}" if before >= TINY * whole else "–"
        yield f"| {kind} | {before:.2f} | {after:.2f} | {ratio} | {after - left * before:+.2f} |"


def _macs_left(stored: Row, row: Row) -> float:
    """The share of a network's multiply-accumulates that a keep rate leaves."""
    counted = [one for one in stored.get("counts", ()) if one["network"] == row["network"]]
    macs = {one["keep_rate"]: one["macs"] for one in counted or stored["accuracy"]}  # the ViT's are beside its score
    return float(macs[row["keep_rate"]] / macs[1.0])


def _tuned(stored: Row) -> Iterator[str]:
    yield "## Accuracy of the ViT trained after the cut"
    yield ""
    first = stored["tuned"][0]
    used = first["settings"]
    rates = {
        f"{one['settings']['lr']:g} in {one['settings'].get('precision', 'float32')} for {one['epochs']} epochs": None
        for one in sorted(stored["tuned"], key=lambda row: row["epochs"])
    }
    yield (
        f"The same ViT trained by the pass (`tune`): {first['images']:,} training images, {used['optimizer']}, "
        f"learning rate {', '.join(rates)}, batches of {used['batch']}, crops and flips, labels and the uncut "
        f"original as teacher ({used['share']:g} of the loss); the keep rate falls from 1 during the first "
        f"{first['shrink']:g} of the training. *Uncut* is the network at keep rate 1 on the same schedule. The epoch "
        f"was chosen on held-out training images; {first['samples']:,} test images. 8 bits: `quantize` on the trained "
        "network, real files in their engines. × as fast: the float file over the uncut float file, one thread, one "
        "image, interleaved; †: with other work on the machine, or ended before the interval was narrow. "
        "Seconds of training are of a machine with much other work. A dash: not run."
    )
    yield ""
    engines = list(NAMES)
    yield (
        "| epochs | keep rate | cuts in blocks | MACs M | untrained | trained | points below uncut | "
        f"{' | '.join(f'8 bits, {NAMES[engine]}' for engine in engines)} "
        f"| {' | '.join(f'× as fast, {NAMES[engine]}' for engine in engines)} | training |"
    )
    yield f"{'| --- ' * (8 + 2 * len(engines))}|"
    for row in sorted(stored["tuned"], key=lambda row: (row["epochs"], -row["keep_rate"], row.get("blocks") or [])):
        yield _trained(row, stored, engines)


def _trained(row: Row, stored: Row, engines: Sequence[str]) -> str:
    rate, epochs, blocks = row["keep_rate"], row["epochs"], row.get("blocks")
    uncut = [one["top1"] for one in stored["tuned"] if (one["keep_rate"], one["epochs"]) == (1.0, epochs)]
    before = [one["top1"] for one in stored.get("accuracy", ()) if one["keep_rate"] == rate]
    before = [row["untrained"]] if "untrained" in row else before
    eight = {
        one["engine"]: one["top1"]
        for one in stored.get("integer", ())
        if (one["keep_rate"], one["epochs"], one.get("blocks")) == (rate, epochs, blocks)
    }
    places = ", ".join(map(str, blocks or (1, 3, 4))) if rate < 1 else "–"
    cells = [
        places,
        f"{row['macs'] / 1e6:.1f}" if "macs" in row else "–",
        f"{100 * before[0]:.2f} %" if before else "–",
        f"{100 * row['top1']:.2f} %",
        f"{100 * (uncut[0] - row['top1']):.2f}" if uncut and rate < 1 else "–",
        *(f"{100 * eight[engine]:.2f} %" if engine in eight else "–" for engine in engines),
        *(_faster(engine, rate, stored, blocks) for engine in engines),
        f"{row['seconds']:.0f} s",
    ]
    return f"| {epochs} | {rate:g} | {' | '.join(cells)} |"


def _accuracy(stored: Row) -> Iterator[str]:
    yield "## Accuracy of a trained ViT without training"
    yield ""
    samples = stored["accuracy"][0]["samples"]
    yield (
        f"The ViT for CIFAR-10 of the example zoo (65 tokens, cuts in blocks 1, 3 and 4 of 0 … 5), {samples:,} test "
        "images. *Same tokens*: images on which every cut keeps exactly PyTorch's tokens; *largest difference*: of "
        "the logits on those, over the largest logit. Latency: one thread, one image, interleaved, × as "
        "fast; †: with other work on the machine, or ended before the interval was narrow."
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
    faster = _faster(engine, rate, stored)
    return f"{100 * found['top1']:.2f} %, {100 * found['same_tokens']:.2f} %, {found['max_rel']:.0e}, {faster}"


def _faster(engine: str, rate: float, stored: Row, blocks: Sequence[int] | None = None) -> str:
    wanted = (engine, rate, blocks)
    timed = [row for row in stored.get("race_vit", ())
             if (row["engine"], row["keep_rate"], row.get("blocks")) == wanted]  # fmt: skip
    ratio = timed[0]["ratio"] if timed else None
    if ratio is None:
        return "–"
    mark = "" if timed[0]["state"] == "settled" else " †"
    return f"{1 / ratio['value']:.2f} [{1 / ratio['high']:.2f}, {1 / ratio['low']:.2f}]{mark}"


SECTIONS = {
    "counts": _counts,
    "race": _race,
    "explain": _explain,
    "accuracy": _accuracy,
    "tuned": _tuned,
    "equal": _equal,
}
