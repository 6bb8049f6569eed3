"""Real data, where this checkout has them beside it: they open, and networks score as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack import usercode
from edgepack.data import open_data
from edgepack.metrics import find
from edgepack.task import Input

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED}")


@needs_shared
def test_real_sets_open() -> None:
    image = Input("input", (1, 3, 224, 224), resize=256)
    data = open_data({"data": "imagenet_sample", "samples": 5}, (image,), SHARED)
    assert next(data.batches(5)).inputs["input"].shape == (5, 3, 224, 224)
    free = Input("input", (1, 3, 64, 64), dynamic=("batch", "height", "width"), scale=255)
    pairs = open_data({"inputs": "set5/LR_x2", "targets": "set5/HR"}, (free,), SHARED)
    for batch in pairs.batches(1):
        assert batch.targets is not None
        assert [2 * side for side in batch.inputs["input"].shape[2:]] == list(batch.targets.shape[2:])


IMAGENET = {"scale": 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(
    "network, weights, item, spec, metric, wanted",
    [
        (
            "resnet20", "resnet20_cifar10", Input("input", (1, 3, 32, 32), **IMAGENET),
            {"data": "cifar10_test.npz", "samples": 1000}, "top1", "91.40 %",
        ),
        (  # 42.67 % where the crop of images of odd length starts one pixel earlier than torchvision's
            "mobilenet_v1_025", "mobilenet_v1_025_imagenet", Input("input", (1, 3, 224, 224), resize=256, **IMAGENET),
            "imagenet_sample", "top1", "42.00 %",
        ),
        (
            "imdn_x2", "imdn_x2", Input("input", (1, 3, 64, 64), scale=255, dynamic=("batch", "height", "width")),
            {"inputs": "set5/LR_x2", "targets": "set5/HR"}, "psnr_y", "37.91 dB",
        ),
    ],
)  # fmt: skip
def test_published_scores(network: str, weights: str, item: Input, spec: Any, metric: str, wanted: str) -> None:
    torch = pytest.importorskip("torch", reason="pip install torch")
    from safetensors.torch import load_file

    module = usercode.load(f"models.py:{network}", Path(__file__).parents[1] / "examples" / "zoo")().eval()
    module.load_state_dict(load_file(SHARED / f"{weights}.safetensors"))
    found = find(metric, SHARED)
    with torch.no_grad():
        rows = [
            found.statistics(module(torch.from_numpy(batch.inputs["input"])).numpy(), batch.targets)
            for batch in open_data(spec, (item,), SHARED).batches(50)
        ]
    assert found.format(found.reduce(np.concatenate(rows))) == wanted
