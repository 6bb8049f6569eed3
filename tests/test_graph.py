"""Capture, saving, layout and preprocessing in the graph; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgepack.artifact import Manifest
from edgepack.contracts import Graph
from edgepack.errors import EdgepackError, InputError, Unsupported
from edgepack.front import with_front
from edgepack.graph import capture, fixed_batch, load_graph, recapture, run_graph, run_module, save_graph
from edgepack.task import Input, Task


def image_task(*dynamic: str) -> Task:
    item = Input(
        "image", (1, 3, 16, 24), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), scale=255, dynamic=dynamic or ("batch",)
    )
    return Task((item,))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.PixelShuffle(2)
    )


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_captured_graph_computes_the_module_at_any_batch_and_size(batch: int) -> None:
    net = small_net()
    graph = capture(net, image_task("batch", "height", "width"))
    x = np.random.default_rng(0).standard_normal((batch, 3, 20, 33), dtype=np.float32)
    expected = net(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_array_equal(run_graph(graph, {"image": x})["output"], expected)
    assert graph.inputs[0].shape == ("batch", 3, "height", "width")
    assert graph.outputs[0].shape[0] == "batch"


def test_saving_and_loading_keeps_the_answers_and_no_source_paths(tmp_path: Path) -> None:
    graph = capture(small_net(), image_task())
    save_graph(graph, tmp_path)
    assert str(Path(__file__).name).encode() not in (tmp_path / "model.pt2").read_bytes()
    manifest = Manifest("pt2", "a", "aten", graph.inputs, graph.outputs)
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 24), dtype=np.float32)
    again = load_graph(tmp_path, manifest)
    np.testing.assert_array_equal(run_graph(again, {"image": x})["output"], run_graph(graph, {"image": x})["output"])


def test_normalize_takes_raw_pixels() -> None:
    net, task = small_net(), image_task()
    front = with_front(capture(net, task), None, True)
    assert (front.inputs[0].dtype, front.inputs[0].layout, front.inputs[0].shape) == (
        "uint8",
        "NHWC",
        ("batch", 16, 24, 3),
    )
    assert front.preprocessing["image"].identity  # what is left to the caller: the size of the picture
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    x = ((pixels / 255 - task.inputs[0].mean) / task.inputs[0].std).transpose(0, 3, 1, 2).astype(np.float32)
    expected = net(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(run_graph(front, {"image": pixels})["output"], expected, atol=1e-5)


def test_what_is_baked_in_keeps_the_rule_of_size() -> None:
    task = Task((Input("image", (1, 3, 16, 24), mean=(0.4, 0.5, 0.6), scale=255, resize=32), Input("facts", (1, 4))))

    class Two(nn.Module):
        def forward(self, image: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
            return image.mean((1, 2, 3))[:, None] * facts

    left = with_front(capture(Two(), task), None, True).preprocessing
    assert left["image"].identity
    assert left["image"].resize == 32


def test_a_fixed_batch_keeps_the_answers() -> None:
    net = small_net().eval()
    graph = fixed_batch(capture(net, image_task()))
    assert graph.inputs[0].shape == (1, 3, 16, 24)
    assert graph.outputs[0].shape[0] == 1
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 24)).astype(np.float32)
    expected = net(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(run_graph(graph, {"image": x})["output"], expected, atol=1e-5)
    assert fixed_batch(graph) is graph


def test_a_fixed_batch_on_the_second_axis_stays_there() -> None:
    net = nn.LSTM(4, 5).eval()
    task = Task((Input("x", (3, 1, 4), dynamic={"batch": 1}),))
    graph = fixed_batch(capture(net, task))
    x = np.random.default_rng(0).standard_normal((3, 6, 4)).astype(np.float32)
    expected = net(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(next(iter(run_graph(graph, {"x": x}).values())), expected, atol=1e-5)


def test_a_tensor_made_in_forward_can_be_captured_again() -> None:
    class Scaled(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)

    graph = capture(Scaled(), image_task())
    again = recapture(graph, graph.program.module(check_guards=False))
    x = np.ones((2, 3, 16, 24), np.float32)
    assert run_graph(again, {"image": x})["output"][0, :, 0, 0].tolist() == [1, 2, 3]


def test_layout_nhwc_keeps_values_and_preprocessing() -> None:
    net = small_net()
    graph = capture(net, image_task())
    front = with_front(graph, "NHWC", False)
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 24), dtype=np.float32)
    there = run_graph(front, {"image": np.ascontiguousarray(x.transpose(0, 2, 3, 1))})["output"]
    np.testing.assert_array_equal(there, run_graph(graph, {"image": x})["output"])
    assert front.preprocessing == graph.preprocessing


def test_normalize_without_an_image_is_refused() -> None:
    graph = capture(nn.Linear(4, 2), Task((Input("x", (1, 4)),)))
    assert with_front(graph, "NHWC", False) is graph
    with pytest.raises(Unsupported, match="no input of this model is an image"):
        with_front(graph, None, True)


class TwoInputs(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": left + right, "product": left * right}


def test_several_inputs_and_named_outputs() -> None:
    task = Task((Input("left", (1, 4)), Input("right", (1, 4))))
    graph = capture(TwoInputs(), task)
    assert [spec.name for spec in graph.outputs] == ["sum", "product"]
    found = run_graph(graph, {"left": np.full((3, 4), 2.0, np.float32), "right": np.full((3, 4), 3.0, np.float32)})
    assert (found["sum"] == 5).all()
    assert (found["product"] == 6).all()


def test_inputs_in_another_order_than_forward_are_refused() -> None:
    task = Task((Input("right", (1, 4)), Input("left", (1, 4))))
    with pytest.raises(InputError, match=r"the network takes \['left', 'right'\]"):
        capture(TwoInputs(), task)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(5, 7, 2)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
        y, (h, c) = self.cell(x, (h, c))
        return {"y": y, "h_next": h, "c_next": c}


def test_explicit_state_with_the_batch_on_its_second_axis() -> None:
    state = {"dynamic": {"batch": 1}}
    inputs = [Input("x", (3, 1, 5), **state), Input("h", (2, 1, 7), **state), Input("c", (2, 1, 7), **state)]  # type: ignore[arg-type]
    net = Recurrent()
    graph = capture(net, Task(tuple(inputs)))
    samples = Task(tuple(inputs)).samples(6)
    assert {name: array.shape for name, array in samples.items()} == {"x": (3, 6, 5), "h": (2, 6, 7), "c": (2, 6, 7)}
    found, expected = run_graph(graph, samples, batch=4), run_module(net, graph, samples)
    for name in ("y", "h_next", "c_next"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 3) * 2


class Sized(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nonzero(x > 0).float()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.count


@pytest.mark.parametrize(
    ("net", "shape", "kind", "message"),
    [
        (DataDependent(), (1, 3), Unsupported, r"control flow depends on data: test_graph.py:\d+: return x if"),
        (Sized(), (1, 3), Unsupported, "the size of what nonzero returns depends on the data"),
        (nn.Linear(4, 2), (1, 5), InputError, r"does not run on the task's inputs \(x \[2, 5\]\)"),
        (Counting(), (1, 3), Unsupported, "the network changes 'count' while it runs"),
    ],
    ids=["data-dependent", "data-dependent-size", "wrong-shape", "hidden-state"],
)
def test_what_cannot_be_captured_says_why(net: nn.Module, shape: Any, kind: type[EdgepackError], message: str) -> None:
    with pytest.raises(kind, match=message):
        capture(net, Task((Input("x", shape),)))


def test_a_network_with_a_fixed_batch_is_captured_at_the_given_shape() -> None:
    graph: Graph = capture(FixedBatch(), Task((Input("x", (2, 3)),)))
    assert graph.inputs[0].shape == (2, 3)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(run_graph(graph, {"x": x})["output"], 2 * x)


def test_a_fixed_axis_that_was_asked_to_be_dynamic_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    task = Task((Input("x", (1, 3, 8, 8), dynamic=("batch", "height")),))
    with pytest.raises(EdgepackError):
        capture(net, task)
