"""4-bit weights: what the pass makes of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.compress._gptq import round_in_turn  # noqa: E402
from edgepack.compress._grid import round_to, top, weight_scale  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.exporting import Source  # noqa: E402
from edgepack.graph import run_graph  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ).eval()


def samples(count: int, seed: int) -> np.ndarray:
    """Neighbouring pixels are alike, as in pictures."""
    rough = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 3, 4, 4)).astype(np.float32))
    return torch.nn.functional.interpolate(rough, 8, mode="bilinear").numpy()


def made(folder: Path, **options: Any) -> Source:
    task = Task((Input("x", (1, 3, 8, 8)),), calibration=Samples(samples(32, 0)))  # type: ignore[arg-type]
    compress(network(), task, [Quantize(explain=False, weight_bits=4, **options)], folder, Silent())
    return Source.open(folder / "compressed")


def noise(source: Source) -> float:
    x = samples(64, 1)
    with torch.no_grad():
        wanted = network()(torch.from_numpy(x)).numpy()
    return float(np.square(run_graph(source.graph, {"x": x})["output"] - wanted).mean())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return made(tmp_path_factory.mktemp("four"))


def weights_of(source: Source) -> list[Tensor]:
    return [tensor for tensor in source.graph.program.state_dict.values() if tensor.dim() > 1]


def test_first_layers_keep_eight_bits_and_the_others_have_fifteen_values(source: Source) -> None:
    entries = [entry["weight"] for entry in source.plan.nodes.values() if "weight" in entry]
    assert entries == [{"bits": 8, "axis": 0}, {"bits": 4, "axis": 0}, {"bits": 4, "axis": 0}]
    scales = [scale for name, scale in source.plan.tensors.items() if name.endswith("weight_scale")]
    for weight, scale, largest in zip(weights_of(source), scales, (127, 7, 7), strict=True):
        whole = weight.flatten(1) / torch.from_numpy(scale)[:, None]
        torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
        assert whole.abs().max().round() <= largest
        if largest == 7:
            assert max(len(row.unique()) for row in whole.round()) <= 15
    assert max(len(row.unique()) for row in weights_of(source)[0].flatten(1)) > 15


def test_activations_stay_float_unless_they_are_given_bits(source: Source, tmp_path: Path) -> None:
    forms = [entry.get("activations") for entry in source.plan.nodes.values() if "weight" in entry]
    assert forms == ["float"] * 3
    rounded = made(tmp_path, activation_bits=8)
    assert [entry.get("activations") for entry in rounded.plan.nodes.values() if "weight" in entry] == [None] * 3


def test_default_is_better_than_nearest_rounding(source: Source, tmp_path: Path) -> None:
    nearest = made(tmp_path, rounding="nearest", bias_correct=False)
    assert noise(source) < 0.7 * noise(nearest)


def test_columns_in_turn_are_the_nearest_where_columns_do_not_depend_on_each_other() -> None:
    torch.manual_seed(1)
    weight = torch.randn(5, 7)
    scale = weight_scale(weight, top=top(4))
    moments = torch.eye(7, dtype=torch.float64)[None]
    torch.testing.assert_close(round_in_turn(weight, scale, moments, top(4)), round_to(weight, scale, top(4)))


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (7, 63), (4, 7)])
def test_largest_integer(bits: int, largest: int) -> None:
    assert top(bits) == largest


def test_scale_of_few_levels_clips_rather_than_wastes() -> None:
    """One outlier of 10 among values of 1: the best of all scales, found by trying a fine grid of them."""
    row = torch.tensor([[10.0, *[1.0, -1.0] * 50]])
    found = weight_scale(row, top=7)
    tried = torch.linspace(0.3, 1.0, 2000) * 10 / 7
    errors = torch.stack([(round_to(row, scale[None], 7) - row).square().sum() for scale in tried])
    error = (round_to(row, found, 7) - row).square().sum()
    assert error <= 1.05 * errors.min()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 5}, "weight_bits is 4 or 8, not 5"),
        ({"bits": 4}, "bits is 8, not 4"),
        ({"weight_bits": 4, "activation_bits": 5}, "activation_bits is 4, 8 or 16, not 5"),
        ({"weight_bits": 4, "activation_bits": 8, "target": "avx2"}, "target = 'avx2' is for 8-bit weights"),
        ({"weight_bits": 4, "activations": "dynamic"}, "weight_bits without activation_bits leaves them float"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantize(**options)


def test_a_preset_fills_in_what_is_left_out() -> None:
    item = Quantize(preset="codenet")
    assert (item.weight_bits, item.activation_bits, item.calibrate, item.method) == (4, 8, "percentile", "qat")
    assert (item.form, item.rounding, item.training.optimizer) == ("static", "gptq", "adamw")
    assert Quantize(preset="codenet", activation_bits=4).activation_bits == 4
    with pytest.raises(ValueError, match=r"preset is 'codenet', not 'hawq'"):
        Quantize(preset="hawq")
    with pytest.raises(ValueError, match="preset = 'codenet' says how many bits: leave bits out"):
        Quantize(preset="codenet", bits=8)
