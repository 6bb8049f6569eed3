"""The command line: one command per verb, thin over ``edgepack.pipeline``. Work is imported when a command runs."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from edgepack._failure import status
from edgepack._verbs import Call, Json, app, verb
from edgepack.errors import BudgetError, EdgepackError, InputError, MeasurementError, nearest, together

if TYPE_CHECKING:
    from edgepack.contracts import Settings
    from edgepack.measurement import Profile
    from edgepack.recipe import Measurement, Recipe

RECIPE = Path("edgepack.toml")
WORK = ("out", "overrides", "dry_run", "force")

Target = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, or the folder with it.")]
Targets = Annotated[list[Path] | None, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe or folders.")]
Runtime = Annotated[str | None, typer.Option(metavar="NAME", help="Engine; default the first that reads the format.")]
Threads = Annotated[int | None, typer.Option(min=1, show_default="1", help="Threads of the engine.")]
Seconds = Annotated[float | None, typer.Option(min=0.1, show_default="60", help="Measure for at most this long.")]


@app.callback(invoke_without_command=True)
def _edgepack(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    """Make a trained vision model small and fast, and prove on every target that it still works."""
    if version:
        from edgepack.versions import installed

        typer.echo(f"edgepack {installed('edgepack')}")
        raise typer.Exit


@verb("force", examples="edgepack init\nedgepack init --example digits demo")
def init(
    call: Call,
    folder: Annotated[Path, typer.Argument(help="Where to write.")] = Path(),
    example: Annotated[str | None, typer.Option(metavar="NAME", help="Copy a complete example: digits.")] = None,
) -> Json:
    """Write a commented recipe to start from, or a complete example."""
    from edgepack.artifact import storage_errors

    package = resources.files("edgepack")
    with resources.as_file(package / ("templates" if example is None else "examples")) as home:
        if example is not None:
            choices = sorted(path.name for path in home.iterdir() if (path / RECIPE).exists())
            if example not in choices:
                raise InputError(f"there is no example {example!r}", nearest(example, choices))
            home = home / example
        sources = sorted(path for path in home.iterdir() if path.is_file())
        taken = [path.name for path in sources if (folder / path.name).exists()]
        if taken and not call.force:
            raise InputError(f"{folder} already has {', '.join(taken)}", "--force replaces")
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in sources:
                shutil.copyfile(path, folder / path.name)
    files = [str(folder / path.name) for path in sources]
    step = "edit it, then: edgepack compress && edgepack export" if example is None else f"next: edgepack run {folder}"
    call.screen.say(f"wrote {', '.join(files)}\n{step}")
    return {"files": files}


@verb(*WORK, examples="edgepack compress\nedgepack compress my/edgepack.toml --set compress.fold.leave='[\"head\"]'")
def compress(call: Call, recipe: Target = RECIPE) -> Json:
    """Apply the recipe's passes and write compressed/, ready to export."""
    from edgepack import _tables, pipeline

    loaded = call.recipe(recipe)
    if call.dry_run:
        return _plan(call, loaded, "compress")
    result = pipeline.compress_recipe(loaded, call.options())
    call.screen.show(_tables.compressed(result))
    step = f"edgepack export {recipe}" if call.out is None else f"edgepack export {recipe} --out {call.out}"
    call.screen.say(f"{result.folder} {_when(result.up_to_date, result.seconds)}\nnext: {step}")
    return result.to_json()


@verb(
    *WORK, examples="edgepack export\nedgepack export --to tflite\nedgepack export edgepack-out --to onnx --to openvino"
)
def export(
    call: Call,
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE|FOLDER", help="The recipe, or an output folder with --to.")
    ] = RECIPE,
    to: Annotated[list[str] | None, typer.Option(metavar="FORMAT", help="Only this format; may repeat.")] = None,
) -> Json:
    """Write the artifacts the recipe asks for, each checked against its golden answers."""
    from edgepack import _tables, pipeline

    names = list(dict.fromkeys(to or ()))
    if names and recipe.is_dir() and not (recipe / RECIPE).exists():
        if call.dry_run:
            return _show_plan(call, [{"stage": "export", "part": name, "options": {}} for name in names])
        results = pipeline.export_folder(recipe, names, call.options())
    else:
        loaded = call.recipe(recipe)
        loaded = pipeline.narrowed(loaded, names) if names else loaded
        if call.dry_run:
            return _plan(call, loaded, "export")
        results = pipeline.export_recipe(loaded, call.options())
    call.screen.show(_tables.exported(results))
    for result in results:
        call.screen.say(f"{result.artifact.folder} {_when(result.up_to_date, result.seconds)}")
    pipeline.hold_budget(results)
    return {"artifacts": [result.to_json() for result in results]}


@verb(*WORK, examples="edgepack run\nedgepack run demo --json > result.json\nedgepack run --until export")
def run(
    call: Call,
    recipe: Target = RECIPE,
    until: Annotated[str, typer.Option(metavar="STAGE", help="Last stage: compress, export, profile.")] = "profile",
) -> Json:
    """All stages: compress, export, profile; then the report."""
    from edgepack import pipeline

    loaded = call.recipe(recipe)
    stages: dict[str, Callable[[], Json]] = {
        "compress": lambda: compress(call, recipe),
        "export": lambda: export(call, recipe),
        "profile": lambda: profile(call, [recipe]),
    }
    if until not in stages:
        raise InputError(f"there is no stage {until!r}", nearest(until, stages))
    names = list(stages)[: list(stages).index(until) + 1]
    if call.dry_run:
        return _plan(call, loaded, *names)
    document: Json = {}
    failure: EdgepackError | None = None
    for name in names:
        try:
            document[name] = stages[name]()
        except (BudgetError, MeasurementError) as error:
            failure = failure or error
    path = pipeline.report_recipe(call.out or loaded.out)
    call.screen.say(f"report: {path.resolve()}")
    if failure is not None:
        raise failure
    return {**document, "report": str(path)}


@verb(*WORK, examples="edgepack profile --threads 2\nedgepack profile edgepack-out/onnx edgepack-out/openvino")
def profile(
    call: Call,
    targets: Targets = None,
    runtime: Runtime = None,
    threads: Threads = None,
    seconds: Seconds = None,
) -> Json:
    """Measure latency, memory and energy, of a recipe's artifacts or of artifact folders, interleaved."""
    from edgepack import pipeline

    paths = targets or [RECIPE]
    if all((path / "artifact.json").exists() for path in paths):
        if call.dry_run:
            return _show_plan(call, [{"stage": "profile", "part": str(path), "options": {}} for path in paths])
        settings = _settings(threads, seconds)
        return _profiles(call, pipeline.profile_folders(paths, runtime, settings, call.screen.progress))
    if len(paths) > 1:
        wrong = next(path for path in paths if not (path / "artifact.json").exists())
        raise InputError(f"{wrong} is not an artifact folder", "give one recipe, or artifact folders only")
    loaded = _adjusted(call.recipe(paths[0]), runtime, threads, seconds)
    if call.dry_run:
        return _plan(call, loaded, "profile")
    found = pipeline.profile_recipe(loaded, call.options())
    document = _profiles(call, found)
    pipeline.hold_latency(loaded, found)
    return document


@verb(examples="edgepack compare edgepack-out/baseline/onnx edgepack-out/onnx\nedgepack compare A B --runtime openvino")
def compare(
    call: Call,
    a: Annotated[Path, typer.Argument(metavar="A", help="Artifact folder, the reference.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Artifact folder.")],
    runtime: Runtime = None,
    threads: Threads = None,
    seconds: Seconds = None,
) -> Json:
    """Is B faster than A? One interleaved run, a ratio with its interval, and a verdict."""
    from edgepack import pipeline

    found = pipeline.compare(a, b, _settings(threads, seconds), runtime, call.screen.progress)
    return _profiles(call, found)


@verb(
    *WORK,
    examples="edgepack deploy --to linux\nedgepack deploy edgepack-out/onnx --to linux --set deploy.linux.samples=2",
)
def deploy(
    call: Call,
    targets: Targets = None,
    to: Annotated[str, typer.Option(metavar="PACKAGER", help="What to package for: linux.")] = "linux",
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Of the recipe's exports; may repeat.")] = None,
) -> Json:
    """Write packages an app can include: model, contract, samples in C++ and Python, and a self-test."""
    from edgepack import _deploying

    return _deploying.deploy(call, targets or [RECIPE], to, only or ())


@verb("out", "overrides", examples="edgepack verify\nedgepack verify edgepack-out/onnx")
def verify(call: Call, targets: Targets = None, runtime: Runtime = None) -> Json:
    """Check every hash of artifacts, and their answers to the golden samples."""
    from edgepack import _tables, pipeline

    folders: list[Path] = []
    for target in targets or [RECIPE]:
        lone = (target / "artifact.json").exists()
        folders += [target] if lone else pipeline.artifacts_in(_results_of(call, target))
    results, failures = [], []
    for folder in folders:
        call.screen.progress.start(f"verifying {folder}")
        try:
            results.append(pipeline.verify(folder, runtime))
        except EdgepackError as error:
            failures.append(error)
    documents = [result.to_json() for result in results]
    call.screen.show(
        _tables.verified(zip([r.artifact for r in results], [d["parity"] for d in documents], strict=True))
    )
    if failures:
        raise together(failures)
    return {"artifacts": documents}


@verb("out", "overrides", examples="edgepack report\nedgepack report edgepack-out")
def report(
    call: Call,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE|FOLDER", help="The recipe, or an output folder.")] = RECIPE,
) -> Json:
    """Write report.html (one self-contained file) and report.json from what lies in the output folder."""
    from edgepack import pipeline

    path = pipeline.report_recipe(_results_of(call, recipe))
    call.screen.say(f"report: {path.resolve()}")
    return {"report": str(path)}


@verb(examples="edgepack list\nedgepack list passes")
def list_(
    call: Call,
    kind: Annotated[str | None, typer.Argument(help="passes, exporters, runtimes, devices, meters, packagers")] = None,
) -> Json:
    """The parts of each kind, what they do, and whether they work here."""
    from edgepack import _tables, doctor

    if kind is not None and kind not in doctor.KINDS:
        raise InputError(f"there is no kind of part {kind!r}", nearest(kind, doctor.KINDS))
    states = doctor.part_states(tuple(doctor.KINDS) if kind is None else (kind,))
    call.screen.show(_tables.parts_table(states))
    return {"parts": [dataclasses.asdict(state) for state in states]}


@verb("force", examples="edgepack doctor\nedgepack doctor --json\nedgepack doctor --probe")
def doctor(
    call: Call,
    probe: Annotated[bool, typer.Option("--probe", help="Try operators in 8 and 4 bits on the engines here.")] = False,
) -> Json:
    """What is installed, what works on this machine, and what to do about the rest."""
    from edgepack import _tables, doctor, probing

    found = doctor.checkup()
    call.screen.show(*_tables.checkup_tables(found))
    if not probe:
        return found.to_json()
    probes = probing.probe(call.screen.progress, force=call.force)
    call.screen.show(_tables.probed(probes))
    return {**found.to_json(), "probes": [one.to_json() for one in probes]}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command line and exit with its status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(status(app, words))


def _results_of(call: Call, target: Path) -> Path:
    """The output folder that a recipe or a folder stands for."""
    if call.out is not None:
        return call.out
    if target.is_dir() and not (target / RECIPE).exists():
        return target
    return call.recipe(target).out


def _settings(threads: int | None, seconds: float | None) -> Settings:
    from edgepack.contracts import Settings

    return _changed(Settings(), threads, seconds)


def _changed(settings: Settings, threads: int | None, seconds: float | None) -> Settings:
    settings = settings if threads is None else dataclasses.replace(settings, threads=threads)
    return settings if seconds is None else dataclasses.replace(settings, max_seconds=seconds)


def _adjusted(recipe: Recipe, runtime: str | None, threads: int | None, seconds: float | None) -> Recipe:
    """The recipe with the command line's way to measure."""
    from edgepack import contracts, parts
    from edgepack.recipe import Measurement, build

    device = parts.find(contracts.Device, "host")
    engine = None if runtime is None else build(contracts.Runtime, {"use": runtime})

    def change(one: Measurement) -> Measurement:
        settings = _changed(one.settings, threads, seconds)
        return dataclasses.replace(one, settings=settings, runtime=engine or one.runtime)

    measurements = recipe.measurements or (Measurement(device(), None, contracts.Settings()),)
    return dataclasses.replace(recipe, measurements=tuple(change(one) for one in measurements))


def _profiles(call: Call, found: Sequence[Profile]) -> Json:
    from edgepack import _tables

    documents = [item.to_json() for item in found]
    call.screen.show(_tables.profiled(documents))
    return {"profiles": documents}


def _when(up_to_date: bool, seconds: float) -> str:
    return "is up to date" if up_to_date else f"written in {seconds:.1f} s"


def _plan(call: Call, recipe: Recipe, *stages: str) -> Json:
    """What the stages of a recipe would do."""
    from edgepack import parts

    found = {
        "compress": [(parts.name_of(item), parts.options_of(item)) for item in recipe.passes],
        "export": [(parts.name_of(item), parts.options_of(item)) for item in recipe.exporters],
        "profile": [(parts.name_of(one.device), dataclasses.asdict(one.settings)) for one in recipe.measurements],
    }
    steps = [{"stage": s, "part": part, "options": options} for s in stages for part, options in found[s]]
    call.screen.say(f"from {recipe.path} into {call.out or recipe.out}")
    return _show_plan(call, steps)


def _show_plan(call: Call, steps: list[Json]) -> Json:
    from edgepack import _tables

    call.screen.show(_tables.planned(steps))
    return {"plan": steps}
