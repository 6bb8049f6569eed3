"""The results of ``binary.py``: stored as JSON, shown as ``docs/binary.md``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from _stored import Results, Row

LEVELS = {2: "AVX-512", 1: "AVX2"}
MODELS = {2: "avx512", 1: "avx2"}
NAMES = {"float": "float", "plain": "binary", "tree": "binary, tree term"}


def document(stored: Row) -> str:
    head = (
        "# Binary networks\n\nWritten by `python benchmarks/binary.py` from `benchmarks/results/binary.json`; do not "
        "edit. Layers of ±1 in the C target: every output by itself (XNOR and popcount), or as differences along the "
        "spanning tree of the outputs."
    )
    parts = (("networks", _networks), ("projected", _projected), ("race", _race), ("kernels", _kernels))
    texts = [text for key, part in parts if stored.get(key) for text in part(stored[key])]
    named = ", ".join(f"{name} {version}" for name, version in stored["facts"]["versions"].items())
    return "\n\n".join([head, *texts, f"{stored['facts']['processor']}; {named}."]) + "\n"


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *lines])


def _networks(rows: Sequence[Row]) -> Iterator[str]:
    yield "## What the tree term saves"
    yield (
        "A small ResNet (stem of stride 2, two blocks, 64 and 128 channels) on the 10,000 training images of "
        "Fashion-MNIST, scored on the 3,000 others; its four 3×3 layers behind the stem are binary: "
        f"{_dense(rows) / 1e6:.1f} M multiply-adds. Both binary networks "
        "start from the float one, which teaches them, and are trained on the same schedule; the last epoch is taken, "
        "nothing was chosen on the test images. Bit operations: XNORs of the binary layers, each output by itself ÷ "
        "along the tree."
    )

    def cells() -> Iterator[list[str]]:
        for row in rows:
            trees = row.get("trees")
            words = [NAMES[row["network"]], f"{row['accuracy']:.2%}", str(row["samples"])]
            if trees is None:
                yield [*words, "–", "–", "–", "–"]
                continue
            dense, tree = trees["dense_operations"], trees["tree_operations"]
            yield [*words, f"{trees['weights']:,}", f"{trees['stored_bits'] / trees['weights']:.3f}",
                   f"{tree / 1e6:.2f} M", f"{dense / tree:.2f}"]  # fmt: skip

    heads = [
        "network",
        "top-1",
        "images",
        "binary weights",
        "bits per weight",
        "bit operations along the tree",
        "÷ without it",
    ]
    yield _table(heads, cells())
    found = {row["network"]: row for row in rows}
    if {"plain", "tree"} <= set(found):
        plain, tree = found["plain"], found["tree"]
        ratios = [plain["trees"][key] / tree["trees"][key] for key in ("tree_operations", "stored_bits")]
        lost = plain["accuracy"] - tree["accuracy"]
        yield (
            f"With the term: **{ratios[0]:.2f} times** fewer bit operations than the plain network's own tree needs, "
            f"**{ratios[1]:.2f} times** fewer stored bits, {100 * lost:+.2f} points lost."
        )
        yield _table(["layer", "density", "with the term", "depth", "bits per weight, stored as"], _layers(plain, tree))


def _dense(rows: Sequence[Row]) -> int:
    return next(int(row["trees"]["dense_operations"]) for row in rows if "trees" in row)


def _layers(plain: Row, tree: Row) -> Iterator[list[str]]:
    for name, one in plain["trees"]["layers"].items():
        two = tree["trees"]["layers"][name]
        stored = [f"{row['stored_bits'] / row['weights']:.3f} ({row['stored_as']})" for row in (one, two)]
        yield [name, f"{one['density']:.3f}", f"{two['density']:.3f}", f"{one['tree_depth']} → {two['tree_depth']}",
               " → ".join(stored)]  # fmt: skip


def _projected(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Trees shortened after training"
    yield (
        "The binary network without the term; in each child the smallest of the latent weights that differ from its "
        "parent are flipped, batch norms get their statistics anew, nothing is trained."
    )
    yield _table(
        ["share of the differing weights", "top-1", "bits per weight", "bit operations ÷ without a tree"],
        ([f"{row['share']:g}", f"{row['accuracy']:.2%}", f"{row['bits']:.3f}", f"{row['saved']:.2f}"] for row in rows),
    )


def _race(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Whole networks"
    yield (
        "Batch 1, one thread, all files interleaved in one process; floors of block medians with the 95 % interval "
        "of the ratio. ONNX Runtime computes the float network of the same architecture; *packed*: the binary layers "
        "as edgepack's operator, a bit per weight, each reading and giving floats."
    )
    yield _table(
        ["file", "ms", "÷ the first", "bytes"],
        ([row["file"], f"{row['ms']:.4f}", "1" if row["ratio"] is None else _interval(row["ratio"]),
          f"{row['bytes']:,}"] for row in rows),
    )  # fmt: skip


def _interval(ratio: Row) -> str:
    return f"**{ratio['value']:.3f}** [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _kernels(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Single layers"
    yield (
        "Whole layers from packed bits to packed bits with thresholds, one thread; *pack*: floats to bits before it. "
        "Least of some hundred calls. *T/s*: XNORs per second, an XNOR and its count being one operation. *chosen*: "
        "what the cost model takes, its time over the better one's. ONNX Runtime computes the same convolution alone."
    )

    def cells() -> Iterator[list[str]]:
        for row in rows:
            for level in (2, 1):
                pack, plain, tree, _ = row["ns"][str(level)]
                costs = row["model_ns"][MODELS[level]]
                chosen = 1 if costs[1] < costs[0] else 0
                loss = (plain, tree)[chosen] / min(plain, tree)
                engines = row.get("engines") if level == 2 else None
                beside = (
                    "–"
                    if engines is None
                    else " / ".join(f"{1e3 * engines[name] / (pack + plain):.1f}" for name in ("float32", "int8"))
                )
                yield [row["shape"], f"{row['density']:.3f}", LEVELS[level], f"{pack / 1e3:.2f}",
                       f"{plain / 1e3:.2f} ({row['operations'] / plain / 1e3:.2f} T/s)", f"{tree / 1e3:.2f}",
                       f"**{plain / tree:.2f}**", f"{('xnor', 'tree')[chosen]} ({loss:.2f})", beside]  # fmt: skip

    heads = ["layer", "tree density", "level", "pack µs", "XNOR µs", "tree µs", "XNOR ÷ tree", "chosen",
             "ONNX Runtime float32 / int8 ÷ (pack + XNOR)"]  # fmt: skip
    yield _table(heads, cells())


RESULTS = Results.of("binary", document)
