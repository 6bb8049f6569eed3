"""``activations = "auto"``: which form an export keeps, what it says of it, and that it can be proved again."""

from __future__ import annotations

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
from edgepack import choosing, pipeline  # noqa: E402
from edgepack.artifact import Artifact, Manifest  # noqa: E402
from edgepack.choosing import choose, decided, undecided  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.contracts import Contender, Settings  # noqa: E402
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
from edgepack.measurement import Energy, Latency, Profile, Ratio  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
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


def stopwatch(monkeypatch: pytest.MonkeyPatch, value: float, verdict: str) -> list[list[str]]:
    """A host that measures one ratio; the labels of what it measured."""
    seen: list[list[str]] = []

    def measure(self: Host, contenders: Sequence[Contender], settings: Settings, progress: Any = None) -> list[Profile]:
        seen.append([contender.label for contender in contenders])
        ratio = Ratio(value, value - 0.01, value + 0.01, contenders[0].label, verdict, value)
        latency, energy = Latency(1.0, None, None, 1.0, 1.0, 5), Energy("unavailable")
        return [
            Profile(contender.label, "", latency, ratio if place else None, None, None, None, energy, {}, "", 1)
            for place, contender in enumerate(contenders)
        ]

    monkeypatch.setattr(Host, "measure", measure)
    return seen


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
        (0.9, "cannot tell", 40.5, 40.0, "static"),
    ],
)
def test_the_faster_form_of_those_close_to_the_original_is_chosen(
    forms: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, value: float, verdict: str, static: float,
    dynamic: float, form: str,
) -> None:  # fmt: skip
    seen = stopwatch(monkeypatch, value, verdict)
    levels(monkeypatch, static, dynamic)
    choice = choose(forms.__getitem__, Silent())
    assert seen == [["static", "dynamic"]]
    assert choice.form == form
    far = f", too far is {'static' if static < dynamic else 'dynamic'}"
    apart = far if max(static, dynamic) < 30 and abs(static - dynamic) > 1 else ""
    assert choice.note == (
        f"activations = '{form}'; to the original: static {static:.1f} dB, dynamic {dynamic:.1f} dB{apart}; "
        f"dynamic takes {value:.3f} × the time of static (95 % {value - 0.01:.3f} … {value + 0.01:.3f}) "
        f"on this machine: {verdict}"
    )


def test_the_choice_is_what_its_own_form_would_be_and_is_repeated(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for value, verdict, form in ((2.0, "slower", "static"), (0.5, "faster", "dynamic")):
        stopwatch(monkeypatch, value, verdict)
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
    seen = stopwatch(monkeypatch, 0.5, "faster")
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
    seen = stopwatch(monkeypatch, 0.5, "faster")
    levels(monkeypatch, 40.0, 45.0)
    manifest = exported(mixed, Openvino()).manifest
    assert len(seen) == 1
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
    seen = stopwatch(monkeypatch, 0.5, "faster")
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
    seen = stopwatch(monkeypatch, 0.5, "faster")
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
    """Whichever is faster here: a ratio with its interval around it."""
    step = exported(mixed, Onnx()).manifest.history[-1]
    found = re.search(r"takes (\S+) × the time of static \(95 % (\S+) … (\S+)\) on this machine: ", step["notes"][0])
    assert found is not None
    value, low, high = map(float, found.groups())
    assert low <= value <= high
    assert 0.1 < value < 10
