"""Measuring on this machine with engines made of Python: what is refused, recorded, reported. No timing is asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from edgepack import parts
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, Manifest, Parity, describe_files
from edgepack.contracts import Arrays, Contender, Device, Meter, Runtime, Settings, TensorSpec
from edgepack.devices import _cold, _energy, _facts
from edgepack.devices.host import Host
from edgepack.devices.meters.rapl import Rapl
from edgepack.errors import DeviceError, InputError, MeasurementError, ParityError
from edgepack.measurement import Profile

QUICK = Settings(max_seconds=0.3, instances=2, cold=False)

ENGINE = """
from dataclasses import dataclass
from typing import ClassVar
from edgepack.contracts import Runtime


class Session:
    def __init__(self, factor):
        self.factor = factor

    def run(self, inputs):
        return {"y": inputs["x"] * self.factor}

    def close(self):
        pass


@dataclass(frozen=True, kw_only=True)
class Doubling(Runtime):
    formats: ClassVar[tuple[str, ...]] = ("fake",)
    factor: float = 2.0

    def version(self):
        return "1.0"

    def load(self, artifact, threads=None):
        if self.factor > 100:
            raise RuntimeError("factor out of reach")
        return Session(self.factor)
"""


@dataclass(frozen=True, kw_only=True)
class Recording(Runtime):
    """Doubles its input; keeps count of what it was asked."""

    formats: ClassVar[tuple[str, ...]] = ("fake",)

    factor: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "log", [])

    def version(self) -> str:
        return "1.0"

    def load(self, artifact: Artifact, threads: int | None = None) -> RecordingSession:
        self.log.append(("load", threads))  # type: ignore[attr-defined]
        return RecordingSession(self.factor, self.log)  # type: ignore[attr-defined]


@dataclass
class RecordingSession:
    factor: float
    log: list[Any]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        if len(self.log) < 1000:
            self.log.append(("run", inputs["x"].shape))
        return {"y": inputs["x"] * np.float32(self.factor)}

    def close(self) -> None:
        self.log.append(("close", None))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    folder = tmp_path / "double"
    folder.mkdir()
    inputs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    Golden({"x": inputs}, {"y": inputs * 2}, {"y": inputs * 2}).save(folder / GOLDEN)
    manifest = Manifest(
        format="fake",
        name="double",
        dialect="none",
        inputs=(TensorSpec("x", "float32", ("batch", 3)),),
        outputs=(TensorSpec("y", "float32", ("batch", 3)),),
        files=describe_files(folder),
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return Artifact.open(folder)


def measure(contenders: Sequence[Contender], settings: Settings = QUICK) -> list[Profile]:
    return Host().measure(contenders, settings)


def test_host_is_found_by_name() -> None:
    assert parts.find(Device, "host") is Host  # type: ignore[type-abstract]
    assert parts.find(Meter, "rapl") is Rapl  # type: ignore[type-abstract]


def test_two_contenders(artifact: Artifact) -> None:
    runtime, seen = Recording(), []  # type: ignore[var-annotated]
    pair = [Contender("a", artifact, runtime), Contender("b", artifact, runtime)]
    first, second = Host().measure(pair, QUICK, seen.append)
    assert first.ratio is None
    assert second.ratio is not None
    assert second.ratio.against == "a"
    assert second.ratio.low <= second.ratio.value <= second.ratio.high
    assert first.checked
    assert first.latency_ms.n > 0
    assert (first.load_ms, first.first_ms, first.peak_bytes) == (None, None, None)
    assert first.device["kernel"]
    assert first.runtime.endswith(" 1.0")
    assert seen == sorted(seen)
    json.dumps([first.to_json(), second.to_json()], allow_nan=False)
    loads = [entry for entry in runtime.log if entry[0] == "load"]  # type: ignore[attr-defined]
    assert loads == [("load", 1)] * 4
    assert runtime.log[-4:] == [("close", None)] * 4  # type: ignore[attr-defined]
    # the parity check takes all golden samples, timing the first
    assert runtime.log[1] in (("run", (4, 3)), ("run", (1, 3)))  # type: ignore[attr-defined]
    assert ("run", (1, 3)) in runtime.log  # type: ignore[attr-defined]


def test_conditions_say_how_it_was_measured(artifact: Artifact) -> None:
    (profile,) = measure([Contender("a", artifact, Recording())])
    expected = {
        "state", "slow_share", "blocks", "instances", "seconds", "warm_up_seconds", "warm_up_steady", "lead_in",
        "canary_floor_us", "threads", "cores", "tolerance", "half_width", "order_seed", "input", "binding",
        "load_before", "load_after", "steal_share", "involuntary_switches", "floor_ms", "runs_per_block",
        "contention_sensitive", "enough_blocks",
    }  # fmt: skip
    assert set(profile.conditions) == expected
    assert profile.conditions["state"] in ("settled", "not reached", "contended")
    assert profile.conditions["binding"] == "python run"
    assert profile.conditions["instances"] == 2


def test_energy_is_unavailable_with_the_reason(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_energy, "meters", lambda: [Rapl(root="/nowhere/powercap")])
    (profile,) = measure([Contender("a", artifact, Recording())])
    assert profile.energy.kind == "unavailable"
    assert profile.energy.joules is None
    assert profile.energy.reason is not None
    assert profile.energy.reason.startswith("rapl: /nowhere/powercap does not exist")


def test_a_wrong_artifact_is_never_timed(artifact: Artifact) -> None:
    wrong = Recording(factor=2.01)
    with pytest.raises(ParityError, match=r"b: .*double differs from its golden answers by 0\.005") as caught:
        measure([Contender("a", artifact, Recording()), Contender("b", artifact, wrong)])
    assert caught.value.exit_status == 6
    runs = [entry for entry in wrong.log if entry[0] == "run"]  # type: ignore[attr-defined]
    assert len(runs) <= 4
    assert wrong.log[-1] == ("close", None)  # type: ignore[attr-defined]


def test_an_integer_artifact_may_differ_by_as_much_as_its_network_keeps(artifact: Artifact) -> None:
    for least_db, timed in ((45.0, True), (47.0, False)):  # a two-hundredth of all values: 46 dB
        parity = Parity("checked", max_rel=0.0, least_db=least_db)
        integers = replace(artifact, manifest=replace(artifact.manifest, parity=parity))
        pair = [Contender("a", artifact, Recording()), Contender("b", integers, Recording(factor=2.01))]
        if timed:
            assert len(measure(pair)) == 2
            continue
        with pytest.raises(ParityError, match="differs from its golden answers"):
            measure(pair)


def test_not_a_number_is_wrong(artifact: Artifact) -> None:
    with pytest.raises(ParityError):
        measure([Contender("a", artifact, Recording(factor=float("nan")))])


def test_an_accepted_difference_stays_accepted(artifact: Artifact) -> None:
    accepted = dataclasses.replace(artifact.manifest, parity=Parity("checked", "other", max_rel=0.004))
    (profile,) = measure([Contender("a", dataclasses.replace(artifact, manifest=accepted), Recording(factor=2.01))])
    assert profile.checked


@pytest.mark.parametrize(
    "labels, settings, message",
    [
        ([], QUICK, "different labels"),
        (["a", "a"], QUICK, "different labels"),
        (["a", "b"], dataclasses.replace(QUICK, instances=1), "no interval"),
        (["a"], dataclasses.replace(QUICK, instances=0), "no interval"),
        (["a"], dataclasses.replace(QUICK, max_seconds=0), "must be positive"),
        (["a"], dataclasses.replace(QUICK, threads=0), "must be positive"),
    ],
)
def test_nonsense_is_refused(artifact: Artifact, labels: list[str], settings: Settings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure([Contender(label, artifact, Recording()) for label in labels], settings)


@pytest.mark.parametrize("affinity", [(), (0, 0), (-1,), ("0",)])
def test_affinity_is_validated(affinity: Any) -> None:
    with pytest.raises(ValueError, match="different core numbers"):
        Host(affinity=affinity)


def test_affinity_is_a_list_in_recipes() -> None:
    assert Host(affinity=[0]).affinity == (0,)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity_is_set_recorded_and_given_back(artifact: Artifact) -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    (profile,) = Host(affinity=(core,)).measure([Contender("a", artifact, Recording())], QUICK)
    assert profile.conditions["cores"] == [core]
    assert os.sched_getaffinity(0) == before


def test_a_core_that_is_not_there(artifact: Artifact) -> None:
    with pytest.raises(DeviceError, match=r"affinity \[4096\]"):
        Host(affinity=(4096,)).measure([Contender("a", artifact, Recording())], QUICK)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "cold_engine.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("cold_engine", None)
    import cold_engine  # type: ignore[import-not-found]

    return cold_engine.Doubling


def test_cold_figures_come_from_fresh_processes(artifact: Artifact, engine: Any) -> None:
    settings = dataclasses.replace(QUICK, cold=True)
    seen: list[float] = []
    (profile,) = Host().measure([Contender("a", artifact, engine())], settings, seen.append)
    assert profile.load_ms is not None
    assert profile.load_ms > 0
    assert profile.first_ms is not None
    assert profile.first_ms > 0
    assert seen[-1] == pytest.approx(1.0)
    if profile.peak_bytes is not None:
        assert 5e6 < profile.peak_bytes < 5e8


def test_peak_is_not_the_parents(artifact: Artifact, engine: Any) -> None:
    if _cold.peak_bytes() is None:
        pytest.skip("this system does not tell a process's peak memory")
    ballast = np.ones(40_000_000)
    cold = _cold.start_cold(Contender("a", artifact, engine()), 1)
    assert cold.peak_bytes is not None
    assert cold.peak_bytes < ballast.nbytes


def test_a_fresh_process_that_fails_says_why(artifact: Artifact, engine: Any) -> None:
    with pytest.raises(DeviceError, match="a: a fresh process could not run it: RuntimeError: factor out of reach"):
        _cold.start_cold(Contender("a", artifact, engine(factor=1000.0)), 1)


def test_facts_of_a_board(tmp_path: Path) -> None:
    tree = {
        "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\n\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
        "proc/meminfo": "MemTotal:        8388608 kB\n",
        "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12"\n',
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2400000\n",
        "proc/stat": "cpu  10 0 10 70 0 0 0 10 0 0\ncpu0 1 2 3\n",
    }
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    facts = _facts.facts(tmp_path)
    assert facts["processor"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert facts["memory"] == "8.0 GiB"
    assert facts["system"] == "Debian GNU/Linux 12"
    assert facts["governor"] == "ondemand"
    assert facts["frequency"] == "2400 MHz"
    assert "virtualization" not in facts
    assert _facts.stolen_ticks(tmp_path) == (10, 100)


def test_facts_of_a_virtual_machine(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: AMD EPYC\nflags\t\t: fpu hypervisor avx2\n")
    facts = _facts.facts(tmp_path)
    assert facts["processor"] == "AMD EPYC"
    assert facts["virtualization"] == "virtual machine"
    assert "governor" not in facts
    assert "memory" not in facts
    assert _facts.stolen_ticks(tmp_path) is None


def powercap(root: Path, **zones: tuple[str, int]) -> Path:
    for zone, (name, energy_uj) in zones.items():
        folder = root / zone.replace("__", ":").replace("_", "-", 1)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        (folder / "max_energy_range_uj").write_text("999999\n")
    return root


def test_rapl_adds_packages_and_unwraps(tmp_path: Path) -> None:
    zones = {"intel_rapl__0": ("package-0", 900_000), "intel_rapl__1": ("package-1", 100)}
    powercap(tmp_path, **zones, intel_rapl__0__0=("core", 5), intel_rapl__2=("psys", 7))
    meter = Rapl(root=str(tmp_path))
    assert meter.check() is None
    start = meter.joules()
    powercap(tmp_path, intel_rapl__0=("package-0", 950_000), intel_rapl__1=("package-1", 600))
    assert meter.joules() - start == pytest.approx(0.0505)
    powercap(tmp_path, intel_rapl__0=("package-0", 20_000))
    assert meter.joules() - start == pytest.approx(0.1205)
    powercap(tmp_path, intel_rapl__0=("package-0", 10_000))
    assert meter.joules() - start == pytest.approx(0.1205 + 0.99)


def test_rapl_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in str(Rapl(root=str(tmp_path / "none")).check())
    assert "no processor package" in str(Rapl(root=str(tmp_path)).check())
    powercap(tmp_path, intel_rapl__0=("package-0", 1))
    counter = tmp_path / "intel-rapl:0" / "energy_uj"

    def denied(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("edgepack.devices.meters.rapl._number", denied)
        assert Rapl(root=str(tmp_path)).check() == f"{counter} is readable by root only"
    counter.write_text("lost\n")
    assert "cannot be read" in str(Rapl(root=str(tmp_path)).check())
    with pytest.raises(MeasurementError, match="cannot be read"):
        Rapl(root=str(tmp_path)).joules()
    with pytest.raises(MeasurementError, match="are gone"):
        Rapl(root=str(tmp_path / "none")).joules()
    with pytest.raises(ValueError, match="powercap folder"):
        Rapl(root="")


def test_energy_per_inference_from_a_counter_that_wraps(tmp_path: Path) -> None:
    powercap(tmp_path, intel_rapl__0=("package-0", 0))
    counter, clock, random = tmp_path / "intel-rapl:0" / "energy_uj", [0.0], np.random.default_rng(0)
    state = {"uj": 0.0}

    def run(joules: float) -> None:
        clock[0] += 0.1
        state["uj"] += 1e6 * joules * random.normal(1, 0.05)
        counter.write_text(f"{int(state['uj']) % 1_000_000}\n")

    calls = [lambda: run(0.004), lambda: run(0.008)]
    found = _energy.energies(calls, QUICK, [Rapl(root="/nowhere"), Rapl(root=str(tmp_path))], lambda: clock[0])
    for energy, truth in zip(found, (0.004, 0.008), strict=True):
        assert (energy.kind, energy.meter, energy.scope) == ("measured", "rapl", "cpu-package")
        assert energy.joules == pytest.approx(truth, rel=0.03)
        assert energy.joules is not None
        assert energy.low is not None
        assert energy.high is not None
        assert energy.low < energy.joules < energy.high
    assert state["uj"] > 1_000_000


@pytest.mark.slow
def test_real_engine_against_itself() -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'edgepack[onnx-run]'")
    import importlib.util
    import tempfile

    script = Path(__file__).parent.parent / "benchmarks" / "aa.py"
    spec = importlib.util.spec_from_file_location("aa", script)
    assert spec is not None
    assert spec.loader is not None
    aa = importlib.util.module_from_spec(spec)
    sys.modules["aa"] = aa
    spec.loader.exec_module(aa)
    runtime = parts.find(Runtime, "onnxruntime")()  # type: ignore[type-abstract]
    with tempfile.TemporaryDirectory() as scratch:
        small = aa.build(Path(scratch) / "aa")
        profiles = Host().measure([Contender("a", small, runtime), Contender("b", small, runtime)], Settings())
    ratio = profiles[1].ratio
    assert ratio is not None
    assert ratio.verdict in ("same", "cannot tell")
    assert profiles[0].load_ms is not None
    assert profiles[0].runtime.startswith("onnxruntime")
