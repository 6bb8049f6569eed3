"""Programs for other processors, run by QEMU, give the answers of the simulation."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")

from torch import nn  # noqa: E402

from _bits import Many, alike  # noqa: E402
from _c_files import Everything, captured, compressed, drawn, write  # noqa: E402
from _networks import Network  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.contracts import Graph  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
emulated = importlib.import_module("_emulated")
sys.path.remove(str(BENCHMARKS))
Made = tuple[Artifact, Graph]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, 2, 1, groups=24), nn.Conv2d(24, 10, 1))
    return Network(lambda a, b, c, x: torch.softmax(c(b(torch.relu(a(x)))).mean((2, 3)), 1), *layers)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("emulated")
    torch.manual_seed(0)
    source = compressed(folder, Everything())
    return {
        "float": write(captured(network(), 1, 3, 9, 11), folder / "float"),
        "integers": write(source.graph, folder / "integers", source.plan),
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all programs: they share compiled kernels."""
    return tmp_path_factory.mktemp("work")


def answer(processor: object, artifact: Artifact, inputs: dict[str, np.ndarray], work: Path) -> np.ndarray:
    if (lacking := processor.missing()) is not None:  # type: ignore[attr-defined]
        pytest.skip(lacking)
    program = processor.build(artifact.folder, work)  # type: ignore[attr-defined]
    done = processor.run(program)  # type: ignore[attr-defined]
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("self-test of 1 samples: largest difference ")
    inputs["x"].tofile(work / "in")
    done = processor.run(program, "run", str(work / "in"), str(work / "out"))  # type: ignore[attr-defined]
    assert done.returncode == 0, done.stdout + done.stderr
    return np.fromfile(work / "out", np.float32)


@pytest.mark.parametrize("processor", emulated.PROCESSORS, ids=lambda processor: processor.name)
def test_integers_are_those_of_the_simulation(processor: object, made: dict[str, Made], work: Path) -> None:
    artifact, simulation = made["integers"]
    inputs = drawn(simulation, 3)
    (wanted,) = run_graph(simulation, inputs).values()
    np.testing.assert_array_equal(answer(processor, artifact, inputs, work), wanted.ravel())


@pytest.mark.parametrize("processor", emulated.PROCESSORS, ids=lambda processor: processor.name)
def test_floats_stay_near_the_simulation(processor: object, made: dict[str, Made], work: Path) -> None:
    artifact, simulation = made["float"]
    inputs = drawn(simulation, 3)
    (wanted,) = run_graph(simulation, inputs).values()
    found = answer(processor, artifact, inputs, work)
    np.testing.assert_allclose(found, wanted.ravel(), rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("form", ["xnor", "tree"])
@pytest.mark.parametrize("processor", emulated.PROCESSORS, ids=lambda processor: processor.name)
def test_layers_of_signs_are_their_float_reference(processor: object, form: str, tmp_path: Path, work: Path) -> None:
    layers = Many(1, 20).eval()
    artifact, simulation = write(captured(layers, 1, 3, 11, 13), tmp_path / form, binary=form)
    inputs = drawn(simulation)
    wanted = run_graph(simulation, inputs)
    ends = np.cumsum([values.size for values in wanted.values()])[:-1]
    found = zip(wanted.items(), np.split(answer(processor, artifact, inputs, work), ends), strict=True)
    alike({name: part.reshape(values.shape) for (name, values), part in found}, wanted, layers)


def test_vectors_and_plain_c_give_the_same_floats(made: dict[str, Made], work: Path) -> None:
    artifact, simulation = made["float"]
    plain, vectors = (answer(processor, artifact, drawn(simulation), work) for processor in emulated.PROCESSORS[:2])
    np.testing.assert_array_equal(plain, vectors)


def test_instructions_are_counted_exactly(made: dict[str, Made], work: Path) -> None:
    plain, _, dot = emulated.PROCESSORS[:3]
    needs_compiler()
    if (lacking := plain.missing()) is not None:
        pytest.skip(lacking)
    counter, folder = emulated.plugin(work), made["integers"][0].folder
    counts = []
    for processor in (plain, plain, dot):
        program = processor.build(folder, work)
        counts.append(processor.instructions(program, counter))
    assert abs(counts[0] - counts[1]) < 0.01 * counts[0]  # printing the time differs
    assert counts[2] < 0.7 * counts[0]
