"""Networks for images of another size, and more tokens at equal cost."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
from torch import nn  # noqa: E402

from _networks import ZOO  # noqa: E402
from _reorganizing import apply, images, vit  # noqa: E402
from edgepack import models, pipeline, recipe  # noqa: E402
from edgepack.compress._macs import macs  # noqa: E402
from edgepack.compress.reorganize import Reorganize  # noqa: E402
from edgepack.errors import BudgetError, EdgepackError, InputError, Unsupported  # noqa: E402
from edgepack.models.resolution import fit, interpolated  # noqa: E402
from edgepack.pipeline import Options  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402


@pytest.mark.parametrize("special", [0, 1, 2, 5])
@pytest.mark.parametrize("grid", [(12, 12), (5, 9), (8, 8)])
def test_positions_are_interpolated_as_timm_does(special: int, grid: tuple[int, int]) -> None:
    models.prepare_torchvision()
    layers = pytest.importorskip("timm.layers", reason="pip install 'edgepack[zoo]'")
    positions = torch.randn(1, special + 64, 6, generator=torch.Generator().manual_seed(0))
    wanted = layers.resample_abs_pos_embed(positions, list(grid), [8, 8], num_prefix_tokens=special)
    found = interpolated(positions, grid)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(found[:, :special], positions[:, :special])


def test_positions_that_are_no_square_are_refused() -> None:
    with pytest.raises(Unsupported, match="96 positions are no square of patches"):
        interpolated(torch.zeros(1, 96, 4), (3, 3))


def test_a_network_of_ones_own_takes_larger_and_oblong_images() -> None:
    network = vit()
    other = fit(copy.deepcopy(network), 48, 40)
    assert other.pos_embed.shape == (1, 1 + 12 * 10, 32)
    assert torch.equal(other.pos_embed[:, :1], network.pos_embed[:, :1])
    assert other.pos_embed.requires_grad == network.pos_embed.requires_grad
    with torch.no_grad():
        assert other(torch.zeros(2, 3, 48, 40)).shape == (2, 10)
        back = fit(copy.deepcopy(network), 32, 32)
        torch.testing.assert_close(back(images()), network(images()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("timm:vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
        ("timm:deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}),
        ("transformers:ViTForImageClassification", {"image_size": 64, "hidden_size": 48, "num_hidden_layers": 2,
                                                    "num_attention_heads": 3, "intermediate_size": 96}),
    ],
)  # fmt: skip
def test_known_families_take_larger_images(tmp_path: Path, source: str, options: dict[str, int]) -> None:
    pytest.importorskip(source.partition(":")[0], reason="pip install 'edgepack[zoo]'")
    network = models.load(source, tmp_path, options=options)
    before = dict(network.named_parameters())
    name = next(name for name in before if name.endswith(("pos_embed", "position_embeddings")))
    with torch.no_grad():
        before[name].normal_()
    special = before[name].shape[1] - 16
    after = dict(fit(copy.deepcopy(network), 96, 96).named_parameters())
    torch.testing.assert_close(after[name], interpolated(before[name], (6, 6)), atol=1e-5, rtol=1e-5)
    assert after[name].shape[1] == special + 36
    assert all(torch.equal(value, before[other]) for other, value in after.items() if other != name)


def test_torchvision_takes_larger_images() -> None:
    models.prepare_torchvision()
    kind = pytest.importorskip("torchvision.models.vision_transformer", reason="pip install 'edgepack[zoo]'")
    network = kind.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=7).eval()
    assert fit(network, 96, 96)(torch.zeros(1, 3, 96, 96)).shape == (1, 7)
    with pytest.raises(Unsupported, match="VisionTransformer does not take images of 96 × 64"):
        fit(network, 96, 64)


@pytest.mark.parametrize(
    ("module", "size", "error", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten()), (64, 64), Unsupported, "Sequential has not one parameter"),
        (None, (46, 48), InputError, "images of 46 × 48 are not made of whole patches of 4 × 4"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    module: nn.Module | None, size: tuple[int, int], error: type[EdgepackError], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(vit() if module is None else module, *size)


def larger(side: int = 48) -> Task:
    return Task((Input("x", (1, 3, side, side)),))


@pytest.mark.parametrize("side", [36, 40])
def test_more_tokens_cost_what_fewer_did(tmp_path: Path, side: int) -> None:
    small = vit()
    budget = macs(small, (images(1),))
    cut, run = apply(fit(copy.deepcopy(small), side, side), tmp_path, larger(side), cost_of=32, blocks=(1, 2, 3))
    found = run.findings["tokens"]["macs"]
    assert found["after"] == macs(cut, (torch.zeros(1, 3, side, side),))
    assert 0.97 < found["after"] / budget <= 1
    assert found["before"] > budget
    assert run.findings["tokens"]["keep_rate"] < 1
    assert run.notes[0] == f"uncut on images of 32 × 32: {budget / 1e9:.3f} G multiply-accumulates"


def test_equal_cost_that_is_none_is_refused(tmp_path: Path) -> None:
    network = fit(vit(), 48, 48)
    with pytest.raises(InputError, match="cost_of is the height of smaller images than the task's 48 × 48, not 48"):
        apply(network, tmp_path, larger(), cost_of=48)
    with pytest.raises(BudgetError, match="cannot be reached"):
        apply(network, tmp_path, larger(), cost_of=8)
    with pytest.raises(InputError, match="images of 30 × 30 are not made of whole patches of 4 × 4"):
        apply(network, tmp_path, larger(), cost_of=30)
    with pytest.raises(ValueError, match="cost_of is a height in pixels, not 0"):
        Reorganize(cost_of=0)


RECIPE = """
[model]
module = "models.py:VisionTransformer"
options = {width = 32, depth = 4, heads = 4}
interpolate = true
[task]
input = {shape = [1, 3, 40, 40]}
[[compress]]
use = "reorganize"
cost_of = 32
"""


def test_a_recipe_for_more_tokens_at_equal_cost(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text((ZOO / "models.py").read_text())
    (tmp_path / "edgepack.toml").write_text(RECIPE)
    loaded = recipe.load(tmp_path)
    result = pipeline.compress_recipe(loaded, Options(out=tmp_path / "out"))
    assert result.manifest.inputs[0].shape[2:] == (40, 40)
    (entry,) = result.manifest.history
    found = entry["findings"]["tokens"]
    assert found["blocks"][0]["tokens"] == [101, 101]
    small = macs(models.load("models.py:VisionTransformer", ZOO, options=loaded.sheet.model.options), (images(1),))
    assert 0.97 < found["macs"]["after"] / small <= 1
    with pytest.raises(EdgepackError):
        pipeline.compress_recipe(recipe.load(tmp_path, ["model.interpolate=false"]), Options(out=tmp_path / "none"))
    (tmp_path / "edgepack.toml").write_text(RECIPE.replace("[1, 3, 40, 40]", "[1, 40]"))
    with pytest.raises(InputError, match=r"model\.interpolate: the task has not one image as its input"):
        pipeline.compress_recipe(recipe.load(tmp_path), Options(out=tmp_path / "none"))


def test_weights_are_those_of_the_file(tmp_path: Path) -> None:
    network = vit()
    stored = {name: value.numpy().copy() for name, value in network.state_dict().items()}
    fit(network, 40, 40)
    assert all(
        np.array_equal(value.numpy(), stored[name]) for name, value in network.state_dict().items()
        if name != "pos_embed"
    )  # fmt: skip
