"""The parity proof: figures against NumPy by hand, and a wrong artifact is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack import parity
from edgepack.artifact import Artifact, Golden, Manifest, describe_files
from edgepack.contracts import Runtime, TensorSpec
from edgepack.errors import DeviceError, ParityError, Unsupported

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Pretend(Runtime):
    """An engine that computes what the test says."""

    formats: ClassVar[tuple[str, ...]] = ("pretend",)
    function: Callable[[Array], Array]

    def version(self) -> str:
        return "1"

    def load(self, artifact: Artifact, threads: int | None = None) -> Any:
        return PretendSession(self.function)


@dataclass
class PretendSession:
    function: Callable[[Array], Array]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return {"y": self.function(inputs["x"])}

    def close(self) -> None:
        return None


def artifact(folder: Path) -> Artifact:
    x = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    folder.mkdir()
    Golden({"x": x}, {"y": 2 * x}, {"y": 2 * x}).save(folder / "golden.npz")
    spec = TensorSpec("x", "float32", ("batch", 5))
    manifest = Manifest("pretend", "a", "float32", (spec,), (replace(spec, name="y"),), describe_files(folder))
    (folder / "artifact.json").write_text(manifest.to_json())
    return Artifact.open(folder)


def test_a_right_artifact_is_checked(tmp_path: Path) -> None:
    found = parity.check(artifact(tmp_path / "a"), Pretend(function=lambda x: 2 * x))
    assert (found.status, found.max_rel, found.samples, found.agreement) == ("checked", 0.0, 8, 1.0)
    assert found.sqnr_db is None


def test_the_figures_are_those_of_the_formulas(tmp_path: Path) -> None:
    found = parity.check(artifact(tmp_path / "a"), Pretend(function=lambda x: 2 * x * np.float32(1 + 1e-5)))
    assert found.max_rel == pytest.approx(1e-5, rel=0.05)
    assert found.sqnr_db == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 2.001 * x,
        lambda x: x[:, ::-1] * 2,
        lambda x: 2 * x[:, :4],
        lambda x: np.full_like(x, np.nan),
        lambda x: np.full_like(x, np.inf),
    ],
    ids=["scaled", "swapped", "shape", "nan", "inf"],
)
def test_a_wrong_artifact_is_a_parity_error(tmp_path: Path, wrong: Callable[[Array], Array]) -> None:
    with pytest.raises(ParityError, match="pretend 'a': output 'y' differs from its simulation") as caught:
        parity.check(artifact(tmp_path / "a"), Pretend(function=wrong))
    assert caught.value.exit_status == 6


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.floats(-1, 1, width=32))
def test_max_relative_is_the_definition(values: list[float], shift: float) -> None:
    b = np.array(values, dtype=np.float32)
    a = b + np.float32(shift)
    difference, top = np.abs(a.astype(np.float64) - b).max(), np.abs(b).max()
    expected = 0.0 if difference == 0 else math.inf if top == 0 else difference / top
    assert parity.max_relative(a, b) == pytest.approx(expected, rel=1e-12)


def test_equal_infinities_agree_and_nan_never_does() -> None:
    a = np.array([np.inf, -np.inf, 1.0])
    assert parity.max_relative(a, a.copy()) == 0.0
    assert parity.max_relative(a, -a) == math.inf
    assert parity.max_relative(np.array([np.nan]), np.array([np.nan])) == math.inf
    assert parity.sqnr_db(a, -a) is None
    assert parity.max_relative(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == math.inf


def test_agreement_is_for_class_scores_only() -> None:
    scores = np.eye(4)
    assert parity.agreement(scores[::-1], scores) == 0.0
    assert parity.agreement(np.zeros((2, 3, 4)), np.zeros((2, 3, 4))) is None


def test_a_format_nobody_reads() -> None:
    with pytest.raises(Unsupported, match="no engine here reads 'cuneiform'"):
        parity.runtime_for("cuneiform")


@dataclass(frozen=True, kw_only=True)
class Absent(Runtime):
    """The engine of a format, on a machine without its device."""

    formats: ClassVar[tuple[str, ...]] = ("pretend",)

    def version(self) -> str:
        raise DeviceError("there is no such device")

    def load(self, artifact: Artifact, threads: int | None = None) -> Any:
        raise AssertionError("never loaded")


@dataclass(frozen=True, kw_only=True)
class Prover(Pretend):
    """Reads the format too, but is not its engine."""

    formats: ClassVar[tuple[str, ...]] = ("other",)
    proves: ClassVar[tuple[str, ...]] = ("pretend",)
    function: Callable[[Array], Array] = lambda x: x


def test_another_engine_proves_numbers_but_does_not_stand_for_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"absent": Absent, "prover": Prover}
    monkeypatch.setattr(parity.parts, "names", lambda kind: sorted(classes))
    monkeypatch.setattr(parity.parts, "find", lambda kind, name: classes[name])
    assert isinstance(parity.runtime_for("pretend"), Prover)
    with pytest.raises(DeviceError, match="no such device"):
        parity.runtime_for("pretend", proof=False)
    assert isinstance(parity.runtime_for("other", proof=False), Prover)


def test_an_engine_may_compute_in_fewer_digits(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Coarse(Pretend):
        def limit(self, artifact: Artifact) -> float:
            return 1e-2

    coarse = Coarse(function=lambda x: 2 * x * np.float32(1.001))
    assert parity.check(artifact(tmp_path / "a"), coarse).status == "checked"
    with pytest.raises(ParityError, match=r"limit 0\.01"):
        parity.check(artifact(tmp_path / "b"), replace(coarse, function=lambda x: 2 * x * np.float32(1.1)))
