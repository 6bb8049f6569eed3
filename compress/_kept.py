"""What cuts do on real images, for the report: attention that the kept tokens hold, and pictures of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgepack.compress._cuts import Block, Cut
from edgepack.compress._tokens import kept_of

if TYPE_CHECKING:
    from edgepack.contracts import Run
    from edgepack.task import Task

SAMPLES = 32
PICTURES = 6
SIDE = 96  # pixels of a picture
SHADE = 0.25  # of a dropped patch's brightness
GAP = 4
Array = np.ndarray[Any, Any]
Seen = dict[str, tuple[Tensor, Tensor | None]]


def findings(
    module: nn.Module, blocks: Sequence[Block], cuts: Sequence[Cut], lengths: Mapping[str, tuple[int, int]],
    task: Task, run: Run,
) -> dict[str, Any]:  # fmt: skip
    """Per block the share of attention that its keep rate would hold, and pictures of what is kept.

    Blocks that are not cut are looked at with the smallest keep rate. On calibration data; on the task's own samples
    (random where it has none) without pictures.
    """
    inputs, raw = _samples(task)
    run.progress("looking at attention")
    before = {block.path: block.layer.__dict__.get("forward") for block in blocks}
    uncut = _watched(module, [block.cut(1.0, True) for block in blocks], inputs)
    for block in blocks:
        del block.layer.forward
        block.layer.__dict__.update({} if before[block.path] is None else {"forward": before[block.path]})
    seen = _watched(module, cuts, inputs)
    rate = dict.fromkeys((block.path for block in blocks), min(cut.keep_rate for cut in cuts))
    rate |= {cut.path: cut.keep_rate for cut in cuts}
    rows = [
        {
            "block": block.path, "index": block.index, "branch": block.branch, "cut": block.path in seen,
            "tokens": list(lengths[block.path]), "attentiveness": _held(uncut[block.path][0], rate[block.path]),
        }
        for block in blocks
    ]  # fmt: skip
    margins = {cut.path: margin for cut in cuts if (margin := _margin(seen[cut.path][0], cut)) is not None}
    return {
        "samples": len(inputs[0]),
        "blocks": rows,
        "margins": margins,
        "pictures": _pictures(raw, blocks, cuts, seen),
    }


def _samples(task: Task) -> tuple[list[Tensor], Array | None]:
    """Inputs of the network and the 8-bit pixels they were made of, None where they are no pictures."""
    if not task.calibration:
        found = task.samples(SAMPLES)
        return [torch.from_numpy(found[spec.name]) for spec in task.specs], None
    batch = next(iter(task.calibration.batches(SAMPLES)))
    raw = batch.raw.get(task.specs[0].name)
    picture = raw is not None and raw.ndim == 4 and raw.shape[-1] in (1, 3) and raw.dtype == np.uint8
    return [torch.from_numpy(batch.inputs[spec.name]) for spec in task.specs], raw if picture else None


def _watched(module: nn.Module, cuts: Sequence[Cut], inputs: Sequence[Tensor]) -> Seen:
    """Scores and kept places at each cut; leaves the cuts put."""
    seen: Seen = {}

    def watch(cut: Cut, scores: Tensor, places: Tensor | None) -> None:
        seen[cut.path] = scores, places

    for cut in cuts:
        cut.put()
        cut.watch = watch
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for cut in cuts:
            cut.watch = None
    return seen


def _held(scores: Tensor, keep_rate: float) -> float:
    """Mean share of the candidates' attention that the most attentive ones hold."""
    kept = scores.topk(kept_of(scores.shape[1], keep_rate), dim=1).values.sum(1)
    return round(float((kept / scores.sum(1)).mean()), 4)


def _margin(scores: Tensor, cut: Cut) -> float | None:
    """Median distance of the last kept score to the first dropped one, over the former."""
    kept = kept_of(scores.shape[1], cut.keep_rate)
    if kept == scores.shape[1]:
        return None
    ordered = scores.sort(dim=1, descending=True).values
    return float(((ordered[:, kept - 1] - ordered[:, kept]) / ordered[:, kept - 1]).median())


def _pictures(raw: Array | None, blocks: Sequence[Block], cuts: Sequence[Cut], seen: Seen) -> list[str]:
    """One strip per image: itself, then behind each cut of the branch with the most patches, as PNG in base64."""
    if raw is None:
        return []
    first = {block.branch: block for block in reversed(blocks)}
    branch = max(first.values(), key=lambda block: block.tokens).branch
    paths = [block.path for block in blocks if block.branch == branch]
    own = [cut for cut in cuts if cut.path in paths]
    patches = first[branch].tokens - first[branch].special
    strips = []
    for index, image in enumerate(raw[:PICTURES]):
        rows = _rows(patches, image.shape[0], image.shape[1])
        if rows is None:
            return []
        here = [places[index].tolist() for cut in own if (places := seen[cut.path][1]) is not None]
        kept = [_mask(left, rows) for left in origins(patches, here)]
        strips.append(_strip(image, [np.ones((1, 1), bool), *kept]))
    return strips


def origins(patches: int, kept: Sequence[Sequence[int]]) -> list[Array]:
    """Which of the patches are left behind each cut, from the places that each kept among its candidates.

    A fused token is the last candidate of the cut that follows; it stands for no patch.
    """
    here = np.arange(patches)
    found = []
    for places in kept:
        here = np.append(here, -1)[list(places)]
        found.append(here[here >= 0])
    return [np.isin(np.arange(patches), left) for left in found]


def _rows(patches: int, height: int, width: int) -> int | None:
    """Rows of the grid of patches; None where the patches are no such grid."""
    rows = round((patches * height / width) ** 0.5)
    return rows if rows and patches % rows == 0 else None


def _mask(kept: Array, rows: int) -> Array:
    return kept.reshape(rows, -1)


def _strip(image: Array, masks: Sequence[Array]) -> str:
    from PIL import Image

    scale = SIDE / max(image.shape[:2])
    size = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    shown = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB").resize(size)
    strip = Image.new("RGB", (len(masks) * (size[0] + GAP) - GAP, size[1]), "white")
    for index, mask in enumerate(masks):
        bright = Image.fromarray(np.where(mask, 255, round(255 * SHADE)).astype(np.uint8)).resize(
            size, Image.Resampling.NEAREST
        )
        strip.paste(Image.composite(shown, Image.new("RGB", size), bright), (index * (size[0] + GAP), 0))
    packed = io.BytesIO()
    strip.save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode("ascii")
