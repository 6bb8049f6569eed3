"""Binary layers trained with brevitas: taken over as plain layers that compute the same, down to packed bits in C."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
qnn = pytest.importorskip("brevitas.nn", reason="pip install 'edgepack[qat]'")

from brevitas.quant import Int8WeightPerTensorFloat  # noqa: E402
from brevitas.quant.binary import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst  # noqa: E402
from torch import nn  # noqa: E402

from _c_files import worst, write  # noqa: E402
from edgepack.compress._brevitas import Level, Taken, take_binary  # noqa: E402
from edgepack.compress._tune import Tune  # noqa: E402
from edgepack.compress.binarize import Binarize  # noqa: E402
from edgepack.compressing import COMPRESSED, compress  # noqa: E402
from edgepack.errors import Unsupported  # noqa: E402
from edgepack.exporting import Source  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

WEIGHT, SIGN = SignedBinaryWeightPerTensorConst, SignedBinaryActPerTensorConst
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Named tensors:UserWarning"),
]


def signs(**options: Any) -> nn.Module:
    made: nn.Module = qnn.QuantIdentity(act_quant=SIGN, **options)
    return made


def normed(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.copy_(torch.randn(channels))
    norm.running_var.copy_(torch.rand(channels) + 0.5)
    return norm


def network() -> nn.Module:
    """Between real layers: one that pads with 0, one of groups whose activations are ±½, a linear one with a bias."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3), normed(40), signs(),
        qnn.QuantConv2d(40, 64, 3, padding=1, bias=False, weight_quant=WEIGHT), normed(64), signs(scaling_init=0.5),
        qnn.QuantConv2d(64, 64, 3, stride=2, groups=2, bias=False, weight_quant=WEIGHT), normed(64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), signs(), qnn.QuantLinear(64, 24, bias=True, weight_quant=WEIGHT),
        nn.ReLU(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


def test_what_is_taken_over_computes_the_same() -> None:
    given, x = network(), torch.randn(4, 3, 14, 13)
    with torch.no_grad():
        wanted = given(x)
        assert take_binary(given) == ["3", "6", "11"]
        found = given(x)
    assert not [layer for layer in given.modules() if type(layer).__module__.startswith("brevitas")]
    assert isinstance(given[5], Level)
    assert given[5].size == 0.5
    assert isinstance(given[6], Taken)
    assert set(given[6].layer.weight.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_it_ends_in_packed_bits(tmp_path: Path) -> None:
    needs_compiler()
    given, x = network(), torch.randn(1, 3, 14, 13)
    with torch.no_grad():
        wanted = given(x)
    compress(given, Task((Input("x", (1, 3, 14, 13)),)), [Binarize()], tmp_path, Silent())
    source = Source.open(tmp_path / COMPRESSED)
    (step,) = source.manifest.history
    assert "binarize: 3 binary layers of brevitas are taken over as they were trained" in step["notes"]
    artifact, simulation = write(source.graph, tmp_path / "c")
    assert worst(artifact, simulation) < 1e-5
    kernels = artifact.manifest.census["operators"]
    assert kernels["sign_bits"] == 1  # its results are compared again; those of the others become floats
    assert kernels["conv_bits"] == 2
    assert kernels["conv_f32"] == 2
    (found,) = source.graph.program.module(check_guards=False)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_binary_inputs_of_a_layer_itself() -> None:
    torch.manual_seed(0)
    given = nn.Sequential(qnn.QuantConv1d(6, 4, 3, weight_quant=WEIGHT, input_quant=SIGN)).eval()
    x = torch.randn(2, 6, 9)
    with torch.no_grad():
        wanted = given(x)
        assert take_binary(given) == ["0"]
        torch.testing.assert_close(given(x), wanted, rtol=1e-5, atol=1e-6)


def test_layers_of_more_bits_stay() -> None:
    given = nn.Sequential(qnn.QuantConv2d(3, 4, 1, weight_quant=Int8WeightPerTensorFloat), qnn.QuantIdentity())
    assert take_binary(given) == []
    assert type(given[0]).__name__ == "QuantConv2d"
    assert type(given[1]).__name__ == "QuantIdentity"


def test_what_cannot_be_taken_over_is_named() -> None:
    from brevitas.quant import Int8ActPerTensorFloat

    rounded = nn.Sequential(qnn.QuantConv2d(3, 4, 1, weight_quant=WEIGHT, output_quant=Int8ActPerTensorFloat))
    with pytest.raises(Unsupported, match="binarize: 0 is a binary layer of brevitas with output_quant"):
        take_binary(rounded)
    finer = nn.Sequential(qnn.QuantConv2d(3, 4, 1, weight_quant=WEIGHT, input_quant=Int8ActPerTensorFloat))
    with pytest.raises(Unsupported, match="binarize: 0 has 1-bit weights, but inputs of more bits"):
        take_binary(finer)
    task = Task((Input("x", (1, 3, 14, 13)),))
    run: Any = SimpleNamespace(note=lambda text: None)
    with pytest.raises(Unsupported, match="binary layers of brevitas are taken over as they were trained") as raised:
        Binarize(tune=Tune()).apply(network(), task, run)
    assert raised.value.hint == "leave tune out, or name layers"


def test_levels_are_the_sign_with_zero_up() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-30, float("-inf")])
    np.testing.assert_array_equal(Level(0.25)(x), [-0.25, 0.25, 0.25, 0.25, -0.25])
