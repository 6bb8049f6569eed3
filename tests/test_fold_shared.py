"""Folding where one layer, block or parameter is used at several places."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from _folding import Cases, check, fold, norms, relative, scramble, task  # noqa: E402


class Heads(nn.Module):
    """One convolution shared by levels that have norms of their own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1)
        self.also = self.stem if how == "names" else None
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x: Any) -> Any:
        second = self.stem if self.also is None else self.also
        return F.relu(self.norms[0](self.stem(x))) + self.norms[1](second(x * 2))


def test_a_shared_layer_under_two_names_is_cloned_in_place() -> None:
    module = scramble(Heads("names"))
    notes = check(module, 1, 4, 5, 5)
    assert module.stem is not module.also
    assert "is used 2 times, next to different layers: made separate copies" in notes.text
    assert "20 parameters larger" not in notes.text  # two norms of 8 went, a convolution of 20 came


def test_a_shared_block_is_cloned_down_to_its_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.b = self.a
            self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Any) -> Any:
            return self.norm2(self.b(self.norm1(self.a(x)).relu()))

    module = scramble(Net())
    check(module, 1, 4, 5, 5)
    assert module.a[2] is not module.b[2]
    assert module.a[0].weight is module.b[0].weight


def test_a_layer_called_twice_under_one_name_is_cloned_in_a_traced_graph() -> None:
    notes = check(scramble(Heads("calls")), 1, 4, 5, 5)
    assert "the network continues as a traced graph" in notes.text


def test_a_layer_called_twice_in_a_traced_graph_is_cloned_there() -> None:
    module = torch.fx.symbolic_trace(scramble(Heads("calls")))
    check(module, 1, 4, 5, 5)
    assert torch.equal(module.stem.weight, module.stem_2.weight) is False


def test_a_dict_stays_a_dict_in_a_traced_graph() -> None:
    def how(m: Any, x: Any) -> Any:
        return {"a": m.norm(m.conv(x)), "b": (m.other(m.conv(x * 2)),)}

    module = scramble(Cases(how))
    x = torch.randn(3, 4, 5, 5)
    want = module(x)
    folded, _ = fold(module, task(1, 4, 5, 5))
    assert norms(folded) == 0
    assert relative(folded(x)["a"].detach(), want["a"].detach()) < 1e-5
    assert relative(folded(x)["b"][0].detach(), want["b"][0].detach()) < 1e-5


def test_a_shared_pair_folds_without_a_copy() -> None:
    def how(m: Any, x: Any) -> Any:
        return m.norm(m.conv(m.norm(m.conv(x)).relu()))

    module = scramble(Cases(how))
    module.other = nn.Identity()
    folded, notes = fold(module, task(1, 4, 5, 5))
    assert folded is module
    assert norms(folded) == 0
    assert "copies" not in notes.text


def test_one_norm_behind_two_layers_folds_into_both() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x: Any) -> Any:
            return self.norm(self.a(x)) * self.norm(self.b(x))

    check(scramble(Net()), 1, 4, 5, 5)


def test_tied_parameters_are_not_changed_elsewhere() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    module[3].weight = module[0].weight
    check(scramble(module), 1, 4, 5, 5)
