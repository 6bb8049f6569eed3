"""Calibrates the timing loop: a model against itself, and against itself made 10 % slower.

    python benchmarks/aa.py                       # 150 quiet, 150 under load, 60 slowed (half of them under load)
    python benchmarks/aa.py --comparisons 10 --slowdowns 6 --load off

Each comparison goes through the same code as ``edgepack compare``. Beside it stands what people do by hand: time one,
then the other, compare the medians. Writes ``benchmarks/results/aa.json``, prints a table, and
``--document`` writes ``docs/measuring.md`` from the stored results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics as plain
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgepack import parts, statistics
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, Manifest, describe_files
from edgepack.contracts import Arrays, Contender, Runtime, Session, Settings, TensorSpec
from edgepack.devices.host import Host
from edgepack.samples import take
from edgepack.statistics import Interval

RESULTS = Path(__file__).parent / "results" / "aa.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "measuring.md"
SLOWDOWN = 0.10
SEQUENTIAL_S = 0.2
BURST_S = (0.02, 0.2)


@dataclass(frozen=True, kw_only=True)
class Slowed(Runtime):
    """An engine whose every run takes ``extra_s`` longer, spent waiting busily."""

    formats: ClassVar[tuple[str, ...]] = ()

    inner: Runtime
    extra_s: float

    def version(self) -> str:
        return self.inner.version()

    def load(self, artifact: Artifact, threads: int | None = None) -> Session:
        return _SlowedSession(self.inner.load(artifact, threads), self.extra_s)


@dataclass(frozen=True)
class _SlowedSession:
    inner: Session
    extra_s: float

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        outputs = self.inner.run(inputs)
        end = time.perf_counter() + self.extra_s
        while time.perf_counter() < end:
            pass
        return outputs

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class Comparison:
    """One comparison: the interleaved answer and the sequential one."""

    phase: str
    value: float
    low: float
    high: float
    verdict: str
    typical: float
    state: str
    slow_share: float
    blocks: int
    seconds: float
    sequential: float
    sequential_verdict: str


def build(folder: Path) -> Artifact:
    """A small convolutional network with seeded weights as an ONNX artifact; golden answers from onnx's reference."""
    from onnx.reference import ReferenceEvaluator

    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0)
    nodes, constants, name = [], [], "x"
    for index, (into, out, stride) in enumerate([(3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]):
        kernel = weights.normal(0, (2 / (9 * into)) ** 0.5, (out, into, 3, 3)).astype(np.float32)
        constants.append(numpy_helper.from_array(kernel, f"w{index}"))
        made = f"c{index}"
        nodes.append(helper.make_node("Conv", [name, f"w{index}"], [made], pads=[1, 1, 1, 1], strides=[stride, stride]))
        nodes.append(helper.make_node("Relu", [made], [f"r{index}"]))
        name = f"r{index}"
    nodes += [helper.make_node("GlobalAveragePool", [name], ["p"]), helper.make_node("Flatten", ["p"], ["y"])]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 32, 32]), ("y", [1, 64]))]
    graph = helper.make_graph(nodes, "aa", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
    inputs = weights.normal(size=(4, 3, 32, 32)).astype(np.float32)
    reference = ReferenceEvaluator(model)
    answers = np.concatenate([np.asarray(next(iter(reference.run(None, {"x": row[None]})))) for row in inputs])
    Golden({"x": inputs}, {"y": answers}, {"y": answers}).save(folder / GOLDEN)
    manifest = Manifest(
        format="onnx",
        name="aa",
        dialect="float32",
        inputs=(TensorSpec("x", "float32", (1, 3, 32, 32), "NCHW"),),
        outputs=(TensorSpec("y", "float32", (1, 64)),),
        files=describe_files(folder),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder)


def sequential(contenders: Sequence[Contender]) -> float:
    """Time one after the other, each in one session: ratio of medians."""
    medians = []
    for contender in contenders:
        inputs = take(contender.artifact.manifest.inputs, contender.artifact.golden().inputs, 0, 1)
        session = contender.runtime.load(contender.artifact, 1)
        for _ in range(10):
            session.run(inputs)
        seconds, end = [], time.perf_counter() + SEQUENTIAL_S
        while (start := time.perf_counter()) < end:
            session.run(inputs)
            seconds.append(time.perf_counter() - start)
        session.close()
        medians.append(plain.median(seconds))
    return medians[1] / medians[0]


def compare(phase: str, contenders: Sequence[Contender], settings: Settings) -> Comparison:
    """One comparison through the device, and one by hand."""
    begin = time.perf_counter()
    profile = Host().measure(contenders, settings)[1]
    seconds = time.perf_counter() - begin
    ratio, by_hand = profile.ratio, sequential(contenders)
    assert ratio is not None
    return Comparison(
        phase=phase,
        value=ratio.value,
        low=ratio.low,
        high=ratio.high,
        verdict=ratio.verdict,
        typical=ratio.typical,
        state=profile.conditions["state"],
        slow_share=profile.conditions["slow_share"],
        blocks=profile.conditions["blocks"],
        seconds=round(seconds, 3),
        sequential=by_hand,
        sequential_verdict=statistics.verdict(Interval(by_hand, by_hand, by_hand), settings.tolerance),
    )


def burst(core: int, parent: int) -> None:
    """Matrix products on one core for random moments with random pauses, until the parent is gone."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [core])
    chance = random.Random(core)
    matrix = np.ones((192, 192), np.float32)
    while os.getppid() == parent:
        end = time.perf_counter() + chance.uniform(*BURST_S)
        while time.perf_counter() < end:
            matrix @ matrix
        time.sleep(chance.uniform(*BURST_S))


@contextmanager
def load(wanted: bool) -> Iterator[None]:
    """One bursty process per core."""
    if not wanted:
        yield
        return
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    spawn = get_context("spawn")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    busy = [spawn.Process(target=burst, args=(core, os.getpid()), daemon=True) for core in cores]
    for process in busy:
        process.start()
    time.sleep(1.0)
    try:
        yield
    finally:
        for process in busy:
            process.terminate()
            process.join()


def summary(phase: str, found: Sequence[Comparison]) -> dict[str, Any]:
    """Counts and spreads of one phase."""
    words = [comparison.verdict for comparison in found]
    by_hand = [comparison.sequential_verdict for comparison in found]
    wrong = ("faster",) if "slowed" in phase else ("faster", "slower")
    return {
        "phase": phase,
        "comparisons": len(found),
        **{word: words.count(word) for word in ("same", "cannot tell", "faster", "slower")},
        "wrong": sum(word in wrong for word in words),
        "contended": sum(comparison.state == "contended" for comparison in found),
        "not_reached": sum(comparison.state == "not reached" for comparison in found),
        "ratio": [round(edge([c.value for c in found]), 4) for edge in (min, plain.median, max)],
        "half_width": round(plain.median(Interval(c.value, c.low, c.high).half_width for c in found), 4),
        "seconds": round(plain.median(c.seconds for c in found), 2),
        "by_hand": {word: by_hand.count(word) for word in ("same", "faster", "slower")},
        "by_hand_wrong": sum(word in wrong for word in by_hand),
        "by_hand_ratio": [round(edge([c.sequential for c in found]), 4) for edge in (min, plain.median, max)],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summaries as fixed-width text."""
    lines = [
        f"{'phase':<14}{'n':>4} {'same':>5} {'cannot':>6} {'faster':>6} {'slower':>6}  {'ratio (min, median, max)':<26}"
        f"{'± %':>5} {'cont.':>5} {'s':>5}   by hand: same/faster/slower, ratio"
    ]
    for row in rows:
        spread, by_hand = ", ".join(f"{v:.3f}" for v in row["ratio"]), row["by_hand"]
        other = ", ".join(f"{v:.3f}" for v in row["by_hand_ratio"])
        lines.append(
            f"{row['phase']:<14}{row['comparisons']:>4} {row['same']:>5} {row['cannot tell']:>6} {row['faster']:>6} "
            f"{row['slower']:>6}  {spread:<26}{100 * row['half_width']:>5.2f} {row['contended']:>5} {row['seconds']:>5}"
            f"   {by_hand['same']}/{by_hand['faster']}/{by_hand['slower']}, {other}"
        )
    return "\n".join(lines) + "\n"


def document(result: dict[str, Any]) -> str:
    """``docs/measuring.md``: what the stored run showed."""
    rows = [
        f"| {row['phase']} | {row['comparisons']} | {row['same']} | {row['cannot tell']} | {row['faster']} "
        f"| {row['slower']} | {' … '.join(f'{value:.3f}' for value in row['ratio'])} "
        f"| {row['by_hand']['same']} / {row['by_hand']['faster']} / {row['by_hand']['slower']} "
        f"| {' … '.join(f'{value:.3f}' for value in row['by_hand_ratio'])} |"
        for row in result["summary"]
    ]
    return (
        "# Can the stopwatch be trusted?\n\nWritten by `python benchmarks/aa.py --document` from "
        "`benchmarks/results/aa.json`; do not edit.\n\nA small ONNX network was compared with itself, with nothing "
        "else to do (quiet) and beside bursts of matrix products on every core (load), and with itself made 10 % "
        "slower (slowed). A verdict other than *same* or *cannot tell* in the first two rows is a false alarm; in the "
        "last two, *slower* is right. *By hand* is one after the other: same / faster / slower by the medians, against "
        "the same 3 %. Ratios are least … median … greatest.\n\n"
        "| | comparisons | same | cannot tell | faster | slower | ratio | by hand | ratio by hand |\n"
        f"{'| --- ' * 9}|\n"
        + "\n".join(rows)
        + f"\n\nOne inference takes {result['floor_ms']:.3f} ms; one comparison at "
        f"most {result['settings']['max_seconds']} s, {result['settings']['instances']} engine instances per side; "
        f"{result['runtime']}, {result['device'].get('processor', 'processor unknown')}.\n"
    )


def run(options: argparse.Namespace, artifact: Artifact, say: Callable[[str], object]) -> dict[str, Any]:
    """All phases."""
    runtime: Runtime = parts.find(Runtime, options.runtime)()  # type: ignore[type-abstract]
    base = Settings(max_seconds=options.seconds, cold=False, instances=options.instances)
    alone = Host().measure([Contender("a", artifact, runtime)], base)[0]
    floor_ms = alone.conditions["floor_ms"]
    same = [Contender("a", artifact, runtime), Contender("b", artifact, runtime)]
    slowed = [same[0], Contender("b", artifact, Slowed(inner=runtime, extra_s=SLOWDOWN * floor_ms / 1e3))]
    half = options.slowdowns // 2
    phases = [
        ("quiet", False, same, options.comparisons),
        ("load", True, same, options.comparisons),
        ("slowed", False, slowed, options.slowdowns - half if options.load == "both" else options.slowdowns),
        ("slowed, load", True, slowed, half if options.load == "both" else options.slowdowns),
    ]
    found: list[Comparison] = []
    rows = []
    for phase, loaded, contenders, count in phases:
        if count == 0 or options.load not in ("both", "on" if loaded else "off"):
            continue
        with load(loaded):
            for index in range(count):
                settings = Settings(**{**asdict(base), "seed": options.seed + len(found)})
                found.append(compare(phase, contenders, settings))
                say(f"\r{phase} {index + 1}/{count} {found[-1].value:.4f} {found[-1].verdict:<12}")
        rows.append(summary(phase, [comparison for comparison in found if comparison.phase == phase]))
    return {
        "device": alone.device,
        "runtime": alone.runtime,
        "floor_ms": floor_ms,
        "settings": asdict(base),
        "summary": rows,
        "comparisons": [asdict(comparison) for comparison in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=150, help="of the model with itself, per load setting")
    parser.add_argument("--slowdowns", type=int, default=60, help="comparisons with the model made 10 %% slower")
    parser.add_argument("--load", choices=("both", "off", "on"), default="both", help="background load")
    parser.add_argument("--seconds", type=float, default=2.4, help="longest time of one comparison")
    parser.add_argument("--instances", type=int, default=5, help="engine instances per side")
    parser.add_argument("--artifact", type=Path, help="an artifact folder; default a small built-in network")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--document", action="store_true", help="only write docs/measuring.md from the stored results")
    options = parser.parse_args()
    if options.document:
        DOCUMENT.write_text(document(json.loads(options.out.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as scratch:
        artifact = Artifact.open(options.artifact) if options.artifact else build(Path(scratch) / "aa")
        begin = time.perf_counter()
        result = run(options, artifact, sys.stderr.write)
        result["minutes"] = round((time.perf_counter() - begin) / 60, 2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sys.stderr.write("\n")
    sys.stdout.write(table(result["summary"]) + f"{result['minutes']} minutes, {options.out}\n")


if __name__ == "__main__":
    main()
