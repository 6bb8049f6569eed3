"""The graph view: which layer does an operator's work, and how axes move between layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from edgepack.compress._axis import backward, forward  # noqa: E402
from edgepack.compress._equal import difference, results, rounding  # noqa: E402
from edgepack.compress._graph import GraphView, argument, named, operator_of, put_layer, readers, shape  # noqa: E402
from edgepack.compress._sharing import own_copies  # noqa: E402
from edgepack.errors import Unsupported  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


def view_of(module: nn.Module, *size: int) -> GraphView:
    return GraphView.of(module, Task(inputs=(Input("x", size, dynamic={"batch": 0}),)))


class Applied(nn.Module):
    """Runs a function of (layers, input)."""

    def __init__(self, how: Callable[[Any, Any], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.how = how
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Any) -> Any:
        return self.how(self, x)


def test_calls_come_in_order_with_their_paths() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    module = Applied(lambda m, x: m.a(m.b(m.a(x))).flatten(1), a=block, b=block)
    module = nn.Sequential(module, nn.Linear(48, 2), nn.LayerNorm(2))
    view = view_of(module, 1, 3, 4, 4)
    assert [call.path for call in view.calls] == ["0.a.0", "0.a.1", "0.b.0", "0.b.1", "0.a.0", "0.a.1", "1", "2"]
    assert all(call.obstacle is None for call in view.calls)
    assert len(view.calls_of(block[0])) == 3
    assert view.calls_of(block[2]) == []
    assert all(view.call_at(call.node) is call for call in view.calls)
    assert [operator_of(node) for node in view.nodes][:3] == [
        torch.ops.aten.conv2d,
        torch.ops.aten.batch_norm,
        torch.ops.aten.relu,
    ]


def test_arguments_by_name_and_shapes_at_the_example() -> None:
    (call,) = view_of(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), 1, 3, 4, 4).calls
    assert argument(call.node, "padding") == [1, 1]
    assert argument(call.node, "groups") == 1
    assert argument(call.node, "no such") is None
    assert shape(call.node) == (2, 8, 4, 4)


@pytest.mark.parametrize(
    ("how", "obstacle"),
    [
        (lambda m, x: m.fc(x), None),
        (lambda m, x: m.fc(x) + m.fc.bias, "its parameters are also used outside of the layer"),
        (lambda m, x: F.linear(m.fc(x), m.fc.weight), "its parameters are also used outside of the layer"),
    ],
)
def test_obstacles(how: Any, obstacle: str | None) -> None:
    view = view_of(Applied(how, fc=nn.Linear(4, 4)), 1, 4)
    assert [call.obstacle for call in view.calls] == [obstacle]


def test_computed_weights_are_an_obstacle_and_tied_ones_are_not() -> None:
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert [call.obstacle for call in view_of(normed, 1, 4).calls] == ["its weight is computed, not a plain parameter"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert [call.obstacle for call in view_of(tied, 1, 4).calls] == [None, None]


def test_attention_does_not_pass_for_its_inner_linear_layer() -> None:
    module = Applied(lambda m, x: m.mha(x, x, x)[0], mha=nn.MultiheadAttention(4, 2, batch_first=True))
    assert view_of(module, 1, 3, 4).calls == ()


def test_readers_do_not_count_those_that_ask_for_the_shape() -> None:
    module = Applied(lambda m, x: (y := m.fc(x)).flatten(0, 1).relu().reshape_as(y), fc=nn.Linear(4, 4))
    (call,) = view_of(module, 1, 3, 4).calls
    assert len(call.node.users) == 2
    assert [operator_of(node) for node in readers(call.node)] == [torch.ops.aten.flatten]


def test_bypass_keeps_the_graph_whole() -> None:
    view = view_of(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()), 1, 4)
    first, norm = view.calls
    view.bypass(norm.node)
    assert [operator_of(node) for node in readers(first.node)] == [torch.ops.aten.relu]
    view.program.graph.lint()


def test_what_cannot_be_captured_says_so() -> None:
    with pytest.raises(Unsupported, match="control flow depends on data"):
        view_of(Applied(lambda m, x: x * 2 if x.sum() > 0 else x), 1, 4)


@pytest.mark.parametrize(
    ("path", "patterns", "match"),
    [
        ("layer1.0.conv1", ["layer1"], True),
        ("layer1.0.conv1", ["layer1.*"], True),
        ("layer1.0.conv1", ["*.conv?"], True),
        ("layer10.0.conv1", ["layer1"], False),
        ("layer1.0.conv1", ["conv1"], False),
        ("layer1", [], False),
    ],
)
def test_patterns(path: str, patterns: list[str], match: bool) -> None:
    assert named(path, patterns) is match


AXIS = [
    (lambda x: x.flatten(2), (None, 1), [0, 1, None, None]),
    (lambda x: x.flatten(0, 1), None, [None, None, 1, 2]),
    (lambda x: x.permute(0, 2, 3, 1), None, [0, 3, 1, 2]),
    (lambda x: x.transpose(1, -1), None, [0, 3, 2, 1]),
    (lambda x: x.unsqueeze(1), None, [0, 2, 3, 4]),
    (lambda x: x[..., None].squeeze(-1), None, [0, 1, 2, 3]),
    (lambda x: x.reshape(x.shape[0], 3, 35), None, [0, 1, None, None]),
    (lambda x: x.reshape(x.shape[0], 35, 3), None, [0, None, None, None]),
    (lambda x: x.view(x.shape[0], 3, 5, 7, 1), None, [0, 1, 2, 3]),
    (lambda x: F.pad(x, (1, 1)), "zeros", [0, 1, 2, None]),
    (lambda x: F.pad(x, (-1, 0)), None, [0, 1, 2, None]),
    (lambda x: F.pad(x, (1, 1), value=2.0), None, [None] * 4),
    (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), None, [0, 1, None, None]),
    (lambda x: F.dropout(x, training=False), None, [0, 1, 2, 3]),
    (lambda x: F.dropout(x, training=True), None, [None] * 4),
    (lambda x: x.relu(), None, [None] * 4),
    (lambda x: x.flip(1), None, [None] * 4),
    (lambda x: x.contiguous().clone(), None, [0, 1, 2, 3]),
]


@pytest.mark.parametrize(("how", "extra", "axes"), AXIS)
def test_axes_move_as_the_values_do(how: Callable[[Any], Any], extra: Any, axes: list[int | None]) -> None:
    view = view_of(Applied(lambda m, x: how(x)), 1, 3, 5, 7)
    nodes = [node for node in view.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    for axis, want in enumerate(axes):
        at: int | None = axis
        for node in nodes:
            step = None if at is None else forward(node, at)
            assert step is None or (step.zeros == (extra == "zeros"))
            at = None if step is None else step.axis
        assert at == want
        if want is not None:
            _check_values(how, axis, want, zeros=extra == "zeros")
            for node in reversed(nodes):
                back = backward(node, want)
                assert back is not None
                want = back.axis
            assert want == axis


def _check_values(how: Callable[[Any], Any], axis: int, want: int, zeros: bool) -> None:
    """Scaling along the axis before is scaling along the other axis after."""
    x = torch.randn(2, 3, 5, 7)
    scale = torch.arange(1.0, x.shape[axis] + 1)
    before = how(x * scale.view([-1 if i == axis else 1 for i in range(4)]))
    after = how(x)
    torch.testing.assert_close(before, after * scale.view([-1 if i == want else 1 for i in range(after.dim())]))


def test_put_layer_replaces_every_name() -> None:
    norm, new = nn.BatchNorm2d(3), nn.Identity()
    module = nn.Sequential(norm, nn.Sequential(norm, nn.ReLU()))
    module.add_module("again", norm)
    put_layer(module, norm, new)
    assert module[0] is module[1][0] is module.again is new


def test_own_copies_separate_names_and_keep_parameters_tied() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module = nn.Sequential(block, block)
    own_copies(module, ["0.1", "1.1"])
    assert module[0] is not module[1]
    assert module[0][0] is module[1][0]
    assert module[0][1] is not module[1][1]
    assert module[0][1].weight is module[1][1].weight
    module[1][1].weight = nn.Parameter(torch.zeros(2, 2))
    assert not torch.equal(module[0][1].weight, module[1][1].weight)


def test_results_and_differences() -> None:
    x = torch.tensor([1.0, -2.0])
    noisy = Applied(lambda m, x: {"a": F.dropout(x, 0.5, training=True), "b": x.neg_()})
    assert all(torch.equal(a, b) for a, b in zip(results(noisy, [x]), results(noisy, [x]), strict=True))
    assert x.tolist() == [1.0, -2.0]
    assert difference([x], [x * 1.01], 1e-4)[0] == pytest.approx(0.01 / 1.01, rel=1e-4)
    assert difference([x], [x, x], 1e-4)[0] == float("inf")
    assert difference([x.half()], [x.half()], 1e-4) == (0.0, 16 * 2**-10)
    odd = torch.tensor([float("nan"), float("inf"), 1.0])
    assert difference([odd], [odd], 1e-4)[0] == 0.0
    assert difference([odd], [odd.nan_to_num()], 1e-4)[0] == float("inf")
    assert difference([odd[:2]], [odd[:2]], 1e-4)[0] == 0.0
    assert difference([], [], 1e-4)[0] == 0.0


def test_rounding_tells_steep_networks_from_calm_ones() -> None:
    x = torch.randn(2, 8)
    assert 0 < rounding(nn.Linear(8, 3), [x]) < 1e-6
    assert rounding(Applied(lambda m, x: (x * 1e5).sin()), [x]) > 1e-4
    assert rounding(Applied(lambda m, x: x * 2), [torch.ones(3, dtype=torch.int64)]) == 0
