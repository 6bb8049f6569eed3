"""The interpreter's operators against PyTorch's, NumPy's and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[coreml]'")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from edgepack.runtimes._mil import OPERATORS  # noqa: E402

G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G)


def i(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


X, Y = rand(2, 3, 7, 5), rand(2, 3, 7, 5)
SMALL = rand(1, 4, 6, 6)
SEQUENCE = rand(2, 3, 11)
POSITIVE = X.abs() + 0.1
WHOLE = torch.randint(-9, 9, (2, 5), generator=G, dtype=torch.int32)
W2, B6 = rand(6, 3, 3, 3), rand(6)
CASES = [
    ("add", {"x": X, "y": 0.5}, X + 0.5),
    ("sub", {"x": 1.0, "y": X}, 1 - X),
    ("pow", {"x": POSITIVE, "y": 1.5}, POSITIVE**1.5),
    ("real_div", {"x": 2.0, "y": POSITIVE}, 2 / POSITIVE),
    ("floor_div", {"x": X, "y": 0.3}, torch.floor(X / 0.3)),
    ("mod", {"x": WHOLE, "y": 4}, torch.from_numpy(np.mod(WHOLE.numpy(), 4))),
    ("real_div", {"x": WHOLE, "y": 4}, torch.trunc(WHOLE / 4).int()),
    ("maximum", {"x": X, "y": Y}, torch.where(X > Y, X, Y)),
    ("logical_xor", {"x": X > 0, "y": Y > 0}, (X > 0) != (Y > 0)),
    ("round", {"x": torch.tensor([0.5, 1.5, -2.5])}, torch.tensor([0.0, 2.0, -2.0])),
    ("inverse", {"x": POSITIVE, "epsilon": 0.5}, 1 / (POSITIVE + 0.5)),
    ("rsqrt", {"x": POSITIVE}, POSITIVE**-0.5),
    ("log", {"x": POSITIVE}, POSITIVE.log()),
    ("exp2", {"x": X}, 2**X),
    ("clip", {"x": X, "alpha": -0.2, "beta": 0.7}, F.hardtanh(X, -0.2, 0.7)),
    ("cast", {"x": torch.tensor([1.9, -1.9, 300.0]), "dtype": "int32"}, i(1, -1, 300)),
    ("cast", {"x": i(200, -1, 300), "dtype": "int8"}, i(-56, -1, 44)),
    ("cast", {"x": i(200, -1, 300), "dtype": "uint8"}, i(200, 255, 44)),
    ("cast", {"x": i(-1, 70000), "dtype": "uint16"}, i(65535, 4464)),
    ("cast", {"x": X, "dtype": "bool"}, X != 0),
    ("relu6", {"x": 9 * X}, nn.ReLU6()(9 * X)),
    ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}, nn.GELU("tanh")(X)),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}, X * torch.sigmoid(1.702 * X)),
    ("sigmoid_hard", {"x": 9 * X, "alpha": 1 / 6, "beta": 0.5}, F.hardsigmoid(9 * X)),
    ("scaled_tanh", {"x": X, "alpha": 2.0, "beta": 0.3}, 2 * torch.tanh(0.3 * X)),
    ("softplus_parametric", {"x": X, "alpha": B6[:3], "beta": POSITIVE[0, :, 0, 0]},
     B6[:3, None, None] * torch.log1p(torch.exp(POSITIVE[0, :, :1, :1] * X))),
    ("clamped_relu", {"x": X, "alpha": 0.1, "beta": 0.4}, torch.minimum(F.leaky_relu(X, 0.1), torch.tensor(0.4))),
    ("thresholded_relu", {"x": X, "alpha": 0.4}, F.threshold(X, 0.4, 0.0)),
    ("threshold", {"x": X, "alpha": 0.4}, torch.maximum(X, torch.tensor(0.4))),
    ("linear_activation", {"x": X, "alpha": 2.0, "beta": -1.0}, 2 * X - 1),
    ("prelu", {"x": X, "alpha": B6[:3]}, F.prelu(X, B6[:3])),
    ("elu", {"x": X, "alpha": 0.7}, F.elu(X, 0.7)),
    ("silu", {"x": X}, X * torch.sigmoid(X)),
    ("softsign", {"x": X}, X / (1 + X.abs())),
    ("softmax", {"x": X, "axis": 1}, X.exp() / X.exp().sum(1, keepdim=True)),
    ("select", {"cond": X > 0, "a": 1.0, "b": X}, torch.where(X > 0, 1.0, X)),
    ("reduce_mean", {"x": X, "axes": i(1, -1), "keep_dims": True}, X.mean((1, 3), True)),
    ("reduce_sum", {"x": WHOLE}, WHOLE.sum().int()),
    ("reduce_prod", {"x": X, "axes": i(0, 2)}, X.prod(2).prod(0)),
    ("reduce_l1_norm", {"x": X, "axes": i(2)}, X.norm(1, 2)),
    ("reduce_l2_norm", {"x": X, "axes": i(2)}, X.norm(2, 2)),
    ("reduce_log_sum", {"x": POSITIVE, "axes": i(2)}, POSITIVE.sum(2).log()),
    ("reduce_log_sum_exp", {"x": X, "axes": i(2)}, X.exp().sum(2).log()),
    ("reduce_sum_square", {"x": X, "axes": i(2)}, (X**2).sum(2)),
    ("reduce_argmax", {"x": X, "axis": 1, "keep_dims": True}, X.argmax(1, True).int()),
    ("reduce_argmin", {"x": X, "axis": -1, "output_dtype": "uint16"}, X.argmin(-1).int()),
    ("cumsum", {"x": X, "axis": 2, "exclusive": True}, X.cumsum(2) - X),
    ("cumsum", {"x": X, "axis": 2, "reverse": True}, X.flip(2).cumsum(2).flip(2)),
    ("conv", {"x": X, "weight": W2, "pad_type": "same", "strides": i(2, 3)},
     F.conv2d(F.pad(X, (0, 1, 1, 1)), W2, None, (2, 3))),
    ("conv", {"x": X, "weight": W2[:, :, :2, :2], "pad_type": "same_lower"},
     F.conv2d(F.pad(X, (1, 0, 1, 0)), W2[:, :, :2, :2])),
    ("conv", {"x": X, "weight": W2, "bias": B6, "pad_type": "custom", "pad": i(2, 0, 1, 3), "dilations": i(2, 1)},
     F.conv2d(F.pad(X, (1, 3, 2, 0)), W2, B6, 1, 0, (2, 1))),
    ("conv_transpose", {"x": X, "weight": rand(3, 2, 3, 3), "strides": i(2, 2), "pad_type": "same"}, None),
    ("matmul", {"x": X, "y": Y, "transpose_y": True}, X @ Y.transpose(-1, -2)),
    ("matmul", {"x": X, "y": Y, "transpose_x": True}, X.transpose(-1, -2) @ Y),
    ("avg_pool", {"x": SMALL, "kernel_sizes": i(3, 2), "strides": i(2, 2), "pad_type": "custom", "pad": i(1, 0, 0, 1)},
     F.avg_pool2d(F.pad(SMALL, (0, 1, 1, 0)), (3, 2), 2)),
    ("avg_pool", {"x": SMALL, "kernel_sizes": i(3, 3), "strides": i(1, 1), "pad_type": "same",
                  "exclude_padding_from_average": True}, F.avg_pool2d(SMALL, 3, 1, 1, count_include_pad=False)),
    ("max_pool", {"x": SMALL, "kernel_sizes": i(3, 3), "strides": i(2, 2), "pad_type": "custom", "pad": i(1, 1, 1, 1),
                  "ceil_mode": True}, F.max_pool2d(SMALL, 3, 2, 1, ceil_mode=True)),
    ("l2_pool", {"x": SEQUENCE, "kernel_sizes": i(2), "strides": i(2), "pad_type": "valid"},
     F.lp_pool1d(SEQUENCE, 2, 2)),
    ("l2_norm", {"x": SMALL, "epsilon": 1e-6}, SMALL / (SMALL.square().sum() + 1e-6).sqrt()),
    ("layer_norm", {"x": X, "axes": i(1), "gamma": B6[:3], "beta": B6[3:], "epsilon": 1e-3},
     F.layer_norm(X.movedim(1, -1), (3,), B6[:3], B6[3:], 1e-3).movedim(-1, 1)),
    ("local_response_norm", {"x": SMALL, "size": 3}, nn.LocalResponseNorm(3)(SMALL)),
    ("quantize", {"input": X, "scale": 0.1, "zero_point": 3, "output_dtype": "int8"},
     torch.from_numpy(np.clip(np.rint(X.numpy() / np.float32(0.1)) + 3, -128, 127)).int()),
    ("dequantize", {"input": i(1, -2, 3), "scale": torch.tensor([0.5, 1.0, 2.0]), "zero_point": i(1, 0, 1), "axis": 0},
     torch.tensor([0.0, -2.0, 4.0])),
    ("scaled_dot_product_attention", {"query": X, "key": Y, "value": X, "attn_mask": torch.ones(7, 7).tril().bool()},
     F.scaled_dot_product_attention(X, Y, X, is_causal=True)),
    ("reshape", {"x": X, "shape": i(0, -1, 5)}, X.flatten(1, 2)),
    ("expand_dims", {"x": X, "axes": i(0, -1)}, X[None, ..., None]),
    ("concat", {"values": [X, Y], "axis": 1, "interleave": True}, torch.stack([X, Y], 2).flatten(1, 2)),
    ("split", {"x": X, "split_sizes": i(2, 5), "axis": 2}, X.split((2, 5), 2)),
    ("split", {"x": X, "num_splits": 3, "axis": 1}, X.chunk(3, 1)),
    ("slice_by_index", {"x": X, "begin": i(0, -1, 6, 1), "end": i(0, 0, 0, -1), "stride": i(1, 1, -2, 2),
                        "begin_mask": torch.tensor([True, False, False, False]),
                        "end_mask": torch.tensor([True, False, True, False]),
                        "squeeze_mask": torch.tensor([False, True, False, False])},
     torch.from_numpy(X.numpy()[:, -1, 6::-2, 1:-1:2].copy())),
    ("slice_by_size", {"x": X, "begin": i(1, 0, 2, 0), "size": i(1, 2, -1, 3)}, X[1:2, :2, 2:, :3]),
    ("slice_update", {"x": X, "update": torch.zeros(1, 3, 3, 5), "begin": i(1, 0, 1, 0), "end": i(2, 3, 7, 5),
                      "stride": i(1, 1, 2, 1)}, None),
    ("pad", {"x": X, "pad": i(1, 2, 3, 0), "mode": "reflect"}, F.pad(X, (3, 0, 1, 2), "reflect")),
    ("pad", {"x": X, "pad": i(1, 2, 3, 0), "mode": "replicate"}, F.pad(X, (3, 0, 1, 2), "replicate")),
    ("pad", {"x": X, "pad": i(1, 0, 0, 0, 0, 2), "constant_val": 7.0}, F.pad(X, (0, 2, 0, 0, 1, 0), value=7.0)),
    ("crop", {"x": X, "crop_height": i(1, 2), "crop_width": i(0, 3)}, X[:, :, 1:-2, :-3]),
    ("sliding_windows", {"x": SEQUENCE, "axis": 2, "size": 4, "stride": 3}, SEQUENCE.unfold(2, 4, 3)),
    ("reverse", {"x": X, "axes": i(1, -1)}, X.flip((1, 3))),
    ("reverse_sequence", {"x": SEQUENCE, "lengths": i(3, 11), "seq_axis": 2, "batch_axis": 0},
     torch.stack([torch.cat([SEQUENCE[0, :, :3].flip(1), SEQUENCE[0, :, 3:]], 1), SEQUENCE[1].flip(1)])),
    ("band_part", {"x": X, "lower": 1, "upper": -1}, X.triu(-1)),
    ("flatten2d", {"x": X, "axis": 2}, X.reshape(6, 35)),
    ("fill", {"shape": i(2, 3), "value": 4}, torch.full((2, 3), 4, dtype=torch.int32)),
    ("shape", {"x": X}, i(2, 3, 7, 5)),
    ("tile", {"x": WHOLE, "reps": i(2, 3)}, torch.from_numpy(np.tile(WHOLE.numpy(), (2, 3)))),
    ("pixel_unshuffle", {"x": SMALL, "downscale_factor": 3}, nn.PixelUnshuffle(3)(SMALL)),
    ("gather", {"x": X, "indices": torch.tensor([[0, -1], [3, 2]]), "axis": 2},
     X[:, :, torch.tensor([[0, 6], [3, 2]])]),
    ("gather", {"x": X, "indices": 1, "axis": 1}, X[:, 1]),
    ("gather", {"x": SEQUENCE, "indices": torch.tensor([[0, 2], [1, 1]]), "axis": 1, "batch_dims": 1},
     torch.stack([SEQUENCE[0, [0, 2]], SEQUENCE[1, [1, 1]]])),
    ("gather_along_axis", {"x": X, "indices": Y.argsort(2).int() - 7, "axis": 2}, X.gather(2, Y.argsort(2))),
    ("gather_nd", {"x": X, "indices": torch.tensor([[0, 1], [1, -1]])}, torch.stack([X[0, 1], X[1, 2]])),
    ("gather_nd", {"x": SEQUENCE, "indices": torch.tensor([[[2]], [[0]]]), "batch_dims": 1},
     torch.stack([SEQUENCE[0, 2:3], SEQUENCE[1, 0:1]])),
    ("scatter", {"data": torch.zeros(3, 4), "indices": i(1, 1, -1), "updates": torch.ones(3, 4), "axis": 0},
     torch.tensor([[0.0], [2.0], [1.0]]).expand(3, 4)),
    ("scatter_along_axis", {"data": torch.zeros(2, 3), "indices": torch.tensor([[0, 0, 2], [1, 1, 1]]),
                            "updates": torch.ones(2, 3), "axis": 1}, torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])),
    ("scatter_nd", {"data": torch.ones(2, 3), "indices": torch.tensor([[0, 1], [1, 2]]), "mode": "update",
                    "updates": torch.tensor([5.0, 6.0])}, torch.tensor([[1.0, 5.0, 1.0], [1.0, 1.0, 6.0]])),
    ("topk", {"x": X, "k": 3, "axis": 2, "ascending": True}, None),
    ("argsort", {"x": X, "axis": 1, "ascending": True}, X.argsort(1).int()),
    ("one_hot", {"indices": i(0, 2), "one_hot_vector_size": 3, "on_value": 5, "off_value": -1},
     torch.tensor([[5, -1, -1], [-1, -1, 5]], dtype=torch.int32)),
    ("range_1d", {"end": 9, "start": 2, "step": 3}, i(2, 5, 8)),
    ("non_zero", {"x": torch.tensor([[0, 1], [2, 0]])}, torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)),
    ("resize_bilinear", {"x": X, "target_size_height": 11, "target_size_width": 3, "sampling_mode": "UNALIGN_CORNERS"},
     F.interpolate(X, (11, 3), mode="bilinear", align_corners=False)),
    ("resize_bilinear", {"x": X, "target_size_height": 11, "target_size_width": 3,
                         "sampling_mode": "STRICT_ALIGN_CORNERS"},
     F.interpolate(X, (11, 3), mode="bilinear", align_corners=True)),
    ("resize_nearest_neighbor", {"x": X, "target_size_height": 10, "target_size_width": 13},
     F.interpolate(X, (10, 13))),
    ("upsample_bilinear", {"x": X, "scale_factor_height": 2, "scale_factor_width": 3, "align_corners": False},
     F.interpolate(X, scale_factor=(2, 3), mode="bilinear")),
    ("resize", {"x": X, "shape": i(9, 0, 12), "resized_dims": 2, "sampling_mode": "UNALIGN_CORNERS"},
     F.interpolate(X, (7, 12), mode="bilinear")),
]  # fmt: skip
WRITTEN_OUT = {"conv_transpose", "slice_update", "topk"}


@pytest.mark.parametrize("name, arguments, wanted", CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)])
def test_operator_computes_what_its_reference_does(name, arguments, wanted):
    if name in WRITTEN_OUT and wanted is None:
        wanted = written_out(name, arguments)
    found = OPERATORS[name](**arguments)
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple | list) else [(found, wanted)]
    for one, other in pairs:
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def written_out(name, arguments):
    if name == "conv_transpose":
        full = F.conv_transpose2d(arguments["x"], arguments["weight"], None, 2)
        return full[:, :, :14, :10]
    if name == "slice_update":
        wanted = arguments["x"].clone()
        wanted[1:2, :, 1:7:2] = 0
        return wanted
    values, indices = arguments["x"].topk(3, 2, largest=False)
    return values, indices.int()


def test_blocks_move_as_in_the_definition():
    x = rand(4, 8, 4, 6)
    deep = OPERATORS["space_to_depth"](x=x, block_size=2)
    assert torch.equal(OPERATORS["depth_to_space"](x=deep, block_size=2), x)
    assert torch.equal(deep[:, 8 * 1 : 8 * 2], x[:, :, 0::2, 1::2])
    batched = OPERATORS["space_to_batch"](x=x, block_shape=i(2, 3), paddings=torch.tensor([[1, 1], [0, 3]]))
    assert torch.equal(batched[4 * 4 : 4 * 5], F.pad(x, (0, 3, 1, 1))[:, :, 1::2, 1::3])
    back = OPERATORS["batch_to_space"](x=batched, block_shape=i(2, 3), crops=torch.tensor([[1, 1], [0, 3]]))
    assert torch.equal(back, x)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_every_rank(rank, groups):
    x = rand(2, 4, *(5, 6, 7)[:rank])
    transposed = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][rank - 1]
    layer = transposed(4, 6, 3, 2, 1, output_padding=1, groups=groups)
    wanted = layer(x)
    found = OPERATORS["conv_transpose"](
        x=x, weight=layer.weight, bias=layer.bias, pad=i(*[1] * 2 * rank), output_shape=i(*wanted.shape),
        pad_type="custom", strides=i(*[2] * rank), groups=groups,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    plain = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1](4, 6, 3, 2, 1, groups=groups)
    found = OPERATORS["conv"](
        x=x, weight=plain.weight, bias=plain.bias, pad=i(*[1] * 2 * rank), pad_type="custom", strides=i(*[2] * rank),
        groups=groups,
    )  # fmt: skip
    torch.testing.assert_close(found, plain(x), rtol=1e-5, atol=1e-6)


def test_normalizations():
    norm = nn.BatchNorm2d(3, eps=1e-3).eval()
    nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var), nn.init.normal_(norm.weight)
    arguments = {"mean": norm.running_mean, "variance": norm.running_var, "gamma": norm.weight, "beta": norm.bias}
    torch.testing.assert_close(OPERATORS["batch_norm"](x=X, epsilon=1e-3, **arguments), norm(X))
    torch.testing.assert_close(
        OPERATORS["instance_norm"](x=X, gamma=B6[:3], beta=B6[3:]), F.instance_norm(X, None, None, B6[:3], B6[3:])
    )


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_lstm_is_that_of_pytorch(direction):
    both = direction == "bidirectional"
    layer = nn.LSTM(5, 4, bidirectional=both)
    x, h, c = rand(6, 2, 5), rand(1 + both, 2, 4), rand(1 + both, 2, 4)
    wanted, (last_h, last_c) = layer(x.flip(0) if direction == "reverse" else x, (h, c))
    wanted = wanted.flip(0) if direction == "reverse" else wanted

    def gates(tensor):
        first, forget, cell, out = tensor.chunk(4)
        return torch.cat([first, forget, out, cell])

    def part(end):
        bias = getattr(layer, f"bias_ih_l0{end}") + getattr(layer, f"bias_hh_l0{end}")
        return [gates(t) for t in (getattr(layer, f"weight_ih_l0{end}"), getattr(layer, f"weight_hh_l0{end}"), bias)]

    weights = dict(zip(("weight_ih", "weight_hh", "bias"), part(""), strict=True))
    if both:
        weights |= dict(zip(("weight_ih_back", "weight_hh_back", "bias_back"), part("_reverse"), strict=True))
    every, found_h, found_c = OPERATORS["lstm"](
        x=x, initial_h=torch.cat(list(h), -1), initial_c=torch.cat(list(c), -1), direction=direction,
        output_sequence=True, **weights,
    )  # fmt: skip
    torch.testing.assert_close(every, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_h, torch.cat(list(last_h), -1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_c, torch.cat(list(last_c), -1), rtol=1e-5, atol=1e-6)


def test_what_an_operator_cannot_do_is_an_error():
    with pytest.raises(ValueError, match="peephole"):
        OPERATORS["lstm"](x=X[0], initial_h=X, initial_c=X, weight_ih=X, weight_hh=X, peephole=X)
    with pytest.raises(ValueError, match="symmetric padding"):
        OPERATORS["resample"](x=X, coordinates=Y, sampling_mode="bilinear", padding_mode="symmetric", padding_value=0.0,
                              coordinates_mode="normalized_minus_one_to_one", align_corners=False)  # fmt: skip
