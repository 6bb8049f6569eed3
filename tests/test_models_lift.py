"""A lifted program computes the same with standard layers, keeps its names and dynamic axes, and exports again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgepack.errors import Unsupported
from edgepack.models.lift import lift_program

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning"),
]
DYNAMIC = torch.export.Dim.DYNAMIC


def randomize(module: nn.Module) -> nn.Module:
    """Batch-norm statistics and weights far from their initial values."""
    torch.manual_seed(0)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else -0.3))
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module.eval()


def check(module: nn.Module, *inputs: Tensor, decompose: bool = False, dynamic: bool = True) -> Any:
    randomize(module)
    shapes = tuple({0: DYNAMIC} for _ in inputs) if dynamic else None
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    if decompose:
        program = program.run_decompositions()
    lifted = lift_program(program)
    tried = tuple(torch.cat([x, x])[:3] for x in inputs) if dynamic else inputs
    again = torch.export.export(lifted, inputs, dynamic_shapes=shapes, strict=False)
    with torch.no_grad():
        expected = pytree.tree_leaves(module(*tried))
        for results in (pytree.tree_leaves(lifted(*tried)), pytree.tree_leaves(again.module()(*tried))):
            for ours, theirs in zip(results, expected, strict=True):
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    return lifted


def layers(lifted: Any) -> dict[str, str]:
    return {
        node.target: type(lifted.get_submodule(node.target)).__name__
        for node in lifted.graph.find_nodes(op="call_module")
    }


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)), inplace=True) + x


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(x))
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))[:, 2:10]
        return self.fc(self.drop(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))


@pytest.mark.parametrize("decompose", [False, True])
def test_a_residual_network(decompose: bool) -> None:
    lifted = check(Small(), torch.rand(2, 3, 16, 16), decompose=decompose)
    assert layers(lifted) == {
        "stem": "Conv2d",
        "layer1.0.conv1": "Conv2d",
        "layer1.0.bn1": "BatchNorm2d",
        "layer1.1.conv1": "Conv2d",
        "layer1.1.bn1": "BatchNorm2d",
        "fc": "Linear",
    }
    assert lifted.meta["input_names"] == ("x",)
    assert not lifted.training
    assert not list(lifted.graph.find_nodes(op="get_attr"))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(3, 4, 3, padding="same", dilation=2), (2, 3, 9)),
        (nn.Conv2d(4, 8, (3, 5), stride=(1, 2), padding=(1, 2), groups=2, bias=False), (2, 4, 8, 9)),
        (nn.Conv3d(2, 4, 3, padding=1), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (2, 3, 6)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 2, 2, stride=2), (2, 2, 3, 3, 3)),
        (nn.Linear(6, 4), (2, 3, 6)),
        (nn.BatchNorm1d(6), (2, 6)),
        (nn.BatchNorm1d(6, affine=False), (2, 6, 5)),
        (nn.BatchNorm3d(3, eps=1e-3), (2, 3, 2, 2, 2)),
        (nn.LayerNorm((4, 5)), (2, 4, 5)),
        (nn.LayerNorm(5, bias=False), (2, 4, 5)),
        (nn.GroupNorm(2, 4), (2, 4, 3, 3)),
        (nn.InstanceNorm2d(4, affine=True), (2, 4, 5, 5)),
        (nn.RMSNorm(5), (2, 4, 5)),
        (nn.PReLU(4), (2, 4, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "x".join(map(str, value)),
)
def test_every_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    lifted = check(nn.Sequential(module), torch.randn(shape))
    assert layers(lifted) == {"0": type(module).__name__}


def test_embedding() -> None:
    lifted = check(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)), torch.randint(0, 10, (2, 5)))
    assert layers(lifted) == {"0": "Embedding", "1": "Linear"}


def test_attention_and_recurrence_keep_a_dynamic_batch() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.gru = nn.GRU(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
            y: Tensor = self.gru(self.encoder(x))[0][:, -1]
            return y

    lifted = check(Sequence(), torch.rand(2, 4, 8))
    assert layers(lifted)["encoder.self_attn.in_proj"] == "Linear"
    names = {node.target for node in lifted.graph.find_nodes(op="get_attr")}
    assert "token" in names
    assert "gru.weight_hh_l0" in names


def test_shared_layers_are_cloned() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)) + self.conv.bias.sum()

    lifted = check(Shared(), torch.rand(2, 3, 4, 4))
    assert layers(lifted) == {"conv": "Conv2d", "conv_2": "Conv2d"}
    assert lifted.conv.weight.data_ptr() != lifted.conv_2.weight.data_ptr()


def test_reparametrized_weights_fold() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    assert "Conv2d" in layers(check(nn.Sequential(conv), torch.rand(2, 3, 6, 6))).values()


def test_several_inputs_and_named_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
            return {"sum": self.fc(left) + right, "parts": [left * 2, right]}

    lifted = check(Two(), torch.rand(2, 4), torch.rand(2, 4))
    assert lifted.meta["input_names"] == ("left", "right")
    assert set(lifted(torch.rand(1, 4), torch.rand(1, 4))) == {"sum", "parts"}


def test_writing_in_place_where_it_is_seen() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            view = y[:, :1]
            view.mul_(2.0)
            return y.relu_() + y

    assert layers(check(InPlace(), torch.rand(2, 3, 4, 4))) == {"conv": "Conv2d"}


def test_training_mode_is_refused() -> None:
    x = torch.rand(2, 3, 8, 8)
    for module in (nn.BatchNorm2d(3), nn.Dropout(0.5)):
        program = torch.export.export(nn.Sequential(module).train(), (x,))
        with pytest.raises(Unsupported, match="training mode") as caught:
            lift_program(program)
        assert "eval()" in str(caught.value)
