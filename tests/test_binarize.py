"""Binary layers: ±1 everywhere, trained, with shorter trees where they are pulled."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402

from edgepack import metrics  # noqa: E402
from edgepack.compress._binary import Binary, Sign  # noqa: E402
from edgepack.compress._projecting import shortened  # noqa: E402
from edgepack.compress._tree_pull import TreePull, tree_of  # noqa: E402
from edgepack.compress._tune import Tune  # noqa: E402
from edgepack.compress.binarize import Binarize  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.data import Arrays  # noqa: E402
from edgepack.errors import InputError, Unsupported  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

ITEM = Input("x", (1, 3, 8, 8), scale=255, mean=(0.5,), std=(0.25,))


def net(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for stride in (1, 2):
        blocks += [nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 4)).eval()


def images(count: int, seed: int = 0) -> Arrays:
    """Dark noise with a bright quarter that says the class."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 4, count)
    x = random.integers(0, 140, (count, 8, 8, 3), dtype=np.uint8)
    for image, quarter in zip(x, y, strict=True):
        image[4 * (quarter // 2) :, 4 * (quarter % 2) :][:4, :4] += 60
    return Arrays((ITEM,), {"x": x}, y)


def task() -> Task:
    data = images(256)
    return Task(
        (ITEM,), calibration=data, training=data, evaluation=images(200, 1), metric=metrics.find("top1", Path())
    )


def binarized(folder: Path, **options: Any) -> tuple[nn.Module, PassRun]:
    of = task()
    run = PassRun(folder, 0, Plan(), Silent(), net(), of)
    part = Binarize(**options)
    module = net()
    part.check(module, of)
    return part.apply(module, of, run), run


def accuracy(module: nn.Module) -> float:
    (batch,) = task().evaluation.batches(1000)  # type: ignore[union-attr]
    with torch.no_grad():
        return float((module(torch.from_numpy(batch.inputs["x"])).argmax(1).numpy() == batch.targets).mean())


def test_projection_shortens_trees_and_says_what_it_costs(tmp_path: Path) -> None:
    options = {"mst": "none", "tune": replace(TUNE, epochs=2)}
    plain, before = binarized(tmp_path / "a", **options)
    short, after = binarized(tmp_path / "b", mst_projection=0.6, **options)
    lengths = [[row["tree_length"] for row in run.findings["binarize"]["layers"].values()] for run in (before, after)]
    assert all(two < 0.6 * one for one, two in zip(*lengths, strict=True))
    found = after.findings["projection"]
    assert found["before"] == pytest.approx(accuracy(plain))
    assert found["after"] == pytest.approx(accuracy(short))
    assert any("flipped 0.6 of the weights" in note and "top1" in note for note in after.notes)


def test_the_smallest_latent_weights_are_flipped_first() -> None:
    signs = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], bool)
    latent = np.array([[1, 1, 1, 1, 1, 1], [1, 1, -0.4, -0.1, -0.3, -0.2]], np.float32)
    found = shortened(signs, latent, 0.5)
    root = int((found == signs).all(1).argmax())
    child = 1 - root
    np.testing.assert_array_equal(found[root], signs[root])
    assert (found[child] != signs[child]).sum() == 2
    if child == 1:
        np.testing.assert_array_equal(found[1], [1, 1, 0, 1, 0, 1])


TUNE = Tune(epochs=6, lr=0.02, optimizer="adamw", teacher="none", batch=32, held_out=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, PassRun]]:
    kinds = {"none": {}, "tree": {"mst_weight": 2.0}, "centre": {"mst_weight": 2.0}}
    return {
        kind: binarized(tmp_path_factory.mktemp(kind), mst=kind, tune=TUNE, **options)
        for kind, options in kinds.items()
    }


def test_interrupted_while_trees_are_pulled_it_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"mst_weight": 2.0, "tune": replace(TUNE, epochs=3)}
    calm, _ = binarized(tmp_path / "calm", **options)
    advance = TreePull.advance

    def stop(self: TreePull, progress: float) -> None:
        if progress > 0.8:
            raise KeyboardInterrupt
        advance(self, progress)

    with monkeypatch.context() as patch:
        patch.setattr(TreePull, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            binarized(tmp_path / "killed", **options)
    resumed, run = binarized(tmp_path / "killed", **options)
    assert any("went on after epoch 2" in note for note in run.notes)
    wanted = calm.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())


def test_sign_has_two_values_and_the_published_gradient() -> None:
    sign = Sign(torch.tensor(0.5), 2.0)
    x = torch.tensor([-3.0, -0.5, 0.5, 1.0, 9.0], requires_grad=True)
    y = sign(x)
    y.sum().backward()
    assert y.tolist() == [-1, -1, 1, 1, 1]
    distance = np.abs((np.array([-3.0, -0.5, 0.5, 1.0, 9.0]) - 0.5) / 2)
    np.testing.assert_allclose(x.grad, np.where(distance < 1, 2 - 2 * distance, 0) / 2, atol=1e-6)


def test_weights_and_inputs_are_signs_and_nothing_else_is(trained: dict[str, tuple[nn.Module, PassRun]]) -> None:
    module, _ = trained["none"]
    binary = {name: layer for name, layer in module.named_modules() if isinstance(layer, Binary)}
    assert list(binary) == ["3", "6"]
    for layer in binary.values():
        assert set(layer.layer.weight.unique().tolist()) == {-1.0, 1.0}  # type: ignore[operator, union-attr]
        read: list[Any] = []
        handle = layer.layer.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0]))
        module(torch.randn(2, 3, 8, 8))
        handle.remove()
        assert set(read[0].unique().tolist()) == {-1.0, 1.0}
    assert len(module[0].weight.unique()) > 2  # type: ignore[index, union-attr]


def test_training_teaches_a_binary_network(trained: dict[str, tuple[nn.Module, PassRun]]) -> None:
    assert min(accuracy(module) for module, _ in trained.values()) > 0.9


@pytest.mark.parametrize("kind", ["tree", "centre"])
def test_pulled_trees_are_shorter(trained: dict[str, tuple[nn.Module, PassRun]], kind: str) -> None:
    plain, pulled = (trained[name][1].findings["binarize"] for name in ("none", kind))
    assert pulled["tree_operations"] < 0.75 * plain["tree_operations"]
    assert pulled["stored_bits"] < plain["stored_bits"]
    assert pulled["weights"] == plain["weights"] == 2 * 16 * 16 * 9


def test_costs_are_the_formulas(trained: dict[str, tuple[nn.Module, PassRun]]) -> None:
    for row, pixels in zip(trained["tree"][1].findings["binarize"]["layers"].values(), (64, 16), strict=True):
        assert row["pixels"] == pixels
        assert row["dense_operations"] == 16 * 144 * pixels
        assert row["tree_operations"] == (144 + row["tree_length"]) * pixels


def test_the_term_counts_what_differs_along_the_tree() -> None:
    layer = Binary(nn.Conv2d(4, 6, 3, bias=False), torch.zeros(4), 1.0, shortcut=False)
    pull = TreePull([layer], "tree", 3.0, epochs=4)
    pull.advance(0.1)
    assert pull.loss() == 0
    pull.advance(1.0)
    assert float(pull.loss().detach()) == pytest.approx(3.0 * tree_of(layer).length / (6 * 36), rel=1e-5)


def test_padding_is_minus_one_and_the_shortcut_adds_the_input() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()  # type: ignore[union-attr]
    binary = Binary(layer, torch.zeros(4), 1.0, shortcut=True)
    binary.settle()
    x = torch.randn(2, 4, 5, 5)
    padded = torch.nn.functional.pad(torch.where(x >= 0, 1.0, -1.0), (1, 1, 1, 1), value=-1.0)
    sums = torch.nn.functional.conv2d(padded, torch.where(weight >= 0, 1.0, -1.0))
    wanted = x + sums * weight.abs().flatten(1).mean(1).view(-1, 1, 1) + bias.view(-1, 1, 1)
    torch.testing.assert_close(binary(x), wanted)


def test_wrong_requests_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mst is one of tree, centre, none, not 'trees'"):
        Binarize(mst="trees")
    with pytest.raises(InputError, match="no layer is called 'conv9'"):
        binarized(tmp_path, layers=("conv9",))
    of = task()
    run = PassRun(tmp_path, 0, Plan(), Silent(), net(), of)
    depthwise = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(96, 4)).eval()
    with pytest.raises(Unsupported, match="no layer to make binary"):
        Binarize().apply(depthwise, of, run)
    with pytest.raises(Unsupported, match="1 cannot be made binary: a depthwise convolution"):
        Binarize(layers=("1",)).apply(depthwise, of, run)
    with pytest.raises(InputError, match="no training data"):
        Binarize(tune=TUNE).check(net(), Task((ITEM,)))


def test_without_training_it_says_so(tmp_path: Path) -> None:
    module, run = binarized(tmp_path)
    assert any("was not trained" in note for note in run.notes)
    assert module(torch.randn(1, 3, 8, 8)).shape == (1, 4)


def counted(module: nn.Module, size: int, folder: Path, **options: Any) -> tuple[int, int]:
    """Weights and bit operations of the binary layers."""
    of = Task((Input("x", (1, 3, size, size)),))
    run = PassRun(folder, 0, Plan(), Silent(), module, of)
    Binarize(**options).apply(module, of, run)
    return run.findings["binarize"]["weights"], run.findings["binarize"]["dense_operations"]


def chain(widths: list[int], halved: dict[int, nn.Module], first: nn.Module, places: int) -> nn.Module:
    """Convolutions one after the other: those of a network, and its counts."""
    layers = [first]
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers += [halved[index]] if index in halved else []
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(places, 10)).eval()


@pytest.mark.slow
def test_counts_of_vgg_small_are_the_published_ones(tmp_path: Path) -> None:
    halved: dict[int, nn.Module] = {1: nn.MaxPool2d(2), 3: nn.MaxPool2d(2)}
    network = chain([128, 128, 256, 256, 512, 512], halved, nn.Conv2d(3, 128, 3, padding=1), 2048)
    assert counted(network, 32, tmp_path) == (4_571_136, 603_979_776)


@pytest.mark.slow
def test_counts_of_resnet18_are_the_published_ones(tmp_path: Path) -> None:
    widths = [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
    halved: dict[int, nn.Module] = {index: nn.MaxPool2d(2) for index in (4, 8, 12)}
    network = chain(widths, halved, nn.Conv2d(3, 64, 7, stride=4, padding=3), 2048)
    assert counted(network, 224, tmp_path) == (10_985_472, 1_676_279_808)
