"""Weights of 4 bits as files hold them: two in a byte (``packed``), or on their grid in bytes (``fast``)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.errors import ParityError, Unsupported
from edgepack.export._dialects import _attribute
from edgepack.export._integer_dialect import WEIGHTS_ONLY

if TYPE_CHECKING:
    from edgepack.contracts import Graph
    from edgepack.plan import Plan

Array = np.ndarray[Any, Any]
PACKED, FAST = "packed", "fast"
BITS, TOP = 4, 7  # integers from −7 to 7


def check_form(weights: str | None) -> None:
    """Raises ValueError for an option ``weights`` that is none of its words."""
    if weights not in (None, PACKED, FAST):
        raise ValueError(f"weights is 'packed', 'fast' or left out, not {weights!r}")


def require_four(plan: Plan, weights: str | None, format_name: str) -> None:
    """Raises Unsupported where ``packed`` is asked for and the plan has nothing to pack."""
    bits = {entry["weight"]["bits"] for entry in plan.nodes.values() if "weight" in entry}
    if weights == PACKED and BITS not in bits:
        found = f"weights of {min(bits)} bits" if bits else "no integer weights"
        raise Unsupported(
            f"{format_name}: weights = 'packed' packs weights of 4 bits, and the plan has {found}",
            "weight_bits = 4 in quantize, or leave weights out here",
        )


def packs(weights: str | None, simulation: Graph) -> bool:
    """Whether to pack for an engine that runs its 8-bit operators with packed weights too, in fixed ranges."""
    return weights == PACKED or (weights is None and not simulation.dialect.startswith("d8"))


def packs_float(weights: str | None, simulation: Graph) -> bool:
    """Whether to pack for an engine that computes in float with packed weights, or cannot have both."""
    return weights == PACKED or (weights is None and weights_only(simulation))


def weights_only(simulation: Graph) -> bool:
    """Whether activations stay float."""
    return simulation.dialect == WEIGHTS_ONLY


def fits(integers: Array) -> bool:
    """Whether an array is a weight of int8 whose values all fit 4 bits; scales and zero points have one axis."""
    return integers.dtype == np.int8 and integers.ndim > 1 and bool(np.abs(integers.astype(np.int16)).max() <= TOP)


def nibbles(integers: Array) -> Array:
    """Two values in a byte, the first in its lower half, rows following each other without a gap: (⌈n/2⌉,) uint8."""
    flat = np.zeros(integers.size + integers.size % 2, np.uint8)
    flat[: integers.size] = integers.astype(np.int8).reshape(-1).view(np.uint8) & 15
    return np.asarray(flat[::2] | flat[1::2] << 4)


def unpacked(data: Array, shape: Iterable[int]) -> Array:
    """The int8 values that ``nibbles`` packed."""
    sizes = tuple(shape)
    flat = np.stack([data & 15, data >> 4], -1).reshape(-1)[: int(np.prod(sizes))].astype(np.int8)
    return np.where(flat > TOP, flat - 16, flat).astype(np.int8).reshape(sizes)


def planned(simulation: Graph) -> dict[str, Array]:
    """Weights of the simulation that fit 4 bits: name → integers."""
    module = simulation.program.module(check_guards=False)
    found = {}
    for node in module.graph.nodes:
        if "dequantize_per_channel" in str(node.target):
            integers = _attribute(module, node.args[0]).detach().numpy()
            if fits(integers):
                found[str(node.args[0].target)] = integers
    return found


def hold_packed(stored: Iterable[Array], simulation: Graph, integers_too: bool = False) -> list[str]:
    """Every weight that fits 4 bits lies in the file in 4 bits; what that brings, as a sentence.

    Args:
        stored: the values of the file's tensors of 4 bits.
        integers_too: packed weights keep no operator from being computed in integers.

    Raises:
        ParityError: some do not; says which.
    """
    found = Counter(_fingerprint(array) for array in stored)
    wanted = planned(simulation)
    for name, integers in wanted.items():
        if not found[_fingerprint(integers)]:
            raise ParityError(f"{name!r} is planned in 4 bits, the file holds it otherwise")
    if not wanted:
        return []
    smaller = weights_only(simulation) or not integers_too
    return [f"{len(wanted)} weights lie in 4 bits{': smaller, not faster' if smaller else ''}"]


def _fingerprint(integers: Array) -> str:
    """The same for any order of axes and any signs of channels."""
    return hashlib.sha256(np.sort(np.abs(integers.astype(np.int16)), axis=None).tobytes()).hexdigest()
