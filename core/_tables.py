"""The tables that the command line shows after each verb."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from edgepack import _wording

if TYPE_CHECKING:
    from edgepack.artifact import Artifact, Manifest
    from edgepack.compressing import CompressResult
    from edgepack.doctor import Checkup, PartState
    from edgepack.exporting import ExportResult
    from edgepack.probing import Probe

Values = Mapping[str, Any]
COLOURS = {"faster": "green", "slower": "red", "cannot tell": "yellow"}


def compressed(result: CompressResult) -> Table:
    """What each pass did."""
    table = _table("compress", "pass", "options", ">values", ">time", "notes")
    for step in result.manifest.history:
        change = f"{step['before']['values']:,} → {step['after']['values']:,}"
        notes = "\n".join(step["notes"]) or _wording.UNKNOWN
        options = _wording.options(step["options"]) or "defaults"
        table.add_row(*_cells(step["part"], options, change, _wording.seconds(step["seconds"]), notes))
    if not result.manifest.history:
        table.add_row("none", "", "", "", "the network is captured as it is")
    table.caption = escape(f"score {_scores(result.manifest)}")
    return table


def exported(results: Sequence[ExportResult]) -> Table:
    """Size, parity and score of each artifact."""
    table = _table("export", "artifact", ">size", ">× float size", ">largest error", "score [95 %]", "to the original")
    for result in results:
        manifest = result.artifact.manifest
        name = manifest.name + (" (up to date)" if result.up_to_date else "")
        score = _wording.score(manifest.score), _wording.score_change(manifest.score)
        table.add_row(*_cells(name, *_sizes(result.artifact), _wording.parity(vars(manifest.parity)), *score))
        for missed in manifest.budget_missed:
            table.add_row("", "", "", "", f"[red]budget missed: {escape(missed)}[/red]", "")
    table.caption = escape("\n".join(_checkers(results)))
    return table


def _checkers(results: Iterable[ExportResult]) -> list[str]:
    """What computed the largest errors: an engine, an interpreter, or another engine than the format's own."""
    names: dict[str, list[str]] = {}
    for result in results:
        manifest = result.artifact.manifest
        if manifest.parity.runtime is not None:
            names.setdefault(manifest.parity.runtime, []).append(manifest.name)
    return [f"checked by {engine}: {', '.join(artifacts)}" for engine, artifacts in names.items()]


def profiled(profiles: Sequence[Values]) -> Table:
    """Latency, ratio and costs of each contender; energy goes below when it is the same for all."""
    table = _table(
        "profile", "artifact", "engine", ">p50 [p90]", ">ratio [95 %]", "verdict", ">load", ">first", ">peak"
    )
    for item in profiles:
        ratio = item["ratio"]
        colour = COLOURS.get(_wording.verdict(ratio), "default")
        costs = (_wording.ms(item["load_ms"]), _wording.ms(item["first_ms"]), _wording.size(item["peak_bytes"]))
        cells = _cells(item["label"], f"{item['runtime']} ×{item['threads']}", _wording.latency(item["latency_ms"]),
                       _wording.ratio(ratio))  # fmt: skip
        table.add_row(*cells, f"[{colour}]{escape(_wording.verdict(ratio))}[/{colour}]", *costs)
    energies = sorted({f"energy {_wording.energy(item['energy'])}" for item in profiles})
    against = sorted({f"ratio against {item['ratio']['against']}" for item in profiles if item["ratio"]})
    table.caption = escape("\n".join([*against, *energies]))
    return table


def verified(artifacts: Iterable[tuple[Artifact, Values]]) -> Table:
    """The parity of artifacts that were checked again."""
    table = _table("verify", "artifact", "engine", ">largest error", ">SQNR", ">same answer", ">samples")
    for artifact, parity in artifacts:
        figures = (_wording.parity(parity), _wording.decibel(parity["sqnr_db"]), _wording.percent(parity["agreement"]))
        table.add_row(*_cells(str(artifact.folder), parity["runtime"] or "none", *figures, str(parity["samples"])))
    return table


def parts_table(states: Iterable[PartState]) -> Table:
    table = _table("parts", "kind", "name", "what it does", "here")
    kind = ""
    for state in states:
        here = "[green]yes[/green]" if state.missing is None else escape(state.missing)
        table.add_row(
            state.kind if state.kind != kind else "", state.name, escape(state.summary.replace("``", "")), here
        )
        kind = state.kind
    return table


def checkup_tables(found: Checkup) -> list[Table | str]:
    packages = _table("packages", "extra", "packages", "install")
    packages.add_row("(core)", _packages(found.core), "")
    for extra in found.extras:
        packages.add_row(extra.name, _packages(extra.packages), escape(extra.install or ""))
    machine = _table("this machine", "fact", "value")
    for name, value in found.machine.items():
        machine.add_row(*_cells(name, value))
    meters = _table("energy meters", "meter", "scope", "here")
    for meter in found.meters:
        here = "[green]works[/green]" if meter.reason is None else escape(meter.reason)
        meters.add_row(*_cells(meter.name, meter.scope), here)
    return [packages, machine, meters, *(f"[yellow]note:[/yellow] {escape(problem)}" for problem in found.problems)]


def probed(probes: Sequence[Probe]) -> Table:
    """What engines make of single operators."""
    table = _table(
        "operators in 8 and 4 bits", "engine", "operator", "form", "computes", ">× float [95 %]", "verdict", "kernels"
    )
    before = ("", "")
    for one in probes:
        names = tuple("" if old == new else new for old, new in zip(before, (one.engine, one.operator), strict=True))
        before = (one.engine, one.operator)
        word = "as it must" if one.matches else f"[red]{escape(one.reason or f'otherwise, by {one.error:.2g}')}[/red]"
        ratio = None if one.ratio is None else asdict(one.ratio)
        judged = _wording.verdict(ratio) + (", left in float faster" if one.beside_left and one.slower else "")
        colour = COLOURS.get(_wording.verdict(ratio), "default")
        cells = (
            *_cells(*names, one.form),
            word,
            "not run" if one.untimed else escape(_wording.ratio(ratio)),
            f"[{colour}]{escape(judged)}[/{colour}]",
        )
        counted = Counter(one.kernels).items()
        kernels = ", ".join(f"{count} {kernel}" if count > 1 else kernel for kernel, count in counted)
        table.add_row(*cells, escape(kernels))
    table.caption = "one thread; × float is the time over that of the float operator of the same size"
    return table


def planned(steps: Sequence[Values]) -> Table:
    """What a command would do."""
    table = _table("plan (nothing was done)", "stage", "part", "options")
    for step in steps:
        table.add_row(*_cells(step["stage"], step["part"], _wording.options(step["options"])))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", title_style="bold")
    for column in columns:
        number = column.startswith(">")
        table.add_column(escape(column.removeprefix(">")), justify="right" if number else "left", no_wrap=number)
    return table


def _cells(*texts: str) -> list[str]:
    """Names and options come from files: brackets in them are not markup."""
    return [escape(text) for text in texts]


def _sizes(artifact: Artifact) -> tuple[str, str]:
    float_size = artifact.manifest.float_size_bytes
    ratio = f"{artifact.size_bytes / float_size:.3f}" if float_size else _wording.UNKNOWN
    return _wording.size(artifact.size_bytes), ratio


def _scores(manifest: Manifest) -> str:
    score = manifest.score
    if score is None:
        return _wording.score(None)
    original = "" if score["original"] is None else f", original {_wording.in_unit(score['original'], score['unit'])}"
    return f"{_wording.score(score)} {score['metric']}{original} ({score['samples']} samples)"


def _packages(versions: Mapping[str, str | None]) -> str:
    words = [f"{name} {version}" if version else f"[red]{name} missing[/red]" for name, version in versions.items()]
    return ", ".join(words)
