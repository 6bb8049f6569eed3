"""docs/c.md from the stored results of c_latency.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepack.artifact import write_text
from edgepack.versions import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "c_latency.json"
DOCUMENT = ROOT / "docs" / "c.md"
PACKAGES = ("onnxruntime", "openvino", "ai-edge-litert")
NAMES = {"digits": "Digits", "resnet20": "ResNet-20", "mobilenet_v1": "MobileNetV1-0.25", "imdn": "IMDN ×2"}
FORMS = {"float": "float32", "static": "8 bits"}
ENGINES = ("ONNX Runtime", "OpenVINO", "TFLite")
FILES = ("onnx", "openvino", "tflite")
Row = Mapping[str, Any]


def store(path: Path, key: Row, found: Row, machine: Row) -> None:
    """Add to a row, and write the page."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    old = next((row for row in stored["rows"] if key.items() <= row.items()), dict(key))
    rows = [row for row in stored["rows"] if row is not old] + [{**old, **found}]
    rows.sort(key=lambda row: (list(NAMES).index(row["network"]), list(FORMS).index(row["form"])))
    stored = {"rows": rows, "versions": versions(*PACKAGES), "machine": machine}
    write_text(path, json.dumps(stored, indent=1, allow_nan=False) + "\n")
    if path == RESULTS:
        write()


def write() -> None:
    write_text(DOCUMENT, document(json.loads(RESULTS.read_text(encoding="utf-8"))))


def document(stored: Row) -> str:
    rows = stored["rows"]
    head = (
        "# Networks as C beside engines\n\nWritten by `python benchmarks/c_latency.py` from "
        "`benchmarks/results/c_latency.json`; do not edit."
    )
    parts = [head, *(text for part in (_speed, _equal, _memory, _sizes, _emulated) if (text := part(rows)))]
    named = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    return "\n\n".join([*parts, f"{stored['machine'].get('processor', 'unknown processor')}; {named}."]) + "\n"


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *lines]) if lines else ""


def _section(title: str, text: str, table: str) -> str:
    return f"## {title}\n\n{text}\n\n{table}" if table else ""


def _names(row: Row) -> list[str]:
    return [NAMES[row["network"]], FORMS[row["form"]]]


def _shape(file: Row) -> str:
    return "×".join(map(str, file["shape"]))


def _speed(rows: Sequence[Row]) -> str:
    def cells() -> Iterator[list[str]]:
        for row in rows:
            engines = {engine["engine"]: engine for engine in row.get("rows", ())}
            if engines:
                ratios = [_ratio(engines.get(name)) for name in ENGINES]
                yield [*_names(row), f"{engines['C']['p50_ms']:.4f}", *ratios, row["state"]]

    text = (
        "Batch 1, one thread, all files of a row interleaved in one process: the time of C over the engine's, below 1 "
        "is faster, with the 95 % interval (floors of block medians); the engine's median in brackets. A run that was "
        "*not reached* ended before its intervals were as narrow as they are asked to be."
    )
    return _section("Latency", text, _table(["network", "form", "C p50 ms", *ENGINES, "run"], cells()))


def _ratio(engine: Row | None) -> str:
    if engine is None:
        return "–"
    if "why" in engine:
        return engine["why"].replace("|", "\\|").replace("\n", " ")  # type: ignore[no-any-return]
    interval = f"[{engine['low']:.3f}, {engine['high']:.3f}]"
    return f"**{engine['c_over_engine']:.3f}** {interval} ({engine['p50_ms']:.4f} ms)"


def _equal(rows: Sequence[Row]) -> str:
    def cells() -> Iterator[list[str]]:
        for row in rows:
            if found := row.get("simulation"):
                integers = "–" if found["otherwise"] is None else f"{found['rounded']}, {found['otherwise']:.2%} differ"
                score = row.get("score")
                said = (
                    f"{score['score']:.3f} dB (PyTorch {score['float_score']:.3f}; {score['samples']} of 5)"
                    if score
                    else "–"
                )
                yield [*_names(row), str(found["samples"]), f"{found['max_rel']:.1e}", integers, said]

    text = (
        "Golden samples against the simulation (PyTorch's operators; for integers the exact arithmetic of the format): "
        "largest difference over the largest value, and how many rounded values were compared one by one."
    )
    if any(row["network"] == "imdn" for row in rows):
        text += " IMDN: one file for each size of Set5's pictures, scored in PSNR of the luma."
    heads = ["network", "form", "samples", "largest difference", "rounded values compared", "score"]
    return _section("Equal to the simulation", text, _table(heads, cells()))


def _memory(rows: Sequence[Row]) -> str:
    def cells() -> Iterator[list[str]]:
        for row in rows:
            name, form = _names(row)
            for file in row.get("files", [row]):
                if (ours := file.get("arena_bytes")) is not None:
                    theirs = file.get("tflite_arena_bytes")
                    beside = ["–", "–"] if theirs is None else [f"{theirs:,}", f"{ours / theirs:.2f}"]
                    yield [f"{name}, {_shape(file)}" if "shape" in file else name, form, f"{ours:,}", *beside]

    text = (
        "Bytes of the arena that inner values take. The caller holds inputs and outputs of C; TFLite's arena has them "
        "inside. Its figure: addresses on which LiteRT's interpreter placed everything that is not constant, with the "
        "interpreter's own kernels (XNNPACK keeps memory of its own)."
    )
    return _section("Memory", text, _table(["network", "form", "C", "TFLite", "C ÷ TFLite"], cells()))


def _sizes(rows: Sequence[Row]) -> str:
    def cells() -> Iterator[list[str]]:
        for row in rows:
            if sizes := row.get("size_bytes"):
                files = [f"{sizes[name]:,}" if name in sizes else "–" for name in FILES]
                ratio = f"{sizes['c'] / row['float_bytes']:.3f}"
                yield [
                    *_names(row),
                    f"{sizes['c']:,}",
                    ratio,
                    f"{row['constants_bytes']:,}",
                    f"{row['text_bytes']:,}",
                    *files,
                ]
            for file in row.get("files", ()):
                name, form = _names(row)
                size, ratio = f"{file['size_bytes']:,}", f"{file['size_bytes'] / row['float_bytes']:.3f}"
                yield [f"{name}, {_shape(file)}", form, size, ratio, *["–"] * 5]

    text = (
        "C: machine code (x86-64: plain, AVX2 and AVX-512 side by side) and constants that an application carries, "
        "kernels it never reaches left out by the linker; of it, constants; beside it, the source text. "
        "*÷ float*: over four bytes per parameter. Engines come on top of their files."
    )
    heads = ["network", "form", "C bytes", "÷ float", "constants", "source text", "ONNX", "OpenVINO", "TFLite"]
    return _section("Size", text, _table(heads, cells()))


def _emulated(rows: Sequence[Row]) -> str:
    def cells() -> Iterator[list[str]]:
        for row in rows:
            found = row.get("emulated", ())
            plain = next((item.get("instructions") for item in found), None)
            for item in found:
                if "why" in item:
                    yield [*_names(row), item["processor"], item["why"], "–", "–", "–"]
                    continue
                said = f"{'passed' if item['passed'] else 'FAILED'} ({item['max_rel']:.1e})"
                arm64 = item["processor"].startswith("arm64") and plain
                ratio = f"{item['instructions'] / plain:.3f}" if arm64 else "–"
                yield [
                    *_names(row),
                    item["processor"],
                    said,
                    f"{item['instructions']:,}",
                    ratio,
                    f"{item['size_bytes']:,}",
                ]

    text = (
        "**Emulated**, not measured on hardware: the self-test and the instructions of one call under QEMU (user mode "
        "for arm64, MPS2 boards for Cortex-M, built as in `examples/c/cortex-m`). Counts repeat exactly; a vector "
        "instruction counts as one, and memory costs nothing. *÷ plain*: over plain C on arm64. Bytes: code and "
        "constants."
    )
    heads = ["network", "form", "processor", "self-test (largest difference)", "instructions", "÷ plain", "bytes"]
    return _section("Other processors", text, _table(heads, cells()))
