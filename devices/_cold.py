"""Load, first inference and peak memory of an artifact in a fresh process.

    python -m edgepack.devices._cold FOLDER RUNTIME THREADS OPTIONS

prints one JSON line. Importing the engine is not counted as loading; the files are usually in the system's cache.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from edgepack import parts
from edgepack.artifact import Artifact
from edgepack.contracts import Contender, Runtime
from edgepack.errors import DeviceError
from edgepack.samples import take

REPEATS = 3
LIMIT_S = 600


@dataclass(frozen=True)
class Cold:
    """Medians over fresh processes. ``peak_bytes`` includes Python and the engine itself."""

    load_ms: float
    first_ms: float
    peak_bytes: int | None


def start_cold(contender: Contender, threads: int) -> Cold:
    """Start fresh processes one after the other. Raises DeviceError with the last line such a process wrote."""
    seen = [_spawn(contender, threads) for _ in range(REPEATS)]
    peaks = [cold.peak_bytes for cold in seen if cold.peak_bytes is not None]
    return Cold(
        statistics.median(cold.load_ms for cold in seen),
        statistics.median(cold.first_ms for cold in seen),
        round(statistics.median(peaks)) if peaks else None,
    )


def measure_here(folder: Path, runtime: Runtime, threads: int) -> Cold:
    """Load and run once in this process."""
    artifact = Artifact.open(folder)
    inputs = take(artifact.manifest.inputs, artifact.golden().inputs, 0, 1)
    runtime.version()  # imports the engine
    start = time.perf_counter()
    session = runtime.load(artifact, threads)
    loaded = time.perf_counter()
    session.run(inputs)
    done = time.perf_counter()
    session.close()
    return Cold(1e3 * (loaded - start), 1e3 * (done - loaded), peak_bytes())


def peak_bytes() -> int | None:
    """Peak resident memory of this process alone.

    getrusage would do, but on Linux its peak survives exec and starts at the parent's size.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _spawn(contender: Contender, threads: int) -> Cold:
    runtime = contender.runtime
    options = json.dumps(parts.options_of(runtime))
    words = [str(contender.artifact.folder), parts.name_of(runtime), str(threads), options]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    try:
        result = subprocess.run(
            [sys.executable, "-m", "edgepack.devices._cold", *words],
            capture_output=True,
            text=True,
            env={**os.environ, **limits},
            timeout=LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"{contender.label}: a fresh process could not be timed: {error}") from error
    if result.returncode != 0 or not result.stdout.strip():
        said = result.stderr.strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        raise DeviceError(f"{contender.label}: a fresh process could not run it: {said[0]}")
    return Cold(**json.loads(result.stdout.strip().splitlines()[-1]))


def main(words: list[str]) -> None:
    folder, name, threads, options = words
    runtime = parts.find(Runtime, name)(**json.loads(options))
    cold = measure_here(Path(folder), runtime, int(threads))
    sys.stdout.write(json.dumps(vars(cold)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
