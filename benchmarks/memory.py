"""Peak memory of eight-bit compression, by number of calibration images. Writes results/memory.json, docs/memory.md.

    python benchmarks/memory.py --networks resnet50 --images 64 512
    python benchmarks/memory.py document              # only the page, from what is stored

Networks with random weights, calibrated on pictures of the ImageNet sample at 224×224, over and over until there are as
many as wanted; each is read from its file again. One fresh process per row, one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networks as zoo
import torch
from _memory_page import RESULTS
from _stored import ROOT

from edgepack import models
from edgepack.compress.quantize import Quantize
from edgepack.compressing import compress
from edgepack.data import Batch, Data, open_data
from edgepack.task import Input, Task
from edgepack.versions import versions

NETWORKS = {
    "mobilenet_v2": "torchvision:mobilenet_v2",
    "resnet50": "torchvision:resnet50",
    "deit_small": "timm:deit_small_patch16_224",
}


@dataclass(frozen=True)
class Repeated:
    """The first ``length`` samples of data that start again when they end."""

    data: Data
    length: int
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.length

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, self.length, size):
            yield from self.take(range(start, min(start + size, self.length)))

    def take(self, rows: Sequence[int]) -> Iterator[Batch]:
        yield from self.data.take([row % len(self.data) for row in rows])


@dataclass
class Watch:
    """Progress that notes the highest resident memory of each piece of work."""

    peaks: dict[str, int] = field(default_factory=dict)
    now: str = "loading"

    def start(self, text: str, total: int | None = None) -> Callable[[int], None]:
        self.done()
        self.now = text
        return lambda steps: None

    def done(self) -> None:
        self.peaks[self.now] = max(self.peaks.get(self.now, 0), status_bytes("VmHWM"))
        sys.stderr.write(f"{self.now}: {self.peaks[self.now] / 2**30:.2f} GiB\n")
        Path("/proc/self/clear_refs").write_text("5")  # the next peak starts from what is held now


def status_bytes(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{key}:")))


def measured(name: str, images: int, data: Path) -> dict[str, Any]:
    """What this process takes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    models.prepare_torchvision()
    module = zoo.with_statistics(models.load(NETWORKS[name], Path())).eval()
    item = Input("input", (1, 3, 224, 224), resize=256, **zoo.IMAGENET)
    pictures = Repeated(open_data({"data": "imagenet_sample"}, (item,), data), images)
    watch, began = Watch(), time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        compress(module, Task((item,), calibration=pictures), [Quantize()], Path(out), watch)
    watch.done()
    return {"network": name, "images": images, "peak_bytes": max(watch.peaks.values()), "pieces": watch.peaks,
            "seconds": round(time.perf_counter() - began)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "document"), default="run")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet50"])
    parser.add_argument("--images", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", nargs=2, metavar=("NETWORK", "IMAGES"), help="print what this process takes")
    options = parser.parse_args()
    if options.what == "document":
        RESULTS.rewrite()
    elif options.only:
        print(json.dumps(measured(options.only[0], int(options.only[1]), options.data)))  # noqa: T201
    else:
        for name in options.networks:
            for images in options.images:
                RESULTS.store("peaks", fresh(name, images, options.data), facts())


def fresh(name: str, images: int, data: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", name, str(images), "--data", str(data)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def facts() -> dict[str, Any]:
    return {"versions": versions("torch", "torchvision", "timm"),
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"}  # fmt: skip


if __name__ == "__main__":
    main()
