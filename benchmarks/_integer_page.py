"""docs/integer.md from the stored results of integer_accuracy.py and integer_latency.py."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from edgepack.artifact import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ACCURACY, LATENCY = RESULTS / "integer_accuracy.json", RESULTS / "integer_latency.json"
DOCUMENT = ROOT / "docs" / "integer.md"
TITLES = {
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet32": "ResNet-32, CIFAR-10",
    "vit": "ViT, CIFAR-10",
    "mobilenet_v1": "MobileNetV1-0.25, ImageNet sample",
    "mobilenet_v2": "MobileNetV2, ImageNet sample",
    "imdn": "IMDN ×2, Set5",
    "mobilenet_v2-random": "MobileNetV2, random weights",
}
ENGINES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "tflite": "TFLite", "coreml": "Core ML", "torch": "PyTorch"}
HEAD = (
    "# Eight bits beside the engines' own tools\n\nWritten by `python benchmarks/integer_accuracy.py` and "
    "`python benchmarks/integer_latency.py` from `benchmarks/results/integer_*.json`; do not edit.\n"
)
Row = Mapping[str, Any]


def store(path: Path, rows: Sequence[Row], networks: Sequence[str], formats: Sequence[str], **facts: Any) -> None:
    """Rows in the order of networks and engines, edgepack's first; the page with them."""

    def place(row: Row) -> tuple[int, int, bool, str]:
        return networks.index(row["network"]), formats.index(row["format"]), not mine(row), row["tool"]

    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    data = {"rows": sorted(rows, key=place), "machine": machine, **facts}
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
    if path in (ACCURACY, LATENCY):
        write()


def mine(row: Row) -> bool:
    return str(row["tool"]).startswith("edgepack")


def line(row: Row) -> str:
    """One row for the terminal."""
    facts = {key: value for key, value in row.items() if key not in ("network", "made_from", "versions")}
    return json.dumps(facts)


def write() -> None:
    accuracy, latency = (json.loads(p.read_text()) if p.exists() else None for p in (ACCURACY, LATENCY))
    write_text(DOCUMENT, document(accuracy, latency))


def document(accuracy: Row | None, latency: Row | None) -> str:
    parts = [HEAD]
    if accuracy is not None:
        parts.append(_accuracy(accuracy))
    if latency is not None:
        parts.append(_latency(latency))
    return "\n".join(parts)


def _accuracy(data: Row) -> str:
    text = (
        "## Accuracy\n\nEvery file of a table was made from the same float network and the same calibration samples, "
        "and judged on the same images in its own engine (PyTorch: the tool's own simulation; Core ML: interpreted). "
        "*Lost*: points of top-1, or dB. *Agreement*: images with the float network's first class. *SQNR*: of the "
        "outputs, against the float network's. *Size*: of the model files over four bytes per parameter (OpenVINO: "
        "also its `.bin` alone). ImageNet sample: one half of the images calibrates and the other is scored, then the "
        "other way round. **edgepack** with its defaults.\n"
    )
    return "\n".join([text, *(_network(name, list(rows)) for name, rows in groupby(data["rows"], _name)), _luck(data)])


def _luck(data: Row) -> str:
    """Where a tool's file gets more images right than edgepack's best in the same engine, and whether that can be luck.

    Files that keep the float network's class on shares a and b of n images differ on at most D = n(1 - a) + n(1 - b),
    so that the difference of their right answers has a standard deviation of at most √D.
    """
    lines = []
    for _, group in groupby(data["rows"], lambda row: (row["network"], row["format"])):
        rows = [row for row in group if row.get("agreement") is not None]
        ours = max((row for row in rows if mine(row)), key=lambda row: row["score"], default=None)
        if ours is None:
            continue
        for row in rows:
            if mine(row) or row["score"] <= ours["score"] or row["samples"] != ours["samples"]:
                continue
            count = row["samples"]
            more = round(count * (row["score"] - ours["score"]) / 100)
            apart = round(sum(count * (100 - one["agreement"]) / 100 for one in (row, ours)))
            verdict = "within chance" if more <= 2 * apart**0.5 else "more than chance"
            lines.append(f"| {TITLES[row['network']]} | {ENGINES[row['format']]} | {row['tool']} | {more} of {count} "
                         f"| {apart} | {2 * apart**0.5:.0f} | {verdict} |")  # fmt: skip
    text = (
        "### Where a tool's file scores higher\n\nThan the better of edgepack's in the same engine. *More right*: "
        "images. *Apart*: images on which the two can differ at all, those on which one of them leaves the float "
        "network's class. *By luck*: two standard deviations of the difference, were every such image a toss.\n"
    )
    head = ["| network | engine | tool | more right | apart, at most | by luck, up to | |", "| --- " * 7 + "|"]
    return "\n".join([text, *head, *lines]) + "\n"


def _name(row: Row) -> str:
    return str(row["network"])


def _network(name: str, rows: Sequence[Row]) -> str:
    known = next((row for row in rows if row.get("float_score") is not None), None)
    unit = "dB" if name == "imdn" else "%"
    whole = "" if known is None else f", float {known['float_score']:.2f} {unit}"
    lines = [f"### {TITLES.get(name, name)}{whole}\n", f"| engine | tool | images | score {unit} | lost | agreement % "
             "| SQNR dB | size ÷ float |", "| --- " * 8 + "|"]  # fmt: skip
    for row in rows:
        tool = f"**{row['tool']}**" if mine(row) else row["tool"]
        start = f"| {ENGINES[row['format']]} | {tool} |"
        lines.append(f"{start} | {_why(row)} | | | | |" if "why" in row else f"{start} {_figures(row)}")
    return "\n".join(lines) + "\n\n" + _versions(rows)


def _why(row: Row) -> str:
    text = row["why"].replace("|", "\\|").replace("\n", " ")
    return f"exit {row['exit']}: {text}" if "exit" in row else text


def _figures(row: Row) -> str:
    size = _shown(row["size_ratio"], 3)
    if row.get("weights_ratio") is not None:
        size += f" ({row['weights_ratio']:.3f})"
    cells = [str(row["samples"]), _shown(row["score"], 2), _shown(row["lost"], 2), _shown(row["agreement"], 2),
             _shown(row["sqnr_db"], 1), size]  # fmt: skip
    return " | ".join(cells) + " |"


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _versions(rows: Sequence[Row]) -> str:
    found: dict[str, str] = {}
    for row in rows:
        found.update({name: version for name, version in row["versions"].items() if name != "source"})
    return f"Versions: {', '.join(f'{name} {version}' for name, version in sorted(found.items()))}.\n"


def _latency(data: Row) -> str:
    text = (
        "## Speed\n\nBatch 1, one thread. All files of a row ran interleaved in one process; figures are ratios of "
        "floors with their 95 % interval, below 1 is faster. *÷ float*: over the float file in the same engine, "
        "computed in float32 (OpenVINO's eight-bit files run as the engine chooses). *÷ best*: over the fastest file "
        "of the engines' own tools that keeps the quality: an SQNR of at least "
        f"{data['guards']['convolutions']:g} dB, for transformers {data['guards']['transformers']:g} dB, where weights "
        "are random. Others are shown, marked †. Trained networks have no such limit; their quality is above. *Size*: "
        "of the model files over four bytes per parameter, where it was noted and is not above.\n"
    )
    lines = ["| network | engine | tool | size | SQNR dB | p50 ms | ÷ float | verdict | ÷ best | verdict | best |",
             "| --- " * 11 + "|"]  # fmt: skip
    lines += [text for row in data["rows"] for text in race(row)]
    return "\n".join([text, *lines]) + f"\n\nConditions: {data['machine']}; {data['processor']}.\n"


def race(row: Row) -> list[str]:
    start = f"| {TITLES.get(row['network'], row['network'])} | {ENGINES[row['format']]} |"
    lines = []
    for entry in row["entries"]:
        mark = "" if entry.get("kept", True) else " †"
        name = f"**{entry['label']}**" if mine({"tool": entry["label"]}) else f"{entry['label']}{mark}"
        if "why" in entry:
            lines.append(f"{start} {name} | {_why(entry)} | | | | | | | |")
            continue
        best = "" if entry.get("over_best") is None else row["best"]
        size, noise = _shown(entry.get("size_ratio"), 3), _shown(entry["sqnr_db"], 1)
        lines.append(f"{start} {name} | {size} | {noise} | {entry['p50_ms']:.3f} "
                     f"| {_ratio(entry.get('over_float'))} | {_ratio(entry.get('over_best'))} | {best} |")  # fmt: skip
    return lines


def _ratio(ratio: Row | None) -> str:
    if ratio is None:
        return " | "
    if ratio.get("low") is None:
        return f"{ratio['value']:.3f} | "
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] | {ratio['verdict']}"


def answer(parser: argparse.ArgumentParser, results: Path, run: Callable[[argparse.Namespace], None]) -> None:
    """Add the options that both benchmarks have, and do what the command line says."""
    parser.add_argument("--document", action="store_true", help="only write docs/integer.md from the stored results")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "integer", help="files that the tools wrote")
    parser.add_argument("--results", type=Path, default=results)
    options = parser.parse_args()
    if options.document:
        write()
    else:
        run(options)
