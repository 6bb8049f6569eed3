"""Instructions that one call of a TFLite file takes on processors that are not here, through LiteRT's C library.

XNNPACK multiplies by the non-zero weights alone where it is told by the file and where it expects a gain: on ARM, and
on x86 without AVX. An emulator says whether it does; a count of instructions is no time.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from _emulated import plugin
from torch import Tensor, nn

from edgepack.compress.sparsify import Sparsify
from edgepack.compressing import PassRun
from edgepack.export.tflite import MODEL, Tflite
from edgepack.graph import capture
from edgepack.plan import Plan
from edgepack.progress import Silent
from edgepack.task import Input, Task

SOURCE = Path(__file__).parent / "litert_calls.c"
SIZE = 224
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
CPUINFO = (
    "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc "
    "dcpop asimddp ssbs\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n"
    "CPU revision\t: 1\n\n"
)


class MobileNetV1(nn.Module):
    """A. Howard et al., "MobileNets" (arXiv:1704.04861), batch norms folded; random weights."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU6()]
        channels = 32
        for outputs, stride in BLOCKS:
            layers += [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels), nn.ReLU6()]
            layers += [nn.Conv2d(channels, outputs, 1), nn.ReLU6()]
            channels = outputs
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(nn.functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return scores


@dataclass(frozen=True)
class Emulated:
    """A processor that is emulated.

    Attributes:
        program: ``litert_calls`` built for it.
        words: the emulator's, before the program.
    """

    name: str
    program: Path
    words: tuple[str, ...]

    def call(self, model: Path, calls: int, counter: Path) -> int:
        """Instructions of that many calls and of loading."""
        words = [*self.words, "-plugin", str(counter), str(self.program), str(model), str(calls)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=900)
        found = re.search(r"^instructions: (\d+)$", done.stderr, re.MULTILINE)
        assert found is not None
        return int(found.group(1))

    def instructions(self, model: Path, counter: Path) -> int:
        """Of one call: those of two calls less those of one. Counted once for a file, beside which they are kept."""
        found = [self._counted(model, calls, counter) for calls in (1, 2)]
        return found[1] - found[0]

    def _counted(self, model: Path, calls: int, counter: Path) -> int:
        kept = model.with_name(f"{self.program.name}-{calls}.txt")
        if not kept.exists():
            kept.write_text(str(self.call(model, calls, counter)))
        return int(kept.read_text())


def emulated(work: Path, arm: Path | None) -> list[Emulated]:
    """x86 without AVX, and arm64 where an unpacked aarch64 wheel of ai-edge-litert was given."""
    import ai_edge_litert

    here = Path(str(ai_edge_litert.__file__)).parent
    found = [Emulated("x86-64 without AVX", _built(work, "gcc", here), ("qemu-x86_64", "-cpu", "Nehalem"))]
    if arm is not None:
        root = work / "root"
        (root / "proc").mkdir(parents=True, exist_ok=True)
        (root / "proc" / "cpuinfo").write_text(CPUINFO)  # the library reads the host's otherwise, and fails
        if not (root / "lib").exists():
            (root / "lib").symlink_to("/usr/aarch64-linux-gnu/lib")
        words = ("qemu-aarch64", "-cpu", "neoverse-n1", "-L", str(root))
        found.append(Emulated("arm64", _built(work, "aarch64-linux-gnu-gcc", arm / "ai_edge_litert"), words))
    return found


def _built(work: Path, compiler: str, library: Path) -> Path:
    made = work / f"litert_calls-{compiler}"
    words = [str(SOURCE), str(library / "libLiteRt.so"), f"-Wl,-rpath,{library}", "-Wl,--allow-shlib-undefined"]
    subprocess.run([compiler, "-O2", "-o", str(made), *words], check=True)
    return made


def files(work: Path, share: float, pattern: str) -> Mapping[str, Path]:
    """MobileNetV1 dense, and with so many zeros in its 1×1 layers and its classifier, as TFLite files."""
    import torch

    torch.manual_seed(0)
    module, task = MobileNetV1().eval(), Task((Input("x", (1, 3, SIZE, SIZE)),))
    found = {"dense": _written(module, task, work / "mobilenet-dense")}
    run = PassRun(work, 0, Plan(), Silent(), module, task)
    layers = tuple(name for name, layer in module.named_modules() if _pointwise(layer))
    how = Sparsify(sparsity=share, pattern=pattern, method="magnitude", allocation="layerwise", layers=layers)
    how.apply(module, task, run)
    return found | {"sparse": _written(module, task, work / f"mobilenet-{pattern}-{share:g}")}


def _pointwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def _written(module: nn.Module, task: Task, folder: Path) -> Path:
    if not (folder / MODEL).exists():
        folder.mkdir(parents=True, exist_ok=True)
        exporter = Tflite()
        exporter.write(exporter.lower(capture(module, task), Plan()), folder)
    return folder / MODEL


def counts(
    work: Path, share: float, pattern: str, arm: Path | None, only: Sequence[str]
) -> Iterator[dict[str, object]]:
    """Per processor: instructions of a call, dense and sparse. ``only`` these rows, if any are named."""
    named = {f"{processor.name}, {pattern}, {share:g}": processor for processor in emulated(work, arm)}
    wanted = {row: processor for row, processor in named.items() if not only or row in only}
    if not wanted:
        return
    counter, made = plugin(work), files(work, share, pattern)
    for row, processor in wanted.items():
        yield {
            "row": row, "processor": processor.name, "share": share, "pattern": pattern,
            "bytes": {word: path.stat().st_size for word, path in made.items()},
            "instructions": {word: processor.instructions(path, counter) for word, path in made.items()},
        }  # fmt: skip
