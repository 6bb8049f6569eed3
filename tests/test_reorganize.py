"""The pass reorganize: which tokens stay, what the network computes then, and what is refused."""

from __future__ import annotations

import base64
import copy
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from _networks import ZOO  # noqa: E402
from edgepack import models, usercode  # noqa: E402
from edgepack.compress import _tokens  # noqa: E402
from edgepack.compress._cuts import cuts_of, rates, set_progress  # noqa: E402
from edgepack.compress._kept import origins  # noqa: E402
from edgepack.compress._macs import macs  # noqa: E402
from edgepack.compress.reorganize import Reorganize  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.data import Batch  # noqa: E402
from edgepack.errors import BudgetError, EdgepackError, InputError, Unsupported  # noqa: E402
from edgepack.graph import capture, flatten  # noqa: E402
from edgepack.measurement import Ratio  # noqa: E402
from edgepack.metrics import find  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

TASK = Task((Input("x", (1, 3, 32, 32)),))
PUBLISHED = {0.9: 4.0, 0.8: 3.5, 0.7: 3.0, 0.6: 2.6, 0.5: 2.3}  # G of DeiT-S in EViT's table
LENGTHS = {0.9: [179, 163, 148], 0.8: [159, 129, 105], 0.7: [140, 100, 72], 0.6: [120, 74, 46], 0.5: [100, 52, 28]}


def vit(**options: int) -> nn.Module:
    torch.manual_seed(0)
    network = usercode.load("models.py:VisionTransformer", ZOO)(**{"width": 32, "depth": 4, "heads": 4, **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval()


class Pictures:
    """Random pictures with targets."""

    labels: tuple[str, ...] = ()

    def __init__(self, count: int = 24) -> None:
        self.raw = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets: np.ndarray | None = np.arange(count) % 10

    def __len__(self) -> int:
        return len(self.raw)

    def batches(self, size: int) -> Any:
        for start in range(0, len(self), size):
            raw = self.raw[start : start + size]
            values = np.ascontiguousarray(raw.transpose(0, 3, 1, 2).astype(np.float32) / 128 - 1)
            targets = None if self.targets is None else self.targets[start : start + size]
            yield Batch({"x": values}, {"x": raw}, targets)


def apply(module: nn.Module, tmp_path: Path, task: Task = TASK, **options: Any) -> tuple[nn.Module, PassRun]:
    run = PassRun(tmp_path, 0, Plan(), Silent(), module, task)
    item, copied = Reorganize(**options), copy.deepcopy(module)
    item.check(copied, task)
    return item.apply(copied, task, run), run


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def lengths(run: PassRun) -> list[list[int]]:
    return [row["tokens"] for row in run.findings["tokens"]["blocks"]]


@given(count=st.integers(1, 500), percent=st.integers(1, 100))
def test_kept_is_the_ceiling_of_the_share(count: int, percent: int) -> None:
    assert _tokens.kept_of(count, percent / 100) == -(-count * percent // 100)


@pytest.mark.parametrize("rate", PUBLISHED)
def test_token_counts_of_deit_s_are_the_published_ones(rate: float) -> None:
    found = [197]
    for _ in range(3):
        found.append(_tokens.tokens_behind(found[-1], 1, rate, True))
    assert found[1:] == LENGTHS[rate]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), special=st.integers(0, 3), count=st.integers(1, 12), data=st.data(), fuse=st.booleans()
)
def test_reorganized_tokens_are_those_of_a_loop(seed: int, special: int, count: int, data: Any, fuse: bool) -> None:
    kept = data.draw(st.integers(1, count))
    draw = np.random.default_rng(seed)
    tokens = draw.standard_normal((2, special + count, 5)).astype(np.float32)
    scores = draw.permuted(np.tile(np.arange(1, count + 1) / count, (2, 1)), axis=1).astype(np.float32)
    found, places = _tokens.reorganize(torch.from_numpy(tokens), torch.from_numpy(scores), kept, fuse)
    for sample in range(2):
        order = sorted(range(count), key=lambda i: -scores[sample, i])
        rest = sum((scores[sample, i] * tokens[sample, special + i] for i in order[kept:]), np.zeros(5, np.float32))
        wanted = [
            *tokens[sample, :special],
            *(tokens[sample, special + i] for i in order[:kept]),
            *([rest] if fuse else []),
        ]
        assert places[sample].tolist() == order[:kept]
        np.testing.assert_allclose(found[sample].numpy(), wanted, atol=2e-6)


def test_ranking_is_one_row_of_the_attention() -> None:
    q, k = torch.randn(2, 3, 7, 4, dtype=torch.float64), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    whole = (q @ k.transpose(-2, -1) / 2).softmax(-1).mean(1)
    torch.testing.assert_close(_tokens.class_attention(q, k, 2), whole[:, 0, 2:])
    torch.testing.assert_close(_tokens.received_attention(q, k, 2), whole[:, :, 2:].mean(1))


def reference(network: Any, x: torch.Tensor, rate: float, blocks: tuple[int, ...], fuse: bool) -> torch.Tensor:
    """EViT on the zoo's post-norm network, written with whole attention matrices and one image at a time."""
    x = network.patch_embed(x)
    x = torch.cat([network.cls_token.expand(len(x), -1, -1), x], 1) + network.pos_embed
    rows = []
    for tokens in x:
        for index, layer in enumerate(network.transformer.layers):
            inner = layer.self_attn
            q, k, v = nn.functional.linear(tokens, inner.in_proj_weight, inner.in_proj_bias).chunk(3, -1)
            heads = [one.reshape(len(tokens), inner.num_heads, -1).transpose(0, 1) for one in (q, k, v)]
            attention = torch.softmax(heads[0] @ heads[1].transpose(1, 2) / math.sqrt(heads[0].shape[-1]), -1)
            tokens = layer.norm1(tokens + inner.out_proj((attention @ heads[2]).transpose(0, 1).flatten(1)))
            if index in blocks:
                scores = attention.mean(0)[0, 1:]
                order = scores.argsort(descending=True)
                kept = math.ceil(rate * len(scores) - 1e-9)
                parts = [tokens[:1], tokens[1:][order[:kept]]]
                if fuse and kept < len(scores):
                    parts.append((scores[order[kept:], None] * tokens[1:][order[kept:]]).sum(0, keepdim=True))
                tokens = torch.cat(parts)
            tokens = layer.norm2(tokens + layer.linear2(torch.relu(layer.linear1(tokens))))
        rows.append(network.mlp_head(tokens[0]))
    return torch.stack(rows)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("rate", [0.9, 0.5, 0.02])
def test_network_computes_what_evit_does(tmp_path: Path, rate: float, fuse: bool) -> None:
    network = vit()
    found, _ = apply(network, tmp_path, keep_rate=rate, fuse=fuse)
    with torch.no_grad():
        wanted = reference(network, images(), rate, (1, 2, 3), fuse)
        torch.testing.assert_close(found(images()), wanted, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(wanted, network(images()), atol=1e-3)


def test_keep_rate_one_is_the_network_bit_for_bit(tmp_path: Path) -> None:
    network = vit()
    whole, _ = apply(network, tmp_path, keep_rate=1.0)
    halved, _ = apply(network, tmp_path, keep_rate=0.5)
    with torch.no_grad():
        wanted = network(images())
        assert torch.equal(whole(images()), wanted)
        assert not torch.equal(halved(images()), wanted)
        with rates(halved, 1.0):
            assert torch.equal(halved(images()), wanted)
        assert not torch.equal(halved(images()), wanted)
    assert list(halved.state_dict()) == list(network.state_dict())
    assert [type(layer) for layer in halved.modules()] == [type(layer) for layer in network.modules()]


def test_a_schedule_shrinks_from_the_whole_network_and_gradients_reach_every_parameter(tmp_path: Path) -> None:
    network = vit()
    cut, _ = apply(network, tmp_path, keep_rate=0.5)
    set_progress(cut, 0.0)
    with torch.no_grad():
        assert torch.equal(cut(images()), network(images()))
    set_progress(cut, 0.5)
    assert [one.rate for one in cuts_of(cut)] == pytest.approx([0.75] * 3)
    set_progress(cut, 1.0)
    assert [one.rate for one in cuts_of(cut)] == [0.5] * 3
    cut.train()(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in cut.parameters())


def test_a_copy_of_the_network_cuts_itself_not_its_original(tmp_path: Path) -> None:
    cut, _ = apply(vit(), tmp_path, keep_rate=0.5)
    copied = copy.deepcopy(cut)
    assert [one.block for one in cuts_of(copied)] == [
        layer for layer in copied.transformer.layers if layer.__dict__.get("forward") in cuts_of(copied)
    ]
    assert not {id(one) for one in cuts_of(copied)} & {id(one) for one in cuts_of(cut)}


def test_blocks_notes_and_findings(tmp_path: Path) -> None:
    task = replace(TASK, calibration=Pictures())
    network, run = apply(vit(depth=6), tmp_path, task, keep_rate=0.5, blocks=(2, 4))
    assert lengths(run) == [[65, 65], [65, 65], [65, 34], [34, 34], [34, 19], [19, 19]]
    assert "tokens 65 → 34 → 19, behind the attention of blocks 2, 4" in run.notes
    found = run.findings["tokens"]
    assert found["macs"]["after"] == macs(network, (images(1),))
    assert all(0.5 < row["attentiveness"] <= 1 for row in found["blocks"])
    assert set(found["margins"]) == {"transformer.layers.2", "transformer.layers.4"}
    strip = Image.open(io.BytesIO(base64.b64decode(found["pictures"][0])))
    assert strip.size == (3 * 96 + 2 * 4, 96)
    dark = np.asarray(strip).mean(-1)
    assert dark[:, :96].mean() > dark[:, 100:196].mean() > dark[:, 200:].mean()


def test_pictures_follow_patches_through_the_cuts() -> None:
    first, second = origins(4, [[3, 0], [2, 1]])  # the second keeps the fused token (place 2) and patch 0
    assert first.tolist() == [True, False, False, True]
    assert second.tolist() == [True, False, False, False]


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
        ({"keep_rate": 0.5, "macs_ratio": 0.5}, "give one of keep_rate, latency_ratio"),
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


def test_macs_budget_gives_the_largest_rate_within(tmp_path: Path) -> None:
    network = vit()
    whole = macs(network, (images(1),))
    cut, run = apply(network, tmp_path, macs_ratio=0.6)
    rate = cuts_of(cut)[0].keep_rate
    assert macs(cut, (images(1),)) <= 0.6 * whole
    with rates(cut, rate + 0.01):
        assert macs(cut, (images(1),)) > 0.6 * whole
    assert any(note.startswith(f"macs_ratio 0.6 gives keep rate {rate:g}") for note in run.notes)


def test_latency_budget_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def measure(self: PassRun, module: nn.Module, against: nn.Module | None = None) -> Ratio:
        asked.append(cuts_of(module)[0].rate)
        value = 0.2 + 0.8 * asked[-1]
        return Ratio(value, value - 0.01, value + 0.01, "original", "faster", value)

    monkeypatch.setattr(PassRun, "measure", measure)
    cut, run = apply(vit(), tmp_path, latency_ratio=0.7)
    assert cuts_of(cut)[0].keep_rate == 0.6  # of 0.05 steps the largest with 0.2 + 0.8 · rate ≤ 0.7
    assert len(asked) <= 6
    assert any("measured at keep rate 0.6: 0.680 × [0.670, 0.690]" in note for note in run.notes)


@pytest.mark.parametrize("metric", ["top1", None])
def test_score_budget_gives_the_smallest_rate_that_keeps_it(tmp_path: Path, metric: str | None) -> None:
    pictures = Pictures()
    network = vit()
    with torch.no_grad():
        batch = next(iter(pictures.batches(24)))
        pictures.targets = network(torch.from_numpy(batch.inputs["x"])).argmax(1).numpy() if metric else None
    task = replace(TASK, calibration=pictures, metric=None if metric is None else find(metric, tmp_path))
    cut, run = apply(network, tmp_path, task, score_drop=0.2)
    with torch.no_grad():
        own = cut(torch.from_numpy(batch.inputs["x"])).argmax(1) != network(torch.from_numpy(batch.inputs["x"])).argmax(
            1
        )
        assert own.float().mean() <= 0.2
    assert cuts_of(cut)[0].keep_rate < 1
    assert any("agreement" in note for note in run.notes) == (metric is None)


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


@pytest.mark.slow
@pytest.mark.parametrize("rate", PUBLISHED)
def test_deit_s_counts_the_published_macs(tmp_path: Path, rate: float) -> None:
    network = models.load("timm:deit_small_patch16_224", tmp_path)
    _, run = apply(network, tmp_path, Task((Input("x", (1, 3, 224, 224)),)), keep_rate=rate)
    assert round(run.findings["tokens"]["macs"]["after"] / 1e9, 1) == PUBLISHED[rate]
    assert round(run.findings["tokens"]["macs"]["before"] / 1e9, 1) == 4.6
