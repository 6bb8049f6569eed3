"""Reconstruction after pruning: the weights are those of a least-squares problem solved by NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("torch_pruning", reason="pip install 'edgepack[prune]'")
from torch import Tensor, nn  # noqa: E402

from _pruning import TASK, data, net, prune  # noqa: E402
from edgepack.compress._reconstruct import DAMPING, ROWS  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.errors import InputError  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


def task(shape: tuple[int, ...], count: int = 40) -> Task:
    item = Input("x", (1, *shape), layout="NCHW" if len(shape) == 3 else None)
    values = np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)
    return Task((item,), calibration=Arrays((item,), {"x": values}, None, True))


def columns(task: Task) -> Tensor:
    assert task.calibration is not None
    return torch.cat([torch.from_numpy(batch.inputs["x"]) for batch in task.calibration.batches(100)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_the_weights_are_those_of_the_least_squares_problem(kind: str, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5, bias=bias))
        seen = task((7, 6))
    else:
        module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 5, 3, 2, 1, bias=bias))
        seen = task((3, 8, 8))
    plain, _ = prune(module, tmp_path / "plain", seen, macs_ratio=0.6, reconstruct=False)
    found, run = prune(module, tmp_path / "solved", seen, macs_ratio=0.6)
    assert torch.equal(plain[0].weight, found[0].weight)  # type: ignore[index]

    with torch.no_grad():
        wanted, read = module(columns(seen)), found[:2](columns(seen))  # type: ignore[index]
    if kind == "convolution":
        read = nn.functional.unfold(read, 3, padding=1, stride=2).transpose(1, 2)
        wanted = wanted.flatten(2).transpose(1, 2)
    a, b = (one.flatten(0, 1).double().numpy() for one in (read, wanted))
    a = np.concatenate([a, np.ones((len(a), 1))], 1)
    layer = plain[2]  # type: ignore[index]
    shift = np.zeros(5) if layer.bias is None else layer.bias.detach().double().numpy()
    old = np.concatenate([layer.weight.detach().double().flatten(1).numpy(), shift[:, None]], 1)
    damping = np.sqrt(DAMPING * np.mean(np.sum(a * a, 0))) * np.eye(a.shape[1])
    change = np.linalg.lstsq(np.concatenate([a, damping]), np.concatenate([b - a @ old.T, 0 * old.T]), rcond=None)[0]
    new = old + change.T
    np.testing.assert_allclose(found[2].weight.detach().flatten(1), new[:, :-1], atol=1e-5)  # type: ignore[index]
    np.testing.assert_allclose(found[2].bias.detach(), new[:, -1], atol=1e-5)  # type: ignore[index]

    errors = run.findings["channels"]["reconstructed"]
    missing = [float(np.sum((b - a @ one.T) ** 2) / np.sum(b**2)) for one in (old, new)]
    assert errors == {"2": pytest.approx(missing, rel=1e-4)}
    assert missing[1] < 0.8 * missing[0]
    assert any(note.startswith("reconstructed 1 layer: ") for note in run.notes)


def test_layers_follow_one_another_and_what_they_give_may_be_narrower_too(tmp_path: Path) -> None:
    module, seen = net(), Task(TASK.inputs, calibration=data(256))
    outputs = {}
    with torch.no_grad():
        inputs = torch.cat([torch.from_numpy(one.inputs["x"]) for one in data(256).batches(64)])
        for how in (False, True):
            found, run = prune(module, tmp_path / str(how), seen, macs_ratio=0.6, reconstruct=how)
            outputs[how] = float((found(inputs) - module(inputs)).square().sum())
    solved = run.findings["channels"]["reconstructed"]
    assert "thin" in solved
    assert "deep" not in solved
    assert all(last <= first for first, last in solved.values())
    assert outputs[True] < 0.7 * outputs[False]


class Twice(nn.Module):
    """A layer that computes two times, behind one that can be narrower."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again = nn.Linear(6, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.again(torch.relu(self.again(x)))))


def test_layers_stay_that_compute_twice_or_of_which_samples_say_too_little(tmp_path: Path) -> None:
    _, run = prune(Twice(), tmp_path / "twice", task((7, 6)), macs_ratio=0.7)
    assert list(run.findings["channels"]["reconstructed"]) == ["last"]
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    found, run = prune(module, tmp_path / "few", task((6,), ROWS * 9 - 1), macs_ratio=0.5)
    assert found[2].in_features == 8  # type: ignore[index]
    assert run.findings["channels"]["reconstructed"] == {}
    _, run = prune(module, tmp_path / "enough", task((6,), ROWS * 9), macs_ratio=0.5)
    assert list(run.findings["channels"]["reconstructed"]) == ["2"]


def test_without_data_nothing_is_solved_and_asking_for_it_is_an_error(tmp_path: Path) -> None:
    _, run = prune(net(), tmp_path, TASK)
    assert run.findings["channels"]["reconstructed"] == {}
    with pytest.raises(InputError, match="prune: reconstruct looks at data, and the task has none"):
        prune(net(), tmp_path, TASK, reconstruct=True)
