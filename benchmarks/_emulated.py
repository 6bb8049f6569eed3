"""C files on processors that are not here: cross-compiled, run by QEMU, their instructions counted.

An emulator computes what the processor computes; it knows nothing of its speed. A count of instructions is exact and
the same on every run, but a vector instruction counts as one and memory costs nothing.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOARD = ROOT / "examples" / "c" / "cortex-m"
PLUGIN = Path(__file__).parent / "count_instructions.c"
FLAGS = ("-std=c99", "-O3", "-ffunction-sections", "-fdata-sections")
DOT = "-march=armv8.2-a+dotprod"
SELF_TEST = "selftest.c"
OWN = ("model.h", "weights.h")  # headers of a network; kernels do not read them
READERS = ("model.c", "weights.c", SELF_TEST)
LIMIT_S = 600


@dataclass(frozen=True)
class Processor:
    """A processor with its compiler and emulator.

    Attributes:
        name: as tables show it.
        flags: what to compile for.
        emulator: its words before the program's name.
        board: whether there is no operating system: the program carries the C library and talks through semihosting.
        plain: compile plain C although there are vectors.
        floats: whether it has a floating-point unit.
    """

    name: str
    compiler: str
    flags: tuple[str, ...]
    emulator: tuple[str, ...]
    board: bool = False
    plain: bool = False
    floats: bool = True

    def missing(self) -> str | None:
        """What to install before it works."""
        lacking = [tool for tool in (self.compiler, self.emulator[0]) if shutil.which(tool) is None]
        packages = (
            "gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm"
            if self.board
            else ("gcc-aarch64-linux-gnu qemu-user")
        )
        return f"needs {' and '.join(lacking)}: apt-get install {packages}" if lacking else None

    def build(self, folder: Path, work: Path) -> Path:
        """Compile a folder of C files to its self-test."""
        objects = self._objects(folder, work)
        program = _named(work, "selftest", objects)
        words = ["--specs=rdimon.specs", "-T", str(BOARD / "mps2.ld"), str(BOARD / "startup.c")] if self.board else []
        self._link(program, *objects, "-Wl,--gc-sections", *(words or ["-static"]), "-lm")
        return program

    def reachable_bytes(self, folder: Path, work: Path) -> int:
        """Code and constants of a program that calls the network alone."""
        entry = f"{_prefix(folder).lower()}_run"
        objects = [path for path in self._objects(folder, work) if not path.endswith(f"{SELF_TEST}.o")]
        part = _named(work, "reachable", objects)
        self._link(part, *objects, "-r", "-nostdlib", f"-Wl,--gc-sections,-e,{entry}")
        size = self.compiler.replace("gcc", "size")
        done = subprocess.run([size, str(part)], check=True, capture_output=True, text=True)
        return sum(map(int, done.stdout.splitlines()[1].split()[:2]))

    def _link(self, to: Path, *words: str) -> None:
        subprocess.run([self.compiler, *self.flags, "-o", str(to), *words], check=True, timeout=LIMIT_S)

    def _objects(self, folder: Path, work: Path) -> list[str]:
        """Compiled once per content: networks share their kernels."""
        words = [self.compiler, *FLAGS, *self.flags, *([f"-D{_prefix(folder)}_PLAIN"] if self.plain else [])]
        headers = b"".join(path.read_bytes() for path in sorted(folder.glob("*.h")) if path.name not in OWN)
        found = []
        for source in sorted(folder.glob("*.c")):
            own = b"".join((folder / name).read_bytes() for name in OWN) if source.name in READERS else b""
            key = hashlib.sha256(" ".join(words).encode() + headers + own + source.read_bytes()).hexdigest()[:32]
            made = work / f"{key}-{source.name}.o"
            if not made.exists():
                subprocess.run([*words, "-c", "-o", str(made), str(source)], check=True, timeout=LIMIT_S)
            found.append(str(made))
        return found

    def run(self, program: Path, *arguments: str, plugin: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; ``returncode`` is its own."""
        words = list(self.emulator)
        words += ["-plugin", str(plugin)] if plugin is not None else []
        if self.board:
            given = "".join(f",arg={text}" for text in (program.name, *arguments))
            words += ["-semihosting-config", f"enable=on,target=native{given}", "-kernel", str(program)]
        else:
            words += [str(program), *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT_S)

    def instructions(self, program: Path, plugin: Path) -> int:
        """Instructions of one call of the network: those of three calls less those of two."""
        two, three = (self._counted(program, plugin, calls) for calls in ("1", "2"))  # one more warms up
        return three - two

    def _counted(self, program: Path, plugin: Path, calls: str) -> int:
        done = self.run(program, "time", calls, plugin=plugin)
        found = re.search(r"^instructions: (\d+)$", done.stderr, re.MULTILINE)
        if done.returncode or found is None:
            raise RuntimeError(f"{self.name}: {done.stderr.strip() or done.stdout.strip()}")
        return int(found.group(1))


def _named(work: Path, name: str, objects: Sequence[str]) -> Path:
    """A file of its own for what is made of these objects."""
    return work / f"{name}-{hashlib.sha256(''.join(objects).encode()).hexdigest()[:16]}"


def plugin(work: Path) -> Path:
    """The compiled counter of instructions."""
    made = work / "count_instructions.so"
    if not made.exists():
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(made), str(PLUGIN)], check=True)
    return made


def _prefix(folder: Path) -> str:
    found = re.search(r"#define (\w+)_ARENA_BYTES", (folder / "model.h").read_text(encoding="utf-8"))
    assert found is not None
    return found.group(1)


def _board(machine: str) -> tuple[str, ...]:
    return ("qemu-system-arm", "-M", f"mps2-{machine}", "-nographic", "-monitor", "none", "-serial", "null")


def _arm64(name: str, *flags: str, plain: bool = False) -> Processor:
    return Processor(name, "aarch64-linux-gnu-gcc", flags, ("qemu-aarch64", "-cpu", "max"), plain=plain)


def _cortex_m(name: str, machine: str, *flags: str) -> Processor:
    floats = "-mfloat-abi=hard" in flags
    return Processor(name, "arm-none-eabi-gcc", ("-mthumb", *flags), _board(machine), board=True, floats=floats)


PROCESSORS: Sequence[Processor] = (
    _arm64("arm64, plain C", plain=True),
    _arm64("arm64, NEON"),
    _arm64("arm64, NEON with dot products", DOT),
    _cortex_m("Cortex-M3", "an385", "-mcpu=cortex-m3", "-mfloat-abi=soft"),
    _cortex_m("Cortex-M4F", "an386", "-mcpu=cortex-m4", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"),
    _cortex_m("Cortex-M7F", "an500", "-mcpu=cortex-m7", "-mfloat-abi=hard", "-mfpu=fpv5-d16"),
)
