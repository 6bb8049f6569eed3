"""C files, compiled by this system's compiler."""

from __future__ import annotations

import ctypes
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgepack.contracts import Arrays, Runtime, Session, Step, TensorSpec
from edgepack.errors import InputError
from edgepack.runtimes._c_build import compiler, compiler_version, library, reachable_bytes
from edgepack.runtimes._inputs import Gate

if TYPE_CHECKING:
    from edgepack.artifact import Artifact

HEADER = "model.h"
SMALL_BYTES = 1 << 16  # of inputs and outputs; up to here copying costs less than asking NumPy for addresses
TRACE = "TRACE"  # a macro of the files, behind their prefix


@dataclass(frozen=True, kw_only=True)
class C(Runtime):
    """Compile C files with the system's compiler and run them in this process, on one thread.

    Attributes:
        level: of x86: 0 plain C, 1 AVX2, 2 AVX-512; the best the processor has, up to this.
        flags: more words for the compiler.
    """

    formats: ClassVar[tuple[str, ...]] = ("c",)

    level: int = 2
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.level not in (0, 1, 2):
            raise ValueError(f"level is 0, 1 or 2, not {self.level}")

    def version(self) -> str:
        return compiler_version(compiler())

    def load(self, artifact: Artifact, threads: int | None = None) -> Session:
        return self._session(artifact)

    def compiled_bytes(self, artifact: Artifact) -> int | None:
        return reachable_bytes(artifact.folder, _sources(artifact), f"{_prefix(artifact)}_run")

    def trace(self, artifact: Artifact, inputs: Arrays) -> list[Step]:
        """Every step's results. What is computed in one step (convolution, sum, activation) shows as one."""
        session = self._session(artifact, traced=True)
        found: list[Step] = []
        session.watch(lambda number, memory: found.append(session.step(number, memory)))
        session.run(inputs)
        session.watch(None)
        return found

    def layer_times(self, artifact: Artifact, inputs: Arrays, repeats: int = 20) -> list[tuple[str, str, float]]:
        """Kernel, operator and milliseconds (the least of ``repeats`` calls) of each step.

        Steps below some ten microseconds show the clock as much as themselves.
        """
        session = self._session(artifact, traced=True)
        times: dict[int, float] = {}
        last = time.perf_counter()

        def stop(number: int, memory: int) -> None:
            nonlocal last
            now = time.perf_counter()
            times[number] = min(times.get(number, float("inf")), 1e3 * (now - last))
            last = time.perf_counter()

        session.watch(stop)
        for _ in range(repeats):
            last = time.perf_counter()
            session.run(inputs)
        session.watch(None)
        facts = (session.facts(number) for number in times)
        return [(fact["kernel"], fact["name"], spent) for fact, spent in zip(facts, times.values(), strict=True)]

    def _session(self, artifact: Artifact, traced: bool = False) -> _Session:
        sources, prefix = _sources(artifact), _prefix(artifact)
        flags = [f"-D{prefix.upper()}_LEVEL={self.level}", *self.flags]
        flags += [f"-D{prefix.upper()}_{TRACE}"] if traced else []
        artifact.check_hashes()  # what is compiled is executed
        return _Session(ctypes.PyDLL(str(library(artifact.folder, sources, flags))), artifact, prefix)


def _sources(artifact: Artifact) -> list[str]:
    found = [name for name in artifact.manifest.files if name.endswith((".c", ".h"))]
    if HEADER not in found:
        raise InputError(f"{artifact.folder} holds no {HEADER}", "export again")
    return found


def _prefix(artifact: Artifact) -> str:
    header = (artifact.folder / HEADER).read_text(encoding="utf-8")
    found = re.search(r"^void (\w+)_run\(", header, re.MULTILINE)
    if found is None:
        raise InputError(f"{artifact.folder / HEADER} declares no function _run", "export again")
    return found.group(1)


class _Session:
    """The library keeps one arena; the interpreter's lock is held while it computes, so calls never meet."""

    def __init__(self, engine: ctypes.PyDLL, artifact: Artifact, prefix: str) -> None:
        manifest = artifact.manifest
        self._engine, self._prefix, self._gate = engine, prefix, Gate(manifest.inputs)
        self._held = {spec.name: _empty(spec) for spec in manifest.inputs}
        self._made = {spec.name: _empty(spec) for spec in manifest.outputs}
        arrays = (*self._held.values(), *self._made.values())
        self._small = sum(array.nbytes for array in arrays) <= SMALL_BYTES
        self._pointers = [array.ctypes.data for array in arrays]
        self._run = engine[f"{prefix}_run"]
        self._run.argtypes = [ctypes.c_void_p] * len(arrays)
        self._run.restype = None
        self._hook: Any = None

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self._gate.check(inputs)
        if self._small:
            for name, held in self._held.items():
                np.copyto(held, inputs[name])
            self._run(*self._pointers)
            return {name: made.copy() for name, made in self._made.items()}
        given = [_contiguous(inputs[name]) for name in self._held]
        fresh = {name: np.empty_like(made) for name, made in self._made.items()}
        self._run(*(array.ctypes.data for array in (*given, *fresh.values())))
        return fresh

    def watch(self, hook: Callable[[int, int], None] | None) -> None:
        """Call this after each step of the next runs."""
        kind = ctypes.PYFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
        self._hook = kind() if hook is None else kind(hook)
        place = ctypes.c_void_p.in_dll(self._engine, f"{self._prefix}_hook")
        place.value = ctypes.cast(self._hook, ctypes.c_void_p).value

    def facts(self, number: int) -> dict[str, Any]:
        """What the files say of a step."""
        function = self._engine[f"{self._prefix}_step"]
        function.argtypes, function.restype = [ctypes.c_int], ctypes.c_char_p
        found: dict[str, Any] = json.loads(function(number))
        return found

    def step(self, number: int, memory: int) -> Step:
        fact = self.facts(number)
        dtype = np.dtype(fact["dtype"])
        content = np.frombuffer(ctypes.string_at(memory, fact["size"] * dtype.itemsize), dtype)
        strides = [stride * dtype.itemsize for stride in fact["strides"]]
        view = np.lib.stride_tricks.as_strided(content[fact["offset"] :], fact["shape"], strides)
        return Step(fact["kernel"], fact["name"], tuple(fact["inputs"]), {fact["output"]: view.copy()})

    def close(self) -> None:
        del self._engine, self._run


def _empty(spec: TensorSpec) -> np.ndarray[Any, Any]:
    return np.empty(tuple(map(int, spec.shape)), spec.dtype)


def _contiguous(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)
