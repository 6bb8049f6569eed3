"""Calibration is streamed: what compressing takes does not grow with the number of images."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("resource", reason="this system does not tell a process's peak memory")

MOST_BYTES = 3 << 29
COMPRESS = """
import json, resource, sys, tempfile
from pathlib import Path
import numpy as np
import torch
from torch import nn
from edgepack.compress.quantize import Quantize
from edgepack.compressing import compress
from edgepack.data import Batch
from edgepack.progress import Silent
from edgepack.task import Input, Task

torch.set_num_threads(1)

class Images:
    labels = ()
    read = 0
    def __init__(self, count):
        self.count = count
    def __len__(self):
        return self.count
    def batches(self, size):
        numbers = np.random.default_rng(0)
        for start in range(0, self.count, size):
            rows = min(size, self.count - start)
            Images.read += rows
            values = {"x": numbers.standard_normal((rows, 3, 224, 224), np.float32)}
            yield Batch(values, values, None)

network = nn.Sequential(
    nn.Conv2d(3, 16, 3, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
).eval()
with tempfile.TemporaryDirectory() as folder:
    task = Task((Input("x", (1, 3, 224, 224)),), calibration=Images(int(sys.argv[1])))
    compress(network, task, [Quantize()], Path(folder), Silent())
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Images.read]))
"""


def peak_bytes(images: int) -> tuple[int, int]:
    """Peak memory of a process that compresses a small network, and how many images it read."""
    how = [sys.executable, "-W", "ignore", "-c", COMPRESS, str(images)]
    done = subprocess.run(how, capture_output=True, text=True, check=True)
    peak, read = json.loads(done.stdout.splitlines()[-1])
    return peak * (1 if sys.platform == "darwin" else 1024), read


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images() -> None:
    few, read_few = peak_bytes(800)  # as many as layers are explained and corrected on, and some
    many, read_many = peak_bytes(2400)  # 1.4 GB as floats, in each of several readings
    assert read_many > 2 * read_few
    assert many < few + (64 << 20)
    assert many < MOST_BYTES
