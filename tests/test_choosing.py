"""``activations = "auto"``: which form an export keeps, what it says of it, and that it can be proved again."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from _world import World  # noqa: E402
from edgepack import choosing, pipeline  # noqa: E402
from edgepack.artifact import Artifact, Manifest  # noqa: E402
from edgepack.choosing import choose, decided, undecided  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Contender, Settings  # noqa: E402
from edgepack.devices._measure import interleave  # noqa: E402
from edgepack.devices._measure import ratio as ratio_of  # noqa: E402
from edgepack.devices.host import Host  # noqa: E402
from edgepack.errors import DeviceError, Unsupported  # noqa: E402
from edgepack.export._onnx_integer import ONNX_RUNTIME  # noqa: E402
from edgepack.export._openvino_dynamic import require_rounding  # noqa: E402
from edgepack.export._openvino_integer import OPENVINO  # noqa: E402
from edgepack.export._tensorrt_integer import TENSORRT  # noqa: E402
from edgepack.export.onnx import Onnx  # noqa: E402
from edgepack.export.openvino import Openvino  # noqa: E402
from edgepack.export.tensorrt import Tensorrt  # noqa: E402
from edgepack.exporting import Source, export, simulation_of  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.measurement import Energy, Latency, Profile  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.statistics import floor, geometric_mean  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Mixed(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.hidden, self.last = nn.Linear(16, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.patch(x).flatten(2).transpose(1, 2)).relu().mean(1))


class Pictures(nn.Module):
    """Nothing but convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def made(folder: Path, kind: type[nn.Module] = Mixed) -> Path:
    torch.manual_seed(0)
    values = np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32)
    task = Task((Input("x", (1, 3, 16, 16)),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(kind().eval(), task, [Quantize(activations="auto", explain=False)], folder, Silent())
    shutil.rmtree(folder / "baseline")  # spares each export one more file
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def forms(mixed: Path) -> dict[str, Artifact]:
    """Both forms of the network, as artifacts."""
    source, found = Source.open(mixed / "compressed"), {}
    for form in choosing.FORMS:
        manifest = Manifest(
            format="onnx", name=form, dialect=ONNX_RUNTIME.forms[form], inputs=source.graph.inputs,
            outputs=source.graph.outputs,
        )  # fmt: skip
        found[form] = Artifact(mixed / form, manifest)
    return found


def profiled(contenders: Sequence[Contender], floors_ms: Sequence[float]) -> list[Profile]:
    latency, energy = Latency(1.0, None, None, 1.0, 1.0, 5), Energy("unavailable")
    return [
        Profile(contender.label, "", latency, None, None, None, None, energy, {}, "", 1, {"floor_ms": floor})
        for contender, floor in zip(contenders, floors_ms, strict=True)
    ]


def stopwatch(monkeypatch: pytest.MonkeyPatch, value: float) -> list[list[str]]:
    """A host on which the second of two takes ``value`` ms, the first one; the labels of what it measured."""
    seen: list[list[str]] = []

    def measure(self: Host, contenders: Sequence[Contender], settings: Settings, progress: Any = None) -> list[Profile]:
        seen.append([contender.label for contender in contenders])
        return profiled(contenders, [1.0, value])

    monkeypatch.setattr(Host, "measure", measure)
    return seen


def busy_machine(
    monkeypatch: pytest.MonkeyPatch, world: World, times_s: Sequence[float], slow: Sequence[float]
) -> None:
    """A host in virtual time whose neighbour slows the first of two by one factor, the second by another."""

    def measure(self: Host, contenders: Sequence[Contender], settings: Settings, progress: Any = None) -> list[Profile]:
        arms = [world.arm(seconds, by, settings.instances) for seconds, by in zip(times_s, slow, strict=True)]
        timing = interleave(arms, settings, tools=world.tools())
        return profiled(contenders, [geometric_mean([floor(row) for row in rows]) for rows in timing.medians_s])

    monkeypatch.setattr(Host, "measure", measure)


def levels(monkeypatch: pytest.MonkeyPatch, static: float, dynamic: float) -> None:
    found = {"static": static, "dynamic": dynamic}
    monkeypatch.setattr(choosing, "_sqnr_db", lambda artifact: found[artifact.folder.name])


def exported(folder: Path, exporter: Any) -> Any:
    return export(folder, [exporter], Silent(), force=True)[0].artifact


@pytest.mark.parametrize(
    ("value", "verdict", "static", "dynamic", "form"),
    [
        (0.8, "faster", 40.0, 40.0, "dynamic"),
        (1.3, "slower", 40.0, 40.9, "static"),
        (1.3, "slower", 20.0, 20.9, "static"),
        (1.3, "slower", 20.0, 21.1, "dynamic"),  # too far
        (0.8, "faster", 21.1, 20.0, "static"),
        (1.3, "slower", 31.0, 45.0, "static"),  # close enough, however good the other is
        (1.0, "same", 40.0, 40.5, "dynamic"),
        (1.02, "same", 40.5, 40.0, "static"),
    ],
)
def test_the_faster_form_of_those_close_to_the_original_is_chosen(
    forms: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, value: float, verdict: str, static: float,
    dynamic: float, form: str,
) -> None:  # fmt: skip
    seen = stopwatch(monkeypatch, value)
    levels(monkeypatch, static, dynamic)
    choice = choose(forms.__getitem__, Silent())
    assert seen == 3 * [["static", "dynamic"]]
    assert choice.form == form
    far = f", too far is {'static' if static < dynamic else 'dynamic'}"
    apart = far if max(static, dynamic) < 30 and abs(static - dynamic) > 1 else ""
    assert choice.note == (
        f"activations = '{form}'; to the original: static {static:.1f} dB, dynamic {dynamic:.1f} dB{apart}; "
        f"dynamic takes {value:.3f} × the time of static (floors of 3 runs: {value:.3f} … {value:.3f}) "
        f"on this machine: {verdict}"
    )


SPELLS = (1.0, 3.0)  # seconds, of a quiet and a busy machine


def test_one_run_on_a_busy_machine_may_say_anything() -> None:
    """What the choice must not believe: a run that a slow spell covers."""
    ratios = []
    for seed in range(12):
        world = World(seed, (0.5, 20.0))
        timing = interleave([world.arm(5e-3, 5.3, 3), world.arm(5e-3, 1.0, 3)], Settings(max_seconds=6.0),
                            tools=world.tools())  # fmt: skip
        ratios.append(ratio_of(timing, 1, "static", Settings()).value)
    assert min(ratios) < 0.25


@pytest.mark.parametrize("slow", [(5.3, 1.0), (1.0, 5.3), (1.3, 1.3)])
def test_a_busy_machine_does_not_choose(
    forms: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, slow: tuple[float, float]
) -> None:
    """Two forms that take equally long: the closer one, whatever a neighbour does to either."""
    for closer, seed in itertools.product(choosing.FORMS, range(4)):
        world = World(seed, SPELLS)
        levels(monkeypatch, 40.0 + (closer == "static"), 40.0 + (closer == "dynamic"))
        busy_machine(monkeypatch, world, (5e-3, 5e-3), slow)
        choice = choose(forms.__getitem__, Silent(), world.clock)
        assert choice.form == closer
        assert world.now <= choosing.MAX_SECONDS + 2 * choosing.RUN_SECONDS
        assert choice.note.endswith((": same", ": cannot tell, so the one closer to the original"))


@pytest.mark.parametrize("slow", [(5.3, 1.0), (1.0, 5.3), (1.3, 1.3)])
def test_a_faster_form_is_found_on_a_busy_machine(
    forms: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, slow: tuple[float, float]
) -> None:
    for faster, seed in itertools.product(choosing.FORMS, range(4)):
        world = World(seed, SPELLS)
        levels(monkeypatch, 40.0, 40.0)
        busy_machine(monkeypatch, world, [4e-3 if form == faster else 5e-3 for form in choosing.FORMS], slow)
        assert choose(forms.__getitem__, Silent(), world.clock).form == faster


def test_undecided_when_the_time_is_over(forms: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch(monkeypatch, 0.5)
    levels(monkeypatch, 40.5, 40.0)
    monkeypatch.setattr(choosing, "MAX_SECONDS", 0.0)
    choice = choose(forms.__getitem__, Silent())
    assert choice.form == "static"
    assert choice.note.endswith(
        "dynamic takes 0.500 × the time of static (floors of one run: 0.000 … inf) on this machine: "
        "cannot tell, so the one closer to the original"
    )


def test_the_choice_is_what_its_own_form_would_be_and_is_repeated(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for value, form in ((2.0, "static"), (0.5, "dynamic")):
        stopwatch(monkeypatch, value)
        found[form] = artifact = exported(mixed, Onnx())
        source, step = Source.open(mixed / "compressed"), artifact.manifest.history[-1]
        own, again = Onnx().lower(source.graph, decided(source.plan, form)), simulation_of(artifact)
        inputs = artifact.golden().inputs
        assert step["activations"] == form
        assert "activations" not in step["options"]
        assert step["notes"][0].startswith(f"activations = '{form}'; to the original: static ")
        assert again.dialect == own.dialect == artifact.manifest.dialect == ONNX_RUNTIME.forms[form]
        assert artifact.manifest.parity.status == "checked"
        for name, values in run_graph(own, inputs).items():
            np.testing.assert_array_equal(run_graph(again, inputs)[name], values)
            np.testing.assert_array_equal(artifact.golden().simulation[name], values)
    assert found["static"].manifest.fingerprint == found["dynamic"].manifest.fingerprint
    monkeypatch.setattr(Host, "measure", lambda *rest: pytest.fail("timed again"))
    kept = export(mixed, [Onnx()], Silent())[0]
    assert kept.up_to_date
    assert not list((mixed / "work").iterdir())
    assert pipeline.verify(artifact.folder).parity.status == "checked"
    _holds_levels(artifact, source)


def _holds_levels(artifact: Artifact, source: Source) -> None:
    """The note has the SQNR of each simulation to the original."""
    golden = artifact.golden()
    (name,) = golden.original
    for form in choosing.FORMS:
        answers = run_graph(Onnx().lower(source.graph, decided(source.plan, form)), golden.inputs)[name]
        noise = np.square(answers.astype(np.float64) - golden.original[name]).sum()
        level = 10 * np.log10(np.square(golden.original[name].astype(np.float64)).sum() / noise)
        assert f"{form} {level:.1f} dB" in artifact.manifest.history[-1]["notes"][0]


def test_a_format_with_one_form_times_nothing(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stopwatch(monkeypatch, 0.5)
    manifest = exported(mixed, Tensorrt()).manifest
    assert not seen
    assert manifest.dialect == TENSORRT.forms["static"]
    (note,) = manifest.history[-1]["notes"]
    assert note.startswith("activations = 'static', the only form this file can have: tensorrt: conv2d is to round its")


def test_openvino_has_both_forms_where_its_engine_rounds_at_run_time(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ov = pytest.importorskip("openvino")
    try:
        require_rounding(ov)
    except Unsupported as error:
        pytest.skip(error.message)
    seen = stopwatch(monkeypatch, 0.5)
    levels(monkeypatch, 40.0, 45.0)
    manifest = exported(mixed, Openvino()).manifest
    assert len(seen) == 3
    assert manifest.dialect == OPENVINO.forms["dynamic"]


def test_openvino_falls_back_to_static_where_its_engine_does_not(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")

    def refuse(ov: Any) -> None:
        raise Unsupported("OpenVINO rounds no activations at run time on this processor")

    monkeypatch.setattr("edgepack.export.openvino.require_rounding", refuse)
    manifest = exported(mixed, Openvino(name="fallen-back")).manifest
    assert manifest.dialect == OPENVINO.forms["static"]
    (note,) = manifest.history[-1]["notes"]
    assert note.startswith("activations = 'static', the only form this file can have: OpenVINO rounds no activations")


def test_a_network_without_layers_to_round_at_run_time_times_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = stopwatch(monkeypatch, 0.5)
    manifest = exported(made(tmp_path, Pictures), Onnx()).manifest
    assert not seen
    assert manifest.dialect == ONNX_RUNTIME.forms["static"]
    assert "no layer is computed in another way with activations = 'dynamic'" in manifest.history[-1]["notes"][0]


@pytest.mark.parametrize(("static", "dynamic", "form"), [(40.0, 45.0, "static"), (10.0, 20.0, "dynamic")])
def test_where_no_engine_runs_a_rule_decides_and_says_so(
    forms: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, static: float, dynamic: float, form: str
) -> None:
    def refuse(*rest: Any) -> Any:
        raise DeviceError("it is interpreted here")

    monkeypatch.setattr(choosing, "profile", refuse)
    levels(monkeypatch, static, dynamic)
    choice = choose(forms.__getitem__, Silent())
    assert choice.form == form
    assert choice.note.endswith("; by rule, nothing was timed: it is interpreted here")


def test_a_format_with_no_form_says_why() -> None:
    def write(form: str) -> Any:
        raise Unsupported(f"no {form} here")

    with pytest.raises(Unsupported, match="no static here"):
        choose(write, Silent())


def test_float_files_do_not_ask(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stopwatch(monkeypatch, 0.5)
    manifest = exported(mixed, Onnx(name="plain", precision="float32")).manifest
    assert manifest.dialect == "float32"
    assert not seen
    assert manifest.history[-1]["notes"] == []


def test_only_what_is_open_is_decided() -> None:
    nodes = {"conv": {"activations": "auto"}, "last": {"activations": "float"}, "relu": {"operator": "relu"}}
    plan = Plan(nodes)
    assert undecided(plan)
    done = decided(plan, "dynamic")
    assert not undecided(done)
    assert done.nodes == {**nodes, "conv": {"activations": "dynamic"}}
    assert nodes["conv"] == {"activations": "auto"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 8}, "activations = 'auto' says how activations are rounded"),
        ({"target": "avx2"}, "needs activations in fixed ranges: activations = 'static'"),
    ],
)
def test_options_that_leave_nothing_to_choose(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(activations="auto", **options)


@pytest.mark.slow
def test_the_host_decides(mixed: Path) -> None:
    """Whichever is faster here: a ratio of floors with the range that it had."""
    step = exported(mixed, Onnx()).manifest.history[-1]
    figures = r"takes (\S+) × the time of static \(floors of .*: (\S+) … (\S+)\) on this machine: "
    found = re.search(figures, step["notes"][0])
    assert found is not None
    value, low, high = map(float, found.groups())
    assert low <= value <= high
    assert 0.1 < value < 10
