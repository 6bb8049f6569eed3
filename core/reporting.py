"""The report: everything an output folder proves, as one JSON document and one self-contained HTML page.

``build`` only reads what the stages wrote; ``write_html`` needs no network, no script and no other file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgepack import _wording
from edgepack.artifact import MANIFEST, Artifact, write_text
from edgepack.errors import InputError
from edgepack.versions import versions

SCHEMA = 1
TEMPLATE = "report.html.j2"
TICKS = 5
LAYERS = 40  # of a table that is longer in the JSON document
RATIO_MARKS = ((0.98, 1.02), (0.95, 1.05), (0.9, 1.1), (0.8, 1.25), (0.5, 2.0), (0.2, 5.0), (0.1, 10.0), (0.01, 100.0))
Values = Mapping[str, Any]


def build(out: Path) -> dict[str, Any]:
    """Collect ``compressed/``, ``baseline/*``, every artifact and ``profiles/*.json`` of an output folder.

    Raises:
        InputError: there is nothing to report, or a file is damaged.
        IntegrityError: a file of an artifact is missing or has another size.
    """
    compressed = Artifact.open(out / "compressed") if (out / "compressed" / MANIFEST).exists() else None
    baselines = [_artifact(out, Artifact.open(path.parent)) for path in sorted(out.glob(f"baseline/*/{MANIFEST}"))]
    others = sorted(path.parent for path in out.glob(f"*/{MANIFEST}") if path.parent.name != "compressed")
    artifacts = [_artifact(out, Artifact.open(folder)) for folder in others]
    if compressed is None and not artifacts:
        raise InputError(f"{out} holds no artifact to report on", "edgepack run writes one")
    return {
        "schema": SCHEMA,
        "name": out.resolve().parent.name if out.name == "edgepack-out" else out.resolve().name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions("torch", "onnx", "onnxruntime", "openvino"),
        "compressed": None if compressed is None else _artifact(out, compressed),
        "baselines": baselines,
        "artifacts": artifacts,
        "profiles": [_profile(path) for path in sorted(out.glob("profiles/*.json"))],
    }


def write_html(data: Values, path: Path) -> None:
    """One HTML file with everything inside. Raises StorageError."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgepack", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["say"] = _wording
    write_text(path, environment.get_template(TEMPLATE).render(view(data)))


def view(data: Values) -> dict[str, Any]:
    """What the template shows: the report's data with the positions of every mark, in per cent of its strip."""
    original = next((item for item in data["baselines"] if item["manifest"]["format"] == "pt2"), None)
    return {
        "data": data,
        "original": original,
        "first": data["compressed"] or data["artifacts"][0],
        "headlines": headlines(data),
        "scores": _scores(data, original),
        "sizes": _sizes(data),
        "measurements": [_measurement(group) for group in _groups(data["profiles"])],
        "devices": _devices(data["profiles"]),
        "sensitivity": _sensitivity(data["compressed"]),
        "filters": _filters(data["compressed"]),
        "mixed": _mixed(data["compressed"]),
        "tokens": _tokens(data["compressed"]),
    }


def headlines(data: Values) -> list[dict[str, str]]:
    """The few figures to see first; only those that were measured."""
    found = []
    sized = [item for item in data["artifacts"] if item["size_ratio"] is not None]
    if sized:
        least = min(sized, key=lambda item: item["size_bytes"])
        found.append({"figure": _wording.size(least["size_bytes"]), "what": f"smallest artifact: {least['name']}",
                      "more": f"{least['size_ratio']:.3f} × float size"})  # fmt: skip
    scored = [item for item in data["artifacts"] if (item["manifest"]["score"] or {}).get("original") is not None]
    if scored:
        worst = min(scored, key=lambda item: _gain(item["manifest"]["score"]))
        change = _wording.score_change(worst["manifest"]["score"])
        found.append({"figure": change, "what": f"largest change of {worst['manifest']['score']['metric']}",
                      "more": f"{worst['name']}: {_wording.score(worst['manifest']['score'])}"})  # fmt: skip
    timed = [item for item in data["profiles"] if (item["ratio"] or {}).get("verdict") in ("faster", "slower", "same")]
    if timed:
        best = min(timed, key=lambda item: float(item["ratio"]["value"]))
        word = "as" if best["ratio"]["verdict"] == "same" else "than"
        found.append({"figure": f"{best['ratio']['value']:.3f} ×", "what": f"latency of {best['label']}",
                      "more": f"{best['ratio']['verdict']} {word} {best['ratio']['against']}"})  # fmt: skip
    checked = [item["manifest"]["parity"]["status"] == "checked" for item in data["artifacts"]]
    if checked:
        found.append({"figure": f"{sum(checked)} of {len(checked)}", "what": "artifacts checked",
                      "more": "loaded again and compared with their golden answers"})  # fmt: skip
    return found


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Round numbers that cover ``low`` to ``high``.

    Example: 0.31 and 0.87 give 0.2, 0.4, 0.6, 0.8, 1.0.
    """
    span = high - low if high > low else max(abs(high), 1.0) * 0.1
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def place(value: float, low: float, high: float) -> float:
    """Position in per cent, two decimals, kept inside the strip."""
    return round(min(max(100 * (value - low) / (high - low), 0.0), 100.0), 2)


def _artifact(out: Path, artifact: Artifact) -> dict[str, Any]:
    manifest = asdict(artifact.manifest)
    float_size = artifact.manifest.float_size_bytes
    return {
        "name": artifact.folder.relative_to(out).as_posix(),
        "size_bytes": artifact.size_bytes,
        "size_ratio": artifact.size_bytes / float_size if float_size else None,
        "manifest": manifest,
    }


def _profile(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "latency_ms": dict(found["latency_ms"]), "energy": dict(found["energy"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a profile: {error}", "edgepack profile writes it again") from error


def _gain(score: Values) -> float:
    sign = 1.0 if score.get("higher_is_better", True) else -1.0
    return sign * (float(score["this"]) - float(score["original"]))


def _scores(data: Values, original: Values | None) -> dict[str, Any] | None:
    """Dots with intervals on one axis, the original first."""
    entries = [("original", original)] if original is not None else []
    entries += [(item["name"], item) for item in data["artifacts"]]
    scored = [item["manifest"]["score"] for _, item in entries if item["manifest"]["score"]]
    if not scored:
        return None
    unit = scored[0].get("unit") or ""
    values = [_wording.scaled(score[key], unit) for score in scored for key in ("low", "this", "high")]
    axis = ticks(min(values), max(values))
    rows = []
    for name, item in entries:
        score = item["manifest"]["score"]
        at = {} if score is None else {
            key: place(_wording.scaled(score[key], unit), axis[0], axis[-1]) for key in ("low", "this", "high")
        }  # fmt: skip
        rows.append({"name": name, "score": score, **at})
    first = rows[0]
    return {"metric": scored[0]["metric"], "unit": unit, "samples": scored[0].get("samples"), "rows": rows,
            "axis": _axis(axis), "reference": first["this"] if original is not None and first["score"] else None,
            "higher_is_better": scored[0].get("higher_is_better", True)}  # fmt: skip


def _sizes(data: Values) -> dict[str, Any]:
    """Bars of the artifacts' bytes; the float size is the reference line."""
    items = [*data["artifacts"], *data["baselines"]]
    float_size = next(
        (item["manifest"]["float_size_bytes"] for item in items if item["manifest"]["float_size_bytes"]), None
    )
    top = max([item["size_bytes"] for item in items] + [float_size or 0] + [1])
    axis = ticks(0.0, float(top), count=3)
    rows = [
        {**item, "to": place(item["size_bytes"], 0, axis[-1]), "baseline": item in data["baselines"]} for item in items
    ]
    reference = place(float_size, 0, axis[-1]) if float_size else None
    marks = [{"at": place(value, 0, axis[-1]), "text": _wording.size(value)} for value in axis]
    return {"rows": rows, "axis": marks, "float_size_bytes": float_size, "reference": reference}


def _groups(profiles: Sequence[Values]) -> list[list[Values]]:
    """Profiles by device, engine and threads, baselines first in each group."""
    found: dict[tuple[str, str, int], list[Values]] = {}
    for item in sorted(profiles, key=lambda item: item["ratio"] is not None):
        found.setdefault((item["device"].get("name", ""), item["runtime"], item["threads"]), []).append(item)
    return list(found.values())


def _measurement(group: Sequence[Values]) -> dict[str, Any]:
    """Latency bars, and ratios as dots with intervals on a logarithmic axis around 1."""
    slowest = max(item["latency_ms"]["p90"] or item["latency_ms"]["p50"] for item in group)
    axis = ticks(0.0, slowest)
    rows = [
        {**item, "to": place(item["latency_ms"]["p50"], 0, axis[-1]),
         "p90_at": None if item["latency_ms"]["p90"] is None else place(item["latency_ms"]["p90"], 0, axis[-1])}
        for item in group
    ]  # fmt: skip
    first = group[0]
    return {
        "title": f"{first['runtime']}, {first['threads']} thread{'' if first['threads'] == 1 else 's'}",
        "device": first["device"].get("processor") or first["device"].get("name") or "unnamed device",
        "rows": rows,
        "axis": _axis(axis),
        "ratios": _ratios([item for item in group if item["ratio"] is not None]),
        "energies": sorted({_wording.energy(item["energy"]) for item in group}),
    }


def _ratios(profiles: Sequence[Values]) -> dict[str, Any] | None:
    if not profiles:
        return None
    ends = [math.log(item["ratio"][key]) for item in profiles for key in ("low", "high")]
    reach = max(math.log(1.1), *(abs(end) for end in ends)) * 1.08
    rows = [
        {**item, **{key: place(math.log(item["ratio"][key]), -reach, reach) for key in ("low", "value", "high")}}
        for item in profiles
    ]
    axis = [{"at": place(math.log(value), -reach, reach), "text": f"{value:g} ×"} for value in _ratio_marks(reach)]
    return {"rows": rows, "axis": axis, "one": place(0.0, -reach, reach)}


def _ratio_marks(reach: float) -> list[float]:
    """Round ratios on both sides of 1, at least an eighth of the axis apart."""
    found: list[float] = [1.0]
    for below, above in RATIO_MARKS:
        if -math.log(below) <= reach and math.log(above / found[-1]) >= reach / 4:
            found = [below, *found, above]
    return found


def _axis(values: Sequence[float]) -> list[dict[str, Any]]:
    return [{"at": place(value, values[0], values[-1]), "text": f"{value:g}"} for value in values]


def _sensitivity(compressed: Values | None) -> dict[str, Any] | None:
    """Where rounding loses, worst layer first; bars of what each layer costs the outputs."""
    steps = [] if compressed is None else compressed["manifest"]["history"]
    found = next((step["findings"]["sensitivity"] for step in steps if "sensitivity" in step.get("findings", {})), None)
    if found is None:
        return None
    axis = ticks(0.0, max([row["gain_db"] or 0.0 for row in found["layers"]] + [1.0]), count=3)
    rows = [{**row, "to": place(row["gain_db"] or 0.0, 0, axis[-1])} for row in found["layers"][:LAYERS]]
    return {**found, "rows": rows, "more": len(found["layers"]) - len(rows), "axis": _axis(axis)}


def _mixed(compressed: Values | None) -> dict[str, Any] | None:
    """The best mixtures of widths by size, and which one the layers have."""
    steps = [] if compressed is None else compressed["manifest"]["history"]
    found = next((step["findings"]["mixed"] for step in steps if "mixed" in step.get("findings", {})), None)
    if found is None:
        return None
    rows = [{**row, "chosen": row["layers"] == found["chosen"]["layers"]} for row in found["table"]]
    if not any(row["chosen"] for row in rows):
        rows = sorted([*rows, {**found["chosen"], "chosen": True}], key=lambda row: float(row["size_ratio"]))
    return {**found, "table": rows, "widths": list(found["chosen"]["layers"])}


def _tokens(compressed: Values | None) -> dict[str, Any] | None:
    """What a cut in the number of tokens keeps, block by block; bars of the attention that the kept ones hold."""
    steps = [] if compressed is None else compressed["manifest"]["history"]
    found = next((step["findings"]["tokens"] for step in steps if "tokens" in step.get("findings", {})), None)
    if found is None:
        return None
    rows = [{**row, "to": place(row["attentiveness"], 0, 1)} for row in found["blocks"]]
    if isinstance(found["keep_rate"], list):  # one for each cut
        found = {**found, "keep_rate": ", ".join(map(str, found["keep_rate"]))}
    return {**found, "rows": rows, "axis": _axis([0.0, 0.25, 0.5, 0.75, 1.0])}


def _filters(compressed: Values | None) -> dict[str, Any] | None:
    """What the filters of 3 × 3 convolutions are like; bars of how varied they are beside random ones."""
    steps = [] if compressed is None else compressed["manifest"]["history"]
    found = next((step["findings"]["filters"] for step in steps if "filters" in step.get("findings", {})), None)
    if found is None:
        return None
    axis = [0.0, 0.25, 0.5, 0.75, 1.0]
    rows = [{**row, "to": place(min(row["against_random"], 1.0), 0, 1)} for row in found["rows"]]
    return {"rows": rows, "axis": _axis(axis)}


def _devices(profiles: Sequence[Values]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for item in profiles:
        steady = {key: value for key, value in item["device"].items() if key not in ("load", "frequency")}
        if steady not in found:
            found.append(steady)
    return found
