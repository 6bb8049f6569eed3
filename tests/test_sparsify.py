"""sparsify: patterns, what is chosen, what makes up for it, and that zeros stay."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgepack import parts
from edgepack.compress._allocation import by_shape, by_threshold, evenly
from edgepack.compress._eliminate import eliminate
from edgepack.compress._graph import GraphView
from edgepack.compress._patterns import Pattern
from edgepack.compress._permute import best_order, chain_before
from edgepack.compress._sparsifying import share_at
from edgepack.compress._tune import Tune
from edgepack.compress.quantize import Quantize
from edgepack.compress.sparsify import Sparsify
from edgepack.compressing import PassRun, compress
from edgepack.contracts import Exporter
from edgepack.data import Arrays
from edgepack.errors import InputError, Unsupported
from edgepack.exporting import export
from edgepack.losses import find as find_loss
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task

ITEM = Input("x", (1, 3, 8, 8))


class Small(nn.Module):
    """Two layers that may exchange channels, a depthwise one between them, and ends that stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.b = nn.Conv2d(16, 8, 1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = torch.relu(self.depthwise(torch.relu(self.norm(self.a(x)))))
        scores: Tensor = self.last((self.b(y) + x).mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    module = Small()
    module.norm.running_mean.normal_()  # type: ignore[operator, union-attr]
    module.norm.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    return module.eval()


@pytest.fixture(scope="module")
def task() -> Task:
    random = np.random.default_rng(0)
    data = Arrays((ITEM,), {"x": random.normal(size=(48, 3, 8, 8)).astype("float32")}, random.integers(0, 4, 48), True)
    return Task((ITEM,), calibration=data, training=data, loss=find_loss("cross_entropy", Path()))


def job(network: nn.Module, task: Task, folder: Path) -> PassRun:
    return PassRun(folder, 0, Plan(), Silent(), network, task)


def applied(network: nn.Module, task: Task, folder: Path, how: Sparsify) -> tuple[nn.Module, PassRun]:
    run = job(network, task, folder)
    return how.apply(copy.deepcopy(network), task, run), run


def zeros(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight == 0


def outputs(module: nn.Module, task: Task) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(torch.from_numpy(task.samples(48)["x"]))
    return result


@pytest.mark.parametrize("word", ["3:2", "4:4", "0:4", "1x1", "4x1", "blocks", "2:4 "])
def test_words_that_are_no_pattern(word: str) -> None:
    with pytest.raises(ValueError, match="pattern is unstructured, N:M such as 2:4, or 1xN such as 1x4, not"):
        Sparsify(pattern=word)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.0}, "sparsity is above 0 and below 1, not 1.0"),
        ({"sparsity": 0.8, "pattern": "2:4"}, "pattern = '2:4' has a sparsity of 0.5"),
        ({"allocation": "globl"}, "allocation is one of global, layerwise, erk, not 'globl'"),
        ({"schedule": "gradual"}, "schedule = 'gradual' makes weights zero while training: add a table tune"),
        ({"schedule": "gradual", "pattern": "2:4"}, "'2:4' cannot"),
        ({"layers": "a"}, "layers is a list of layer names"),
        ({"samples": 0}, "samples is a whole number from 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Sparsify(**options)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=6), st.floats(0.05, 0.95), st.integers(0, 99))
def test_every_allocation_hits_the_sparsity(sizes: list[int], sparsity: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shapes = [(size, 1 + seed % 5) for size in sizes]
    counts = [rows * columns for rows, columns in shapes]
    scores = [torch.rand(shape, generator=random) for shape in shapes]
    wanted = round(sparsity * sum(counts))
    for found in (evenly(counts, sparsity), by_shape(counts, shapes, sparsity)):
        assert sum(found) == wanted
        assert all(0 <= zero <= count for zero, count in zip(found, counts, strict=True))
    found = by_threshold(scores, sparsity)
    assert sum(found) == wanted
    if sparsity < 0.5:  # then no layer reaches the guard, and it is one threshold
        least = torch.cat([layer.flatten() for layer in scores]).sort().values[wanted - 1] if wanted else -1.0
        guards = [layer.flatten().sort().values[-1] for layer in scores]
        if all(guard > least for guard in guards):
            assert found == [int((layer <= least).sum()) for layer in scores]


def test_shape_decides_which_layers_stay_denser() -> None:
    counts, shapes = [16 * 16 * 9, 256 * 256 * 9], [(16, 16, 3, 3), (256, 256, 3, 3)]
    few, many = by_shape(counts, shapes, 0.9)
    density = [1 - few / counts[0], 1 - many / counts[1]]
    assert density[0] == pytest.approx(1.0) or density[0] / density[1] == pytest.approx(
        (38 / (256 * 9)) / (518 / (65536 * 9)), rel=0.01
    )


def test_elimination_with_unrelated_inputs_is_by_magnitude() -> None:
    weight = torch.randn(1, 6, 20, generator=torch.Generator().manual_seed(1)).double()
    kept = Pattern().lowest(weight.square(), 60)
    found, mask = eliminate(weight, kept, torch.eye(20).double()[None], Pattern())
    assert torch.equal(mask, kept)
    torch.testing.assert_close(found, weight * kept)


def test_elimination_is_better_than_zeroing_and_solves_its_mask_exactly() -> None:
    random = torch.Generator().manual_seed(2)
    mix, noise = torch.randn(24, 6, generator=random), torch.randn(24, 500, generator=random)
    x = (mix @ torch.randn(6, 500, generator=random) + 0.5 * noise).double()
    weight, moments = torch.randn(1, 8, 24, generator=random).double(), (x @ x.T)[None]
    kept = Pattern().lowest(weight.square(), 96)
    found, mask = eliminate(weight, kept, moments, Pattern())
    assert int((~mask).sum()) == 96
    assert not found[~mask].any()

    def error(values: Tensor) -> float:
        return float(((values - weight)[0] @ x).square().sum())

    assert error(found) < 0.5 * error(weight * kept)
    for row in range(8):
        rows = mask[0, row].nonzero().flatten()
        wanted = (weight[0, row] @ x).numpy()
        best = np.linalg.lstsq(x[rows].T.numpy(), wanted, rcond=None)[0]
        own = float(np.square(best @ x[rows].numpy() - wanted).sum())
        mine = float(((found - weight)[0, row] @ x).square().sum())
        assert own * (1 - 1e-9) <= mine <= 1.1 * own + 1e-6  # damped a little


def test_permutation_keeps_more_and_comes_near_the_reference() -> None:
    scores = torch.rand(64, 128, generator=torch.Generator().manual_seed(0))
    order = best_order(scores, 2, 4)

    def kept(values: Tensor) -> float:
        return float(values.reshape(64, -1, 4).topk(2, -1).values.sum())

    assert sorted(order.tolist()) == list(range(128))
    half = float(scores.topk(64, 1).values.sum())
    assert (kept(scores[:, order]) - kept(scores)) / (half - kept(scores)) > 0.32  # of the gap to any half of a row


def test_permutation_alone_changes_nothing(network: nn.Module, task: Task) -> None:
    module = copy.deepcopy(network)
    before = outputs(module, task)
    chain = chain_before(GraphView.of(module, task), module.b)  # type: ignore[arg-type]
    assert chain is not None
    assert chain.producer is module.a
    assert set(chain.between) == {module.norm, module.depthwise}
    chain.permute(torch.randperm(16, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(outputs(module, task), before, rtol=1e-5, atol=1e-5)
    assert chain_before(GraphView.of(module, task), module.a) is None  # what it reads is added as well  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["data-aware", "magnitude"])
def test_two_of_four(network: nn.Module, task: Task, tmp_path: Path, method: str) -> None:
    found, run = applied(network, task, tmp_path, Sparsify(pattern="2:4", method=method))
    for layer in (found.a, found.b):
        groups = zeros(layer).movedim(1, -1).reshape(-1, 4)  # type: ignore[arg-type]
        assert bool((groups.sum(1) == 2).all())
    assert not zeros(found.first).any()  # type: ignore[arg-type]
    assert not zeros(found.depthwise).any()  # type: ignore[arg-type]
    assert not zeros(found.last).any()  # type: ignore[arg-type]
    assert any("exchanged input channels of 1 layer," in note for note in run.notes)


def test_blocks_share_their_columns(network: nn.Module, task: Task, tmp_path: Path) -> None:
    found, _ = applied(network, task, tmp_path, Sparsify(pattern="1x4", sparsity=0.75))
    total = 0
    for layer in (found.a, found.b):
        blocks = zeros(layer).flatten(1).unflatten(0, (-1, 4))  # type: ignore[arg-type]
        assert bool((blocks.all(1) | ~blocks.any(1)).all())
        total += int(blocks.sum())
    assert abs(total - 0.75 * (16 * 8 * 9 + 8 * 16)) <= 4


def test_data_lose_less_than_magnitude(network: nn.Module, task: Task, tmp_path: Path) -> None:
    before = outputs(network, task)
    errors = {}
    for method in ("data-aware", "magnitude"):
        found, _ = applied(network, task, tmp_path, Sparsify(sparsity=0.6, method=method))
        errors[method] = float((outputs(found, task) - before).square().sum())
    assert errors["data-aware"] < 0.7 * errors["magnitude"]


def test_layers_that_are_named_also_at_the_ends(network: nn.Module, task: Task, tmp_path: Path) -> None:
    found, run = applied(network, task, tmp_path, Sparsify(sparsity=0.5, layers=("last", "b")))
    assert int(zeros(found.last).sum() + zeros(found.b).sum()) == (32 + 128) // 2  # type: ignore[arg-type]
    assert not zeros(found.a).any()  # type: ignore[arg-type]
    assert run.findings["sparsity"]["dense"]["a"] == "'layers' does not name it"


def test_masks_are_in_the_plan(network: nn.Module, task: Task, tmp_path: Path) -> None:
    found, run = applied(network, task, tmp_path, Sparsify(sparsity=0.5))
    masks = {name: value for name, value in run.plan.tensors.items() if name.endswith("/mask")}
    assert len(masks) == 2
    for mask, layer in zip(masks.values(), (found.a, found.b), strict=True):
        assert np.array_equal(mask, ~zeros(layer).numpy())  # type: ignore[arg-type]
    run.plan.save(tmp_path)
    assert Plan.load(tmp_path).tensors.keys() == run.plan.tensors.keys()


@pytest.mark.parametrize("schedule", ["one-shot", "gradual"])
def test_zeros_stay_through_training(network: nn.Module, task: Task, tmp_path: Path, schedule: str) -> None:
    how = Sparsify(sparsity=0.7, schedule=schedule, tune=Tune(epochs=4, batch=16, held_out=0))
    found, run = applied(network, task, tmp_path, how)
    count = int(zeros(found.a).sum() + zeros(found.b).sum())  # type: ignore[arg-type]
    assert abs(count - 0.7 * (16 * 8 * 9 + 8 * 16)) <= 1
    assert not torch.equal(found.first.weight, network.first.weight)  # type: ignore[arg-type]
    assert run.findings["tune"]["kept"] >= (3 if schedule == "gradual" else 0)


def test_growth_is_a_cubic() -> None:
    shares = [share_at(step / 10, 0.8) for step in range(11)]
    assert shares[0] == 0.0
    assert shares[-1] == pytest.approx(0.8)
    assert all(later > sooner for sooner, later in itertools.pairwise(shares))
    assert shares[5] == pytest.approx(0.8 * (1 - 0.5**3))


ROUNDINGS = {
    **{name: Quantize(rounding=name, explain=False) for name in ("nearest", "gptq", "adaround")},
    "qat": Quantize(method="qat", explain=False, tune=Tune(epochs=1, batch=16, held_out=0)),
    "qat, 4 bits": Quantize(method="qat", weight_bits=4, activation_bits=8, explain=False,
                            tune=Tune(epochs=1, batch=16, held_out=0)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # of PyTorch's own copies
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zeros_stay_through_rounding(network: nn.Module, task: Task, tmp_path: Path, rounding: str) -> None:
    found, run = applied(network, task, tmp_path, Sparsify(sparsity=0.6))
    before = {name: zeros(layer).sum() for name, layer in (("a", found.a), ("b", found.b))}  # type: ignore[arg-type]
    rounded = ROUNDINGS[rounding].apply(found, task, run)
    masks = {name: value for name, value in run.plan.tensors.items() if name.endswith("/mask")}
    assert len(masks) == 2
    for (name, count), mask in zip(before.items(), masks.values(), strict=True):
        weight = zeros(rounded.get_submodule(name))
        assert (~mask).sum() == count
        assert bool(weight[torch.from_numpy(~mask)].all())


def integers_of(path: Path) -> list[np.ndarray]:
    """The 8-bit weights of two axes or more that a file holds."""
    if path.suffix == ".onnx":
        onnx = pytest.importorskip("onnx", reason="pip install edgepack[onnx]")
        found = [onnx.numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer]
    else:
        schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="pip install edgepack[tflite]")
        model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        stored = [(tensor, model.buffers[tensor.buffer].data) for tensor in model.subgraphs[0].tensors]
        found = [np.asarray(data, np.uint8).view(np.int8).reshape(tensor.shape) for tensor, data in stored
                 if tensor.type == schema.TensorType.INT8 and data is not None]  # fmt: skip
    return [array for array in found if array.dtype == np.int8 and array.ndim > 1]


@pytest.mark.parametrize("target", ["onnx", "tflite"])
def test_zeros_are_zeros_in_files_of_eight_bits(network: nn.Module, task: Task, tmp_path: Path, target: str) -> None:
    how = Sparsify(sparsity=0.6, allocation="layerwise", layers=("a", "b", "last"))
    compress(network, task, [how, Quantize(explain=False)], tmp_path, Silent())
    (made,) = export(tmp_path, [parts.find(Exporter, target)()], Silent())  # type: ignore[type-abstract]
    path = made.artifact.file(f".{target}")
    counts = {array.size: int((array == 0).sum()) for array in integers_of(path)}
    for size in (16 * 8 * 9, 16 * 8, 8 * 4):
        assert counts[size] >= 0.6 * size - 1


def test_what_cannot_be(network: nn.Module, task: Task, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sparsify: layers: no layer is called 'c'"):
        Sparsify(layers=("c",)).check(network, task)
    with pytest.raises(InputError, match="sparsify: the task has no calibration data"):
        Sparsify().check(network, Task((ITEM,)))
    Sparsify(method="magnitude").check(network, Task((ITEM,)))
    with pytest.raises(Unsupported, match=r"sparsify: Small has no layer for 2:4 .*: its 3 input channels"):
        applied(network, task, tmp_path, Sparsify(pattern="2:4", layers=("first",)))
