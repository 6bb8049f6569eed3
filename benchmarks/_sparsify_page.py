"""The results of ``sparsify.py``: stored as JSON, shown as ``docs/sparsify.md``."""

from __future__ import annotations

from collections.abc import Iterator

from _stored import Results, Row


def document(stored: Row) -> str:
    return "\n".join(_lines(stored)) + "\n"


def _lines(stored: Row) -> Iterator[str]:
    yield "# Zeros in weights: `sparsify`"
    yield ""
    yield (
        "Written by `python benchmarks/sparsify.py` from `benchmarks/results/sparsify.json`; do not edit. Zeros are "
        "chosen, and the other weights moved, by what each layer reads on calibration images; *by magnitude*: the "
        "smallest go and the others stay."
    )
    if stored.get("rows"):
        yield ""
        yield from _accuracy(stored["rows"])
    if stored.get("calls"):
        yield ""
        yield from _calls(stored["calls"])
    if stored.get("race"):
        yield ""
        yield from _race(stored["race"])
    if stored.get("openvino"):
        yield ""
        yield from _openvino(stored["openvino"])
    if stored.get("sizes"):
        yield ""
        yield from _sizes(stored["sizes"])
    yield ""
    named = ", ".join(f"{name} {version}" for name, version in stored["facts"]["versions"].items())
    yield f"{stored['facts']['processor']}; {named}."


def _accuracy(rows: list[Row]) -> Iterator[str]:
    yield "## Accuracy"
    yield ""
    yield (
        "ResNet-32 on CIFAR-10, top-1 on the test images, none of which took part in any choice. The teacher is the "
        "dense network, whose answers are followed, and where it says so its inner results. Seconds are of a machine "
        "with other work on it, one thread. A row without "
        "training is what the pass alone leaves."
    )
    yield ""
    yield "| zeros | of all weights | images | dense | before training | trained | lost | training |"
    yield "| --- " * 8 + "|"
    for row in rows:
        before = f"{100 * row['before']:.2f} %" if "before" in row else "zeros grow in training"
        after = row["after"] if "after" in row else row["before"]
        yield (
            f"| {row['row']} | {100 * row['zeros'] / row['weights']:.1f} % | {row['samples']:,} "
            f"| {100 * row['original']:.2f} % | {before} "
            f"| {f'{100 * after:.2f} %' if 'after' in row else 'none'} | {100 * (row['original'] - after):.2f} points "
            f"| {_training(row)} |"
        )


def _training(row: Row) -> str:
    if "settings" not in row:
        return "none"
    inner = " (inner results too)" if row["settings"]["features"] else ""
    return f"{row['settings']['epochs']} epochs of {row['images']:,} images{inner}, {row['seconds']:.0f} s"


def _calls(rows: list[Row]) -> Iterator[str]:
    yield "## TFLite: instructions of a call"
    yield ""
    yield (
        "MobileNetV1, 224 × 224, random weights, zeros in its 1×1 convolutions and its classifier; LiteRT's C library "
        "under QEMU, one call, one thread. XNNPACK computes 1×1 convolutions from their non-zero weights alone on ARM "
        "and on x86 without AVX; **on x86 with AVX nothing is faster: XNNPACK turns that off.** A count of "
        "instructions is no time. 1x2, 1x4: two or four output channels are zero together, for which XNNPACK has "
        "kernels of their own on arm64 and none on x86. On arm64 single zeros are not enough for a factor of 2.5 at "
        f"80 %, and blocks of two are the best.{''.join(_rest(rows))}"
    )
    yield ""
    yield "| processor | zeros | dense | sparse | × fewer | file, of the dense one |"
    yield "| --- " * 6 + "|"
    for row in rows:
        dense, sparse = (row["instructions"][word] for word in ("dense", "sparse"))
        share = row["bytes"]["sparse"] / row["bytes"]["dense"]
        yield (
            f"| {row['processor']} | {100 * row['share']:.0f} %, {row['pattern']} | {dense / 1e6:.1f} M "
            f"| {sparse / 1e6:.1f} M | {dense / sparse:.2f} | {share:.3f} |"
        )


def _rest(rows: list[Row]) -> Iterator[str]:
    """What other layers take: a straight line through two shares of single zeros, where all are zero."""
    for processor in dict.fromkeys(row["processor"] for row in rows):
        found = {row["share"]: row["instructions"]["sparse"] for row in rows
                 if row["processor"] == processor and row["pattern"] == "unstructured"}  # fmt: skip
        if len(found) > 1:
            low, high = min(found), max(found)
            rest = found[high] - (found[low] - found[high]) * (1 - high) / (high - low)
            yield f" {processor}: about {rest / 1e6:.0f} M of the sparse file's are not those of non-zero weights."


def _sizes(rows: list[Row]) -> Iterator[str]:
    yield "## Sizes of files"
    yield ""
    yield (
        "ResNet-32, float32, of the dense network's file. TFLite and Core ML store what is not zero; the others store "
        "zeros and compute with them: they are smaller only where something compresses the file on its way."
    )
    yield ""
    yield "| format | zeros | dense, bytes | sparse | dense, gzip | sparse, gzip | sparse over dense, gzip over gzip |"
    yield "| --- " * 7 + "|"
    for row in rows:
        dense, sparse = row["dense"], row["sparse"]
        yield (
            f"| {row['target']} | {row['network']} | {dense['bytes']:,} | {sparse['bytes']:,} | {dense['gzip']:,} "
            f"| {sparse['gzip']:,} | {sparse['bytes'] / dense['bytes']:.3f}, {sparse['gzip'] / dense['gzip']:.3f} |"
        )


def _openvino(rows: list[Row]) -> Iterator[str]:
    yield "## OpenVINO's own sparse weights"
    yield ""
    yield (
        "Six products of 16 rows with weights of 1024 × 1024 in 8 bits, one thread, interleaved. "
        "`CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE` is the share of zeros from which OpenVINO unpacks weights on the way. "
        "It does so on processors with AMX alone, for matrix products in 8 bits; this one has none: "
        "**not faster here, because the property is ignored.** The kernel is the same in every row, so edgepack does "
        "not offer it."
    )
    yield ""
    yield "| zeros | asked for from | ms, median | calls | kernel |"
    yield "| --- " * 5 + "|"
    for row in rows:
        asked = "never" if row["rate"] >= 1 else f"{100 * row['rate']:.0f} %"
        kernels = ", ".join(row["kernels"])
        yield f"| {100 * row['zeros']:.0f} % | {asked} | {row['ms']:.3f} | {row['calls']:,} | {kernels} |"


def _race(rows: list[Row]) -> Iterator[str]:
    yield "## Latency on x86 with AVX"
    yield ""
    yield (
        "ResNet-32, float32, one image, one thread, dense and sparse interleaved; *time* is of the sparse network over "
        "that of the dense one with the 95 % interval."
    )
    yield ""
    yield "| engine of | zeros | dense, ms | sparse, ms | time | verdict |"
    yield "| --- " * 6 + "|"
    for row in rows:
        ratio = row["ratio"]
        word = f"faster by {1 - ratio['value']:.0%}" if ratio["verdict"] == "faster" else "not faster: computed densely"
        yield (
            f"| {row['target']} | {row['network']} | {row['ms'][0]:.3f} | {row['ms'][1]:.3f} "
            f"| {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] | {word} |"
        )


RESULTS = Results.of("sparsify", document, "row")
