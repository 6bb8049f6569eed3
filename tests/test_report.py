"""The report reads what the stages wrote and shows it in one self-contained page; the unknown is never a number."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack import _wording, reporting
from edgepack.artifact import MANIFEST, Manifest, Parity, describe_files
from edgepack.contracts import TensorSpec
from edgepack.errors import InputError, IntegrityError
from edgepack.measurement import Energy, Latency, Profile, Ratio

SPECS = (TensorSpec("input", "float32", ("batch", 3, 32, 32), "NCHW"),)
OUTPUTS = (TensorSpec("output", "float32", ("batch", 10)),)
SCORE = {
    "metric": "top1", "unit": "%", "original": 0.914, "this": 0.914, "low": 0.895, "high": 0.93, "samples": 1000,
    "higher_is_better": True,
}  # fmt: skip
CHECKED = Parity("checked", "onnxruntime 1.32.0", 3.1e-7, 132.0, 131.0, 1.0, 16, "output")
STEP = {
    "part": "fold", "options": {"leave": ["head"]}, "seconds": 0.4, "seed": 0, "before": {"values": 270_000},
    "after": {"values": 269_000}, "notes": ["19 of 20 folded", "<b>conv</b> left alone"],
}  # fmt: skip
NO_ENERGY = Energy("unavailable", reason="no meter on this machine")


def write(folder: Path, size_bytes: int, **changes: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"0" * size_bytes)
    facts: dict[str, Any] = {"parity": CHECKED, "score": SCORE, "float_size_bytes": 1_078_888} | changes
    manifest = Manifest(facts.pop("format", "onnx"), folder.name, "float32", SPECS, OUTPUTS, **facts)
    manifest = replace(manifest, files=describe_files(folder))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def profile(label: str, p50: float, ratio: Ratio | None) -> Profile:
    device = {"name": "board", "processor": "Some CPU", "cores": "2"}
    latency = Latency(p50, p50 * 1.1, None, p50, p50 * 0.9, 640)
    return Profile(label, label, latency, ratio, 12.0, 1.5, 90_000_000, NO_ENERGY, device, "onnxruntime 1.32.0", 1,
                   {"state": "settled"}, True)  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar" / "edgepack-out"
    write(folder / "compressed", 1_080_000, format="pt2", history=(STEP,))
    write(folder / "baseline" / "pt2", 1_090_000, format="pt2")
    write(folder / "baseline" / "onnx", 1_085_000, score=None)
    write(folder / "onnx", 1_081_000)
    half = {**SCORE, "this": 0.912, "low": 0.893, "high": 0.928}
    write(folder / "onnx-half", 545_000, score=half, budget_missed=("size_ratio 0.505 is above 0.3",))
    write(folder / "openvino", 1_120_000, format="openvino", parity=Parity("not run: no engine"), score=None)
    profiles = folder / "profiles"
    profiles.mkdir()
    faster = Ratio(0.614, 0.601, 0.627, "baseline/onnx", "faster", 0.62)
    unsure = Ratio(1.01, 0.93, 1.09, "baseline/onnx", "cannot tell", 1.02)
    items = profile("baseline/onnx", 0.412, None), profile("onnx", 0.253, faster), profile("onnx-half", 0.42, unsure)
    for item in items:
        (profiles / f"{item.label.replace('/', '-')}.json").write_text(json.dumps(item.to_json()))
    return folder


class Page(HTMLParser):
    """Text, tags and references of a page; fails on tags that do not close."""

    VOID = ("meta", "line", "circle", "rect", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.open: list[str] = []
        self.seen: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "style")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def render(out: Path) -> tuple[str, Page]:
    reporting.write_html(reporting.build(out), out / "report.html")
    text = (out / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_collects_every_stage(out: Path) -> None:
    data = reporting.build(out)
    assert data["name"] == "cifar"
    assert [item["name"] for item in data["artifacts"]] == ["onnx", "onnx-half", "openvino"]
    assert [item["name"] for item in data["baselines"]] == ["baseline/onnx", "baseline/pt2"]
    assert data["artifacts"][0]["size_ratio"] == pytest.approx(1_081_000 / 1_078_888)
    assert len(data["profiles"]) == 3
    json.dumps(data, allow_nan=False)


def test_page_is_self_contained_and_whole(out: Path) -> None:
    text, page = render(out)
    assert page.references == []
    assert "script" not in page.seen
    assert "url(" not in text
    assert "@import" not in text
    assert len(text) < 200_000


def test_page_shows_figures_with_their_intervals(out: Path) -> None:
    words = " ".join(" ".join(render(out)[1].text).split())
    for figure in ("91.20 % [89.30, 92.80]", "-0.20 points", "0.614 [0.601, 0.627]", "faster", "cannot tell",
                   "0.253 ms", "545 kB", "0.505 × float size", "3.1e-07", "132 dB", "269,722"):  # fmt: skip
        assert figure in words, figure
    assert "budget missed: size_ratio 0.505 is above 0.3" in words
    assert "unavailable: no meter on this machine" in words


def test_what_was_not_run_is_labelled(out: Path) -> None:
    words = " ".join(render(out)[1].text)
    assert "not run: no engine" in words
    bare = out.parent.parent / "bare"
    write(bare / "onnx", 1000, score=None, float_size_bytes=None, parity=Parity("not run: no engine"))
    words = " ".join(render(bare)[1].text)
    assert "Not run: the recipe has no evaluation data" in words
    assert "Not run: nothing was profiled" in words
    assert "nan" not in words.lower().split()


def test_text_from_files_is_escaped(out: Path) -> None:
    text, _ = render(out)
    assert "<b>conv</b>" not in text
    assert "&lt;b&gt;conv&lt;/b&gt; left alone" in text


def test_every_mark_lies_on_its_strip(out: Path) -> None:
    text, _ = render(out)
    places = [float(value) for value in re.findall(r'(?:cx|x1|x2|x|width)="([-\d.e]+)%"', text) if value]
    assert len(places) > 40
    assert all(0 <= value <= 100 for value in places)


def test_filters_are_drawn_beside_random_ones(out: Path) -> None:
    row = {"layer": "layer1.conv", "filters": 64, "sparsity": 0.4, "entropy": 0.7, "against_random": 1.02,
           "orthogonality": 0.8, "drift": None, "advice": "prune channels"}  # fmt: skip
    shutil.rmtree(out / "compressed")
    step = {**STEP, "part": "sparsify", "findings": {"filters": {"rows": [row, {**row, "against_random": 0.5}]}}}
    write(out / "compressed", 1_080_000, format="pt2", history=(step,))
    text, page = render(out)
    words = " ".join(" ".join(page.text).split())
    assert "layer1.conv 64 filters" in words
    assert "1.02 40 % 0.80 – prune channels" in words
    assert re.findall(r'height="12" width="([\d.]+)%"', text)[-2:] == ["100.0", "50.0"]


def test_an_empty_or_damaged_folder_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no artifact"):
        reporting.build(tmp_path / "nothing")
    (out / "profiles" / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json: not a profile"):
        reporting.build(out)
    (out / "profiles" / "broken.json").unlink()
    (out / "onnx" / "model.bin").write_bytes(b"short")
    with pytest.raises(IntegrityError):
        reporting.build(out)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_ascending_and_cover(low: float, span: float) -> None:
    found = reporting.ticks(low, low + span)
    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))
    slack = 1e-6 * max(span, abs(low))
    assert found[0] <= low + slack
    assert found[-1] >= low + span - slack


def test_ticks_of_a_single_value() -> None:
    assert len(reporting.ticks(0.5, 0.5)) >= 2


@pytest.mark.parametrize(
    "size_bytes, text",
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_078_888, "1.08 MB"), (999_960, "1.00 MB")],
)
def test_sizes_are_worded(size_bytes: int | None, text: str) -> None:
    assert _wording.size(size_bytes) == text


def test_energy_is_always_tagged() -> None:
    measured = Energy("measured", 0.0123, 0.012, 0.0126, "rapl", "package")
    assert _wording.energy(vars(measured)) == "0.0123 J [0.0120, 0.0126] measured (rapl, package)"
    assert _wording.energy(vars(NO_ENERGY)) == "unavailable: no meter on this machine"
