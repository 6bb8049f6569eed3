"""Which kernel computes a layer of ±1 whose results are bits: every output by itself, or along their tree.

Costs are nanoseconds on the processor that docs/binary.md names, fitted to layers timed there; only ratios matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgepack.export._c_bits import BLOCK, WORD, Layer, Limits
from edgepack.export._c_graph import Buffer, Network, Step, channels_last
from edgepack.export._c_tree import UNIT, Frame, Tables, tables
from edgepack.trees import distances, spanning_tree

WORDS = {"avx512": (64, 16), "avx2": (32, 8)}  # bytes of pixels and outputs that a vector holds


@dataclass(frozen=True)
class Prices:
    """Nanoseconds: of a product of vectors of outputs and one word, of a pixel's result; of a block of bits that is
    transposed (512 × 32 or 32 × 32), of sixteen planes' vector, of an output's vector."""

    product: float
    pixel: float
    block: float
    sixteen: float
    output: float


PRICES = {"avx512": Prices(0.42, 8.3, 151.0, 10.3, 9.6), "avx2": Prices(0.63, 9.9, 8.9, 9.8, 16.9)}


def choose(network: Network, kernel: str) -> None:
    """Let layers be computed along trees where that is faster, with AVX-512 or without; or all, or none."""
    for step in network.steps:
        if step.kernel == "sign_bits" and kernel != "xnor":
            found = _tables(step)
            if found is None:
                continue
            step.options["tables"] = found
            ways = {level: kernel == "tree" or along(step, level) < plain(step, level) for level in PRICES}
            if any(ways.values()):
                step.options["ways"] = ways
                step.kernel = "tree_bits"
                step.scratch = Buffer("uint8", found.scratch_bytes)


def _tables(step: Step) -> Tables | None:
    """None where there is no tree: inputs differ between outputs, or zeros are around."""
    layer: Layer = step.options["layer"]
    limits: Limits = step.options["limits"]
    if layer.groups > 1 or step.options["around"] is not None or layer.outputs < 2:
        return None
    image, slide = step.inputs[0].in_order(channels_last(4)), layer.window
    rows, columns = step.output.in_order(channels_last(4)).sizes[1:3]
    frame = Frame(rows, columns, slide.stride, slide.dilation, image.strides[1], image.strides[2])
    tree = spanning_tree(distances(layer.signs.reshape(layer.outputs, -1)))
    return tables(layer.signs, tree, limits.limit, limits.turn, frame)


def plain(step: Step, level: str) -> float:
    """Nanoseconds of a layer, output by output."""
    products, pixels = terms(step, level)[:2]
    return PRICES[level].product * products + PRICES[level].pixel * pixels


def along(step: Step, level: str) -> float:
    """Nanoseconds of a layer along its tree; where vectors of AVX-512 would be half empty, those of AVX2 are used."""
    numbers = step.options["tables"].numbers
    narrow = numbers["band"] == 1 and step.output.sizes[step.output.axis(2)] * numbers["row_bytes"] <= WORDS["avx2"][0]
    level = "avx2" if narrow else level
    blocks, sixteens, outputs = terms(step, level)[2:]
    return PRICES[level].block * blocks + PRICES[level].sixteen * sixteens + PRICES[level].output * outputs


def terms(step: Step, level: str) -> tuple[float, float, float, float, float]:
    """How often each price is paid."""
    layer: Layer = step.options["layer"]
    found: Tables = step.options["tables"]
    numbers, (octets, lanes) = found.numbers, WORDS[level]
    height, width = (step.output.sizes[step.output.axis(axis)] for axis in (2, 3))
    words = -(-layer.signs.shape[1] // WORD) * layer.signs[0, 0].size
    vectors = -(-layer.outputs // BLOCK) * BLOCK // lanes
    turned = passes = 0
    for start in range(0, height, numbers["band"] * numbers["rows"]):
        deep = min(numbers["band"] * numbers["rows"], height - start)
        units = -(-deep // numbers["rows"])
        each = units if octets == UNIT else deep * -(-min(numbers["tile"], width) // WORD)
        beyond = int(found.arrays["beyond"].sum()) * each // units
        turned += numbers["words"] * (numbers["variants"] * each + beyond) + -(-layer.outputs // WORD) * each
        passes += units if octets == UNIT else units * -(-(-(-deep // units) * numbers["row_bytes"]) // octets)
    tiles = -(-width // numbers["tile"])
    sixteens = len(found.arrays["places"]) / 16
    pixels = height * width
    return (pixels * words * vectors, pixels * -(-layer.outputs // (4 * lanes)), tiles * turned,
            tiles * passes * sixteens, tiles * passes * layer.outputs)  # fmt: skip
