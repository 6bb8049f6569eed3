"""Training losses by name: numbers against PyTorch's own, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
import torch.nn.functional as F  # noqa: E402

from edgepack import losses, metrics  # noqa: E402
from edgepack.errors import InputError  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

X = Input("x", (1, 3))


@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3), (2, 4, 3, 5)])
def test_cross_entropy(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(shape)
    targets = torch.randint(0, 4, (shape[0], *shape[2:]), dtype=torch.uint8)
    targets.flatten()[0] = metrics.IGNORED
    wanted = F.cross_entropy(scores, targets.long(), ignore_index=metrics.IGNORED)
    assert torch.equal(losses.find("cross_entropy", Path())(scores, targets), wanted)
    smooth = losses.find({"use": "cross_entropy", "label_smoothing": 0.1}, Path())
    assert smooth.classifies
    wanted = F.cross_entropy(scores, targets.long(), ignore_index=metrics.IGNORED, label_smoothing=0.1)
    assert torch.equal(smooth(scores, targets), wanted)
    if len(shape) == 2:
        assert torch.equal(smooth(scores, targets[:, None]), wanted)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("mse", F.mse_loss),
        ("l1", F.l1_loss),
        ("smooth_l1", F.smooth_l1_loss),
        ("bce", F.binary_cross_entropy_with_logits),
    ],
)
def test_the_others(name: str, reference: object) -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(5, 3, requires_grad=True), torch.rand(5, 3, dtype=torch.float64)
    loss = losses.find(name, Path())
    assert not loss.classifies
    found = loss(outputs, targets)
    torch.testing.assert_close(found, reference(outputs, targets.float()))  # type: ignore[operator]
    found.backward()
    assert outputs.grad is not None


def test_what_a_metric_implies() -> None:
    def task(metric: object, **more: object) -> Task:
        return Task((X,), metric=metrics.find(metric, Path()), **more)  # type: ignore[arg-type]

    found = losses.loss_of(task({"use": "top1", "output": "logits"}))
    assert found is not None
    assert (found.name, found.output) == ("cross_entropy", "logits")
    assert losses.classifies(task("agreement"))
    assert losses.loss_of(task("agreement")) is None
    assert not losses.classifies(task("psnr"))
    own = losses.find("l1", Path())
    assert losses.loss_of(task("top1", loss=own)) is own
    assert losses.loss_of(Task((X,))) is None
    assert not losses.classifies(Task((X,)))


def test_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def third(outputs, targets):\n    return (outputs - targets).abs().pow(3).mean()\n\n\n"
        "def many(outputs, targets):\n    return outputs\n\n\n"
        "def wrong(outputs, targets):\n    raise KeyError('oops')\n"
    )
    loss = losses.find({"use": "mine.py:third", "output": "a"}, tmp_path)
    assert float(loss(torch.full((2,), 3.0), torch.ones(2))) == 8
    assert (loss.output, loss.classifies) == ("a", False)
    with pytest.raises(InputError, match=r"loss mine\.py:many: gives Tensor torch\.Size\(\[2\]\), expected a tensor"):
        losses.find("mine.py:many", tmp_path)(torch.ones(2), torch.ones(2))
    with pytest.raises(InputError, match=r"loss mine\.py:wrong of outputs \(2,\) and targets \(2,\) failed: KeyError"):
        losses.find("mine.py:wrong", tmp_path)(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cross_entrpy", "there is no loss 'cross_entrpy'"),
        ({"use": "mse", "smoothing": 1}, "loss mse: unknown option 'smoothing'"),
        ({"use": "smooth_l1", "beta": "x"}, "loss smooth_l1: beta is a number, not 'x'"),
        ("gone.py:loss", "gone.py does not exist"),
    ],
)
def test_refusals(spec: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        losses.find(spec, Path())  # type: ignore[arg-type]


def test_labels_and_shapes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="labels reach from 0 to 9, the output has 4 classes"):
        losses.find("cross_entropy", Path())(torch.zeros(2, 4), torch.tensor([0, 9]))
    with pytest.raises(InputError, match=r"loss mse of outputs \(2, 4\) and targets \(2,\) failed: .* differ in shape"):
        losses.find("mse", Path())(torch.zeros(2, 4), torch.zeros(2))
