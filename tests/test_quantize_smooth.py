"""Smoothing between layer norms and linear layers leaves the network the same function."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from edgepack.compress._preparing import parameters  # noqa: E402
from edgepack.compress._smooth import Norm, norms, smooth  # noqa: E402
from edgepack.graph import capture  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
TASK = Task((Input("x", (1, 6, 16)),))


class Block(nn.Module):
    """Pre-norm attention of torch, a norm with two readers, a norm read through a selected token."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.both = nn.LayerNorm(16)
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        y = self.both(x)
        x = x + self.one(y) * torch.sigmoid(self.other(y))
        return self.head(self.last(x)[:, 0])


def found(module: nn.Module) -> list[Norm]:
    graph = capture(module, TASK)
    return norms(graph.program.graph, parameters(module, graph))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.25, 0.5, 0.9]))
def test_the_function_stays_the_same(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    module = Block().eval()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.weight.copy_(torch.logspace(-2, 2, 16)[torch.randperm(16)])
                layer.bias.normal_()
    x = torch.randn(4, 6, 16)
    with torch.no_grad():
        before = module.double()(x.double())
        module.float()
        places = found(module)
        assert [len(place.weights) for place in places] == [1, 1, 2, 1]
        for place in places:
            high = torch.rand(16) * 50 + 0.01
            assert smooth(place, -high, high, share) > 1.0
        after = module.double()(x.double())
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


def test_a_wide_channel_becomes_narrow() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        module[0].weight[3] = 100.0
    places = found(module)
    with torch.no_grad():
        values = module[0](torch.randn(1, 256, 16))[0]
        smooth(places[0], values.amin(0), values.amax(0))
        wide = module[0](torch.randn(1, 256, 16))[0].abs().amax(0)
    assert float(wide[3] / wide.median()) < 15


class Post(nn.Module):
    """The norm's result goes on unchanged too."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.affine = nn.LayerNorm(16, elementwise_affine=not affine), nn.Linear(16, 16), affine

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.linear(y) if self.affine else y + self.linear(y)


@pytest.mark.parametrize("affine", [False, True])
def test_norms_that_something_else_reads_or_that_have_no_weight_stay(affine: bool) -> None:
    assert found(Post(affine).eval()) == []


def test_shared_weights_stay_when_one_of_their_readers_reads_something_else() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(self.norm(x)))

    assert found(Shared().eval()) == []
