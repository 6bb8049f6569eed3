"""The pass reorganize: which tokens stay, and what the network computes then."""

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

from _reorganizing import LENGTHS, PUBLISHED, TASK, Pictures, apply, images, lengths, vit  # noqa: E402
from edgepack import models  # noqa: E402
from edgepack.compress import _tokens  # noqa: E402
from edgepack.compress._cuts import cuts_of, rates, set_progress  # noqa: E402
from edgepack.compress._kept import origins  # noqa: E402
from edgepack.compress._macs import macs  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


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


def test_each_block_may_have_its_own_keep_rate(tmp_path: Path) -> None:
    network = vit()
    found, run = apply(network, tmp_path, blocks=(3, 1), keep_rates=(0.25, 0.5))
    assert lengths(run) == [[65, 65], [65, 34], [34, 34], [34, 11]]
    assert run.findings["tokens"]["keep_rate"] == [0.5, 0.25]
    assert any(note.startswith("keep rate 0.5, 0.25: ") for note in run.notes)
    with torch.no_grad(), rates(found, 1.0):
        assert torch.equal(found(images()), network(images()))
    same, _ = apply(network, tmp_path, keep_rates=(0.5, 0.5, 0.5), blocks=(1, 2, 3))
    one, _ = apply(network, tmp_path, keep_rate=0.5)
    with torch.no_grad():
        assert torch.equal(same(images()), one(images()))


def test_pictures_follow_patches_through_the_cuts() -> None:
    first, second = origins(4, [[3, 0], [2, 1]])  # the second keeps the fused token (place 2) and patch 0
    assert first.tolist() == [True, False, False, True]
    assert second.tolist() == [True, False, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("rate", PUBLISHED)
def test_deit_s_counts_the_published_macs(tmp_path: Path, rate: float) -> None:
    network = models.load("timm:deit_small_patch16_224", tmp_path)
    _, run = apply(network, tmp_path, Task((Input("x", (1, 3, 224, 224)),)), keep_rate=rate)
    assert round(run.findings["tokens"]["macs"]["after"] / 1e9, 1) == PUBLISHED[rate]
    assert round(run.findings["tokens"]["macs"]["before"] / 1e9, 1) == 4.6
