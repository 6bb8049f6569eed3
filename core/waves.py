"""A vibrating membrane, for networks that predict physics: the wave equation by the leap-frog method.

u_tt = c²·(u_xx + u_yy) on a square of n × n points whose edge is held at 0. With the five-point Laplacian L (in units
of the spacing squared) and the Courant number s = c·Δt/Δx,

    u[t+1] = 2·u[t] − u[t−1] + s²·L·u[t]

which is stable for s ≤ 1/√2 and of second order in space and time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

LARGEST = 1 / math.sqrt(2)
BUMPS, WIDTHS = (1, 4), (0.05, 0.12)  # how many start a membrane, and their widths as shares of its side


def laplacian(u: Array) -> Array:
    """Five-point Laplacian of fields (…, n, n) with zeros around them, in units of the spacing squared."""
    padded = np.pad(u, [(0, 0)] * (u.ndim - 2) + [(1, 1), (1, 1)])
    sides = padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1] + padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2]
    return np.asarray(sides - 4 * u)


def propagate(start: Array, frames: int, courant: float = 0.5, every: int = 1) -> Array:
    """Fields (…, frames, n, n) of membranes that are at rest in the shape ``start`` (…, n, n).

    Args:
        courant: c·Δt/Δx.
        every: steps between two frames; the first frame is the start.

    Raises:
        ValueError: the scheme would be unstable.
    """
    if not 0 < courant <= LARGEST + 1e-12:
        raise ValueError(f"courant is above 0 and at most 1/√2 = {LARGEST:.4f}, or the waves explode; not {courant}")
    square = courant**2
    before, now = start, start + 0.5 * square * laplacian(start)  # at rest: u[−1] = u[1]
    found = [start]
    for step in range(1, (frames - 1) * every + 1):
        if step % every == 0:
            found.append(now)
        before, now = now, 2 * now - before + square * laplacian(now)
    return np.stack(found, axis=-3)


def membranes(count: int, size: int, seed: int = 0) -> Array:
    """Starts (count, size, size): sums of a few random Gaussian bumps, of height 1 at most each."""
    random = np.random.default_rng(seed)
    places = (np.arange(size) + 1) / (size + 1)  # the held edge lies outside
    fields = np.zeros((count, size, size))
    for field in fields:
        for _ in range(random.integers(BUMPS[0], BUMPS[1] + 1)):
            x, y = random.uniform(0.2, 0.8, 2)
            width, height = random.uniform(*WIDTHS), random.choice((-1, 1)) * random.uniform(0.4, 1.0)
            distance = (places[:, None] - y) ** 2 + (places[None] - x) ** 2
            field += height * np.exp(-distance / (2 * width**2))
    return fields


def samples(
    count: int, size: int = 32, past: int = 3, ahead: int = 1, courant: float = 0.5, every: int = 4, seed: int = 0
) -> tuple[Array, Array]:
    """What a network reads and predicts: ``past`` frames (count, size, size, past), and the one ``ahead`` of the last.

    Each sample is another membrane, at a random time.
    """
    random = np.random.default_rng([seed, 1])
    span = past + ahead
    fields = propagate(membranes(count, size, seed), 3 * span, courant, every)
    first = random.integers(0, 2 * span + 1, count)
    windows = np.stack([field[begin : begin + span] for field, begin in zip(fields, first, strict=True)])
    x = np.moveaxis(windows[:, :past], 1, -1)
    return np.ascontiguousarray(x, np.float32), np.ascontiguousarray(windows[:, -1:], np.float32)


def relative_l2(outputs: Array, targets: Array) -> Array:
    """‖prediction − field‖ / ‖field‖ of each sample."""
    missed, size = (np.sqrt((part.reshape(len(part), -1).astype(np.float64) ** 2).sum(1))
                    for part in (outputs - targets, targets))  # fmt: skip
    return np.asarray(missed / np.maximum(size, 1e-12))
