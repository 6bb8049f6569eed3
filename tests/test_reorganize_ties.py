"""Choices near a tie: margins beside the golden samples, and how an artifact that chose otherwise is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402

from edgepack import _wording, proof  # noqa: E402
from edgepack.artifact import Artifact, Golden, Manifest, describe_files  # noqa: E402
from edgepack.contracts import Graph, Runtime, Step  # noqa: E402
from edgepack.errors import ParityError  # noqa: E402
from edgepack.graph import capture, run_graph  # noqa: E402
from edgepack.parity import check  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402
from edgepack.ties import margins  # noqa: E402

Array = np.ndarray[Any, Any]
TASK = Task((Input("x", (1, 2, 6)),), output_names=("y",))


class Chooser(nn.Module):
    """The sum of values in the order of the two largest scores, times a weight each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.sigmoid(x[:, 0])
        places = scores.topk(2, dim=1).indices
        return x[:, 1].gather(1, places) * 3.0


def compute(x: Array, scores: Callable[[Array], Array] = lambda s: s, factor: float = 3.0) -> list[Step]:
    """The same in NumPy, with other scores or another factor."""
    ranked = scores(1 / (1 + np.exp(-x[:, 0].astype(np.float64)))).astype(np.float32)
    places = np.argsort(-ranked, axis=1, kind="stable")[:, :2]
    chosen = np.take_along_axis(x[:, 1], places, 1)
    return [
        Step("Sigmoid", "", ("x",), {"s": ranked}),
        Step("TopK", "", ("s",), {"v": np.take_along_axis(ranked, places, 1), "i": places}),
        Step("GatherElements", "", ("i",), {"g": chosen}),
        Step("Mul", "", ("g",), {"y": (chosen * np.float32(factor)).astype(np.float32)}),
    ]


@dataclass(frozen=True, kw_only=True)
class Engine(Runtime):
    """NumPy, with a fault at choice."""

    formats: ClassVar[tuple[str, ...]] = ("numpy",)
    scores: Callable[[Array], Array] = lambda s: s
    factor: float = 3.0

    def version(self) -> str:
        return "1"

    def load(self, artifact: Artifact, threads: int | None = None) -> Any:
        return self

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return {"y": compute(inputs["x"], self.scores, self.factor)[-1].outputs["y"]}

    def trace(self, artifact: Artifact, inputs: Any) -> list[Step]:
        return compute(inputs["x"], self.scores, self.factor)

    def close(self) -> None:
        return None


def samples(ties: int, count: int = 4) -> Array:
    """The last two scores of the first ``ties`` samples are one or two units in the last place apart."""
    x = np.random.default_rng(0).standard_normal((count, 2, 6)).astype(np.float32)
    x[:, 0] = np.array([-1, 0.9, 0.2, -0.5, 0.1, 0.0], np.float32)
    x[:ties, 0, 2] = np.float32(0.1) + np.float32(2e-7)
    return x


def made(folder: Path, ties: int) -> tuple[Artifact, Graph]:
    graph = capture(Chooser().eval(), TASK)
    x = {"x": samples(ties)}
    answers = run_graph(graph, x)
    folder.mkdir()
    Golden(x, answers, answers, margins(graph, x)).save(folder / "golden.npz")
    manifest = Manifest("numpy", "a", "float32", graph.inputs, graph.outputs, describe_files(folder))
    (folder / "artifact.json").write_text(manifest.to_json())
    return Artifact.open(folder), graph


def swapped(scores: Array) -> Array:
    """A rounding error: the fifth score ends a little above where it was."""
    nudge = np.zeros_like(scores)
    nudge[:, 4] = 2e-6
    return scores + nudge


def test_margins_are_those_of_sorted_scores() -> None:
    graph = capture(Chooser().eval(), TASK)
    x = samples(1)
    scores = np.sort(1 / (1 + np.exp(-x[:, 0].astype(np.float64))), axis=1)[:, ::-1]
    found = margins(graph, {"x": x})
    assert found is not None
    np.testing.assert_allclose(found, (scores[:, 1] - scores[:, 2]) / scores[:, 1], atol=2e-7)
    assert found[0] < 1e-6 < found[1]


def test_networks_that_choose_nothing_have_no_margin(tmp_path: Path) -> None:
    graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), TASK)
    assert margins(graph, {"x": samples(0)}) is None


def test_golden_files_keep_margins(tmp_path: Path) -> None:
    artifact, _ = made(tmp_path / "a", 1)
    assert artifact.golden().margins is not None
    assert check(artifact, Engine()).margin == pytest.approx(artifact.golden().margins.min())  # type: ignore[union-attr]


def test_a_sample_that_parts_in_a_tie_is_set_aside_and_named(tmp_path: Path) -> None:
    artifact, graph = made(tmp_path / "a", 1)
    found = proof.prove(artifact, Engine(scores=swapped), graph)
    assert found.tied == (0,)
    assert found.samples == 3
    assert found.max_rel is not None
    assert found.max_rel <= 1e-6
    assert "1 more chose otherwise in a tie" in _wording.parity(vars(found))


def test_ties_that_agree_are_judged_like_all_others(tmp_path: Path) -> None:
    artifact, graph = made(tmp_path / "a", 2)
    found = proof.prove(artifact, Engine(), graph)
    assert (found.tied, found.samples) == ((), 4)


def test_a_fault_is_found_beside_ties(tmp_path: Path) -> None:
    artifact, graph = made(tmp_path / "a", 1)
    with pytest.raises(ParityError, match="differs from its simulation"):
        proof.prove(artifact, Engine(factor=3.01), graph)


def test_a_fault_on_tied_samples_alone_is_no_tie(tmp_path: Path) -> None:
    """Scores that are wrong by far more than noise, on a sample that happens to be near a tie."""
    artifact, graph = made(tmp_path / "a", 1)

    def wrong(scores: Array) -> Array:
        return np.where(np.abs(scores[:, 2:3] - scores[:, 4:5]) < 1e-6, 1 - scores, scores)

    with pytest.raises(ParityError, match=r"samples near a tie differ before any choice; .*in the file Sigmoid"):
        proof.prove(artifact, Engine(scores=wrong), graph)


def test_when_every_sample_is_tied_none_can_tell(tmp_path: Path) -> None:
    artifact, _ = made(tmp_path / "a", 4)
    with pytest.raises(ParityError, match="all of them ties within its noise"):
        check(artifact, Engine(scores=swapped))


def test_other_choices_with_a_clear_margin_are_a_fault(tmp_path: Path) -> None:
    artifact, _ = made(tmp_path / "a", 0)
    with pytest.raises(ParityError):
        check(artifact, Engine(scores=lambda s: s[:, ::-1].copy()))
