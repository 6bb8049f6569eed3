"""Which networks reorganize knows, blocks of one's own through an adapter, and what is refused in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402

from _reorganizing import apply, lengths, vit  # noqa: E402
from edgepack import models  # noqa: E402
from edgepack.compress._cuts import rates  # noqa: E402
from edgepack.compress.reorganize import Reorganize  # noqa: E402
from edgepack.errors import BudgetError, EdgepackError, InputError, Unsupported  # noqa: E402
from edgepack.graph import capture, flatten  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


class Pooled(nn.Module):
    """A transformer without a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_without_a_class_token_attention_received_ranks_and_a_note_says_so(tmp_path: Path) -> None:
    _, run = apply(Pooled().eval(), tmp_path, keep_rate=0.5)
    assert run.findings["tokens"]["method"] == "attention received"
    assert any("another method" in note for note in run.notes)
    assert lengths(run)[-1] == [6, 4]


ADAPTER = """
import torch
class Mine:
    block = "Block"
    def attend(self, block, tokens):
        q, k, v = (one.unflatten(-1, (2, -1)).transpose(1, 2) for one in block.qkv(tokens).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return tokens + block.out(y.transpose(1, 2).flatten(2)), q, k
    def rest(self, block, tokens):
        return tokens + block.mlp(tokens) * FACTOR
class Short:
    block = "Block"
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention = torch.softmax(torch.stack([q @ k.transpose(1, 2) for q, k in self.heads(x)]) / math.sqrt(8), -1)
        values = torch.stack(self.qkv(x)[..., 32:].chunk(2, -1))
        x = x + self.out(torch.cat(list(attention @ values), -1))
        return x + self.mlp(x)

    def heads(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        q, k, _ = self.qkv(x).chunk(3, -1)
        return list(zip(q.chunk(2, -1), k.chunk(2, -1), strict=True))


class Own(nn.Module):
    def __init__(self, cls: type[nn.Module] = Block) -> None:
        super().__init__()
        self.patches, self.cls_token = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 1, 16))
        self.blocks, self.head = nn.Sequential(*(cls() for _ in range(4))), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))[:, 0])


def adapter(tmp_path: Path, factor: str = "1") -> str:
    path = tmp_path / f"adapter{factor}.py"
    path.write_text(ADAPTER.replace("FACTOR", factor))
    return str(path)


def test_blocks_of_ones_own_are_cut_through_an_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, run = apply(Own().eval(), tmp_path, keep_rate=0.5, adapter=f"{adapter(tmp_path)}:Mine")
    assert lengths(run) == [[17, 17], [17, 10], [10, 7], [7, 5]]


class WindowBlock(Block):
    """By its name."""


class Dense(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))


class Grid(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(x.reshape(-1, 4, 4, 16).mean((1, 2)))


class Bare(Own):
    """A class token and no patch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.cls_token + x.mean((1, 2, 3)).reshape(-1, 1, 1))[:, 0])


@pytest.mark.parametrize(
    "module, options, kind, words",
    [
        (Own, {}, Unsupported, "Own has no blocks of a kind that is known (timm.models.vision_transformer.Block"),
        (lambda: Own(WindowBlock), {}, Unsupported, "WindowBlock: its attention is windowed"),
        (vit, {"blocks": (1, 4)}, InputError, "there is no block 4"),
        (Own, {"adapter": "1:Short"}, InputError, "lacks attend, rest"),
        (Own, {"adapter": "2:Mine"}, InputError, "Mine does not compute what Block does (blocks.0)"),
        (Dense, {"adapter": "1:Mine"}, Unsupported, "the outputs of Dense are made of all tokens"),
        (Grid, {"adapter": "1:Mine"}, Unsupported, "behind the cuts Grid needs every token in its place"),
        (Bare, {"adapter": "1:Mine"}, InputError, "would leave no token: it reads 1, all special"),
        (vit, {"score_drop": 0.1}, InputError, "score_drop needs calibration data"),
        (vit, {"macs_ratio": 0.1}, BudgetError, "macs_ratio 0.1 cannot be reached: keep rate 0.05 still gives"),
    ],
)
def test_refused_in_words(
    tmp_path: Path, module: Any, options: dict[str, Any], kind: type[EdgepackError], words: str
) -> None:
    if "adapter" in options:
        factor, _, name = options["adapter"].partition(":")
        options = {"adapter": f"{adapter(tmp_path, factor)}:{name}"}
    with pytest.raises(kind) as caught:
        apply(module().eval(), tmp_path, **options)
    assert words in str(caught.value)
    assert kind is not Unsupported or caught.value.exit_status == 7
    if words.startswith("Own has no"):
        assert "adapter = 'file.py:Class'" in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"keep_rate": 0.0}, "keep_rate is above 0 and at most 1, not 0.0"),
        ({"keep_rate": 1.01}, "keep_rate is above 0 and at most 1, not 1.01"),
        ({"keep_rate": 0.5, "macs_ratio": 0.5}, "give one of keep_rate, keep_rates, latency_ratio"),
        ({"keep_rates": (0.5,), "blocks": (1,), "cost_of": 32}, "not keep_rates and cost_of"),
        ({"keep_rates": (0.5, 0.7), "blocks": (1,)}, "keep_rates are one for each of blocks: 2 for [1] do not fit"),
        ({"keep_rates": (0.5, 0.7), "blocks": (1, 1)}, "keep_rates are one for each of blocks: 2 for [1, 1] do not"),
        ({"keep_rates": (0.5, 0.0), "blocks": (1, 2)}, "keep_rates is above 0 and at most 1, not 0.0"),
        ({"latency_ratio": 1.5}, "latency_ratio is above 0 and at most 1"),
        ({"score_drop": -0.1}, "score_drop is at least 0"),
        ({"blocks": (-1,)}, "counted from 0, not (-1,)"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Reorganize(**options)
    assert words in str(caught.value)


def test_images_of_any_size_are_refused(tmp_path: Path) -> None:
    task = Task((Input("x", (1, 3, 32, 32), dynamic=("batch", "height")),))
    with pytest.raises(Unsupported, match="height of input 'x' is dynamic"):
        apply(vit(), tmp_path, task)


NETWORKS = {  # tokens behind the cuts at keep rate 0.7, of each branch
    "timm:deit_tiny_patch16_224": [[140, 100, 72]],
    "timm:deit_tiny_distilled_patch16_224": [[141, 101, 73]],
    "timm:crossvit_9_240": [[282, 199], [140, 100, 72]],
    "torchvision:vit_b_16": [[140, 100, 72]],
    "transformers:ViTForImageClassification": [[140, 100, 72]],
    "transformers:DeiTForImageClassification": [[141, 101, 73]],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_known_families(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    size = 240 if "crossvit" in name else 224
    task = Task((Input("x", (1, 3, size, size)),))
    network = models.load(name, tmp_path)
    cut, run = apply(network, tmp_path, task, keep_rate=0.7)
    branches: dict[int, list[int]] = {}
    for row in run.findings["tokens"]["blocks"]:
        branches.setdefault(row["branch"], []).extend([row["tokens"][1]] if row["cut"] else [])
    assert list(branches.values()) == NETWORKS[name]
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        graph = capture(cut, task).program.module()
        torch.testing.assert_close(flatten(graph(x))[0], flatten(cut(x))[0], atol=1e-5, rtol=1e-4)
        with rates(cut, 1.0):
            assert torch.equal(flatten(cut(x))[0], flatten(network(x))[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:swin_tiny_patch4_window7_224", "timm:pvt_v2_b0", "timm:pit_ti_224"])
def test_grids_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unsupported, match="every token must keep its place"):
        apply(models.load(name, tmp_path), tmp_path, Task((Input("x", (1, 3, 224, 224)),)))
