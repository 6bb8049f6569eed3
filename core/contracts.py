"""The contracts: what a part must offer, and the values that pass between the rooms.

Read this file first. Every pluggable thing is a *part*: one file, one final frozen dataclass whose fields are
its options and whose file name is its name in the recipe, the command line, the tests and the docs.
Nothing here imports a heavy package, and neither does the top of any part's file: torch and the engines are
imported when a method needs them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from edgepack.errors import Unsupported

if TYPE_CHECKING:
    import numpy as np
    from torch import nn
    from torch.export import ExportedProgram

    from edgepack.artifact import Artifact
    from edgepack.measurement import Profile, Ratio
    from edgepack.plan import Plan
    from edgepack.task import Task

FLOAT_LIMIT = 1e-4  # max|a−b| / max|b| of a float artifact against its simulation
INTEGERS = ("u8", "s8", "d8", "s16")  # what the name of an integer dialect begins with
Arrays = Mapping[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Preprocessing:
    """How raw data becomes one model input: ``(raw / scale - mean) / std`` per channel.

    Attributes:
        scale: divisor of the raw values (255 for 8-bit images), 1 for none.
        mean: per channel, in units of raw / scale; empty for zero.
        std: per channel; empty for one.
        resize: short side in pixels before the centre crop of image files; None: they just cover height and width.
        crop: centre crop to the input's height and width (image files only).
    """

    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None
    crop: bool = True

    @property
    def identity(self) -> bool:
        return self.scale == 1.0 and not any(self.mean) and all(value == 1.0 for value in self.std)


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: as in the artifact.
        dtype: NumPy name, such as ``float32`` or ``uint8``.
        shape: an int, or the name of a dynamic axis (``"batch"``) where any size is allowed.
        layout: one letter per axis (``NCHW``, ``NHWC``), None where it has no meaning.
        stacked: axis along which samples are stacked where none is called ``batch``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    layout: str | None = None
    stacked: int = 0


@dataclass(frozen=True)
class Graph:
    """A captured network: what exporters read. Never holds user code.

    Attributes:
        program: ATen operators only, inference mode, float weights.
        inputs: in call order; names equal the program's inputs.
        outputs: in result order.
        preprocessing: by input name; what the caller must still do to raw data (empty once baked in).
        labels: class names, empty if unknown.
        dialect: of a simulation: how its numbers are written; ``float32`` before an exporter lowered it.
    """

    program: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Mapping[str, Preprocessing] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    dialect: str = "float32"


class Part(ABC):  # noqa: B024  (its kinds have the abstract methods)
    """Anything pluggable. Subclass one of the kinds below, never this."""


class Run(Protocol):
    """What a pass is handed besides the module: the only way it reaches the rest of edgepack.

    Attributes:
        workdir: scratch folder of this run, for checkpoints; it outlives a run that was killed, not one that ended.
        seed: for every random choice of the pass.
        plan: to be filled with what the float graph cannot say.
        original: the network before the first pass, to be asked and never changed.
        folder: what relative paths in options are relative to.
        identity: of the pass, its options and the passes before it: what it left in ``workdir`` is for this alone.
    """

    workdir: Path
    seed: int
    plan: Plan
    original: nn.Module
    folder: Path
    identity: str

    def note(self, text: str) -> None:
        """One line for the report: what was done or left alone, and why."""

    def record(self, what: str, values: Mapping[str, Any]) -> None:
        """A finding for the report, as JSON values under a name."""

    def progress(self, text: str, total: int | None = None) -> Callable[[int], None]:
        """Start a progress line; call the result with the number of steps just finished."""

    def measure(
        self, module: nn.Module, against: nn.Module | None = None, format: str = "onnx", then: Sequence[Pass] = ()
    ) -> Ratio:
        """Latency of ``module`` over ``against`` (default: the original), interleaved on this host.

        Both are timed as passes ``then`` make them, which are applied to copies.
        """

    def time(
        self,
        modules: Sequence[nn.Module],
        task: Task | None = None,
        format: str = "onnx",
        then: Sequence[Pass] = (),
    ) -> list[float]:
        """Milliseconds of each module, from one interleaved run; ``task`` where they are not for the run's own."""


class Pass(Part):
    """Module to module. Works on the pipeline's own copy, may change it in place, returns it.

    ``stage`` orders passes: a pass with a lower stage must not follow one with a higher
    (10 structure-preserving, 20 needs layers, 30 fixes weights, 90 needs final ranges).
    """

    stage: ClassVar[int] = 20

    def check(self, module: nn.Module, task: Task) -> None:
        """Refuse early what cannot work. Raises Unsupported or InputError."""

    @abstractmethod
    def apply(self, module: nn.Module, task: Task, run: Run) -> nn.Module:
        """Return the compressed module, in inference mode, with the same inputs and outputs."""


@dataclass(frozen=True, kw_only=True)
class Exporter(Part):
    """Graph to model files.

    Attributes:
        name: the artifact's folder, default the format.
        precision: ``plan`` (what the plan says, float32 where it says nothing), ``float32`` or ``float16``
            (weights stored in 16 bits; the engine chooses how to compute).
        layout: layout of image inputs, ``NCHW`` or ``NHWC``; default that of the model.
        normalize: bake the preprocessing in; image inputs become uint8 NHWC, labels go into the metadata.
        sizes: of axes that the task calls dynamic, by name, for a file that takes this size only.
    """

    format: ClassVar[str]

    name: str = ""
    precision: str = "plan"
    layout: str | None = None
    normalize: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.sizes.values()):
            raise ValueError(f"sizes are at least 1, not {dict(self.sizes)}")
        if self.precision not in ("plan", "float32", "float16"):
            raise ValueError(f"precision is 'plan', 'float32' or 'float16', not {self.precision!r}")
        if self.layout not in (None, "NCHW", "NHWC"):
            raise ValueError(f"layout is 'NCHW' or 'NHWC', not {self.layout!r}")
        if self.normalize and self.layout == "NCHW":
            raise ValueError("normalize takes uint8 images as cameras give them, so layout must be 'NHWC' or left out")

    @abstractmethod
    def lower(self, graph: Graph, plan: Plan) -> Graph:
        """Apply the dialect: the *simulation*, a graph that computes what the artifact must compute.

        ``layout`` and ``normalize`` are already in the graph. Raises Unsupported.
        """

    @abstractmethod
    def write(self, simulation: Graph, folder: Path) -> Census:
        """Write the model files into a folder that holds ``golden.npz`` at most, and re-read them.

        Raises Unsupported, StorageError.
        """


@dataclass(frozen=True)
class Census:
    """What an exporter found in the file it wrote, by reading it again.

    Attributes:
        operators: operator type → count.
        weight_bytes: stored dtype → bytes.
        notes: anything a user should know, one sentence each.
        contents: ``edgepack.contents.key`` of each stored tensor, one entry per copy in the file.
    """

    operators: Mapping[str, int]
    weight_bytes: Mapping[str, int]
    notes: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()


class Session(Protocol):
    """A loaded artifact. Outputs are complete when ``run`` returns."""

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays by input name → arrays by output name."""

    def close(self) -> None:
        """Free the engine's memory."""


@dataclass(frozen=True)
class Step:
    """One operator of an artifact with what it computed.

    Attributes:
        operator: type, in the format's own words (``Conv``, ``CONV_2D``).
        name: of the operator in the file, empty if it has none.
        inputs: identifiers of the tensors it reads, constants left out.
        outputs: identifier → value.
    """

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: Mapping[str, np.ndarray[Any, Any]]


class Runtime(Part):
    """How an artifact executes: an engine. Options that change numbers or speed are fields.

    ``formats`` it is the engine of; ``proves`` are formats whose numbers it can check where their own engine cannot
    run. What it proves it never times unless asked by name.
    """

    formats: ClassVar[tuple[str, ...]]
    proves: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def version(self) -> str:
        """The engine's version. Raises MissingExtra where it is not installed, DeviceError where it cannot run."""

    @abstractmethod
    def load(self, artifact: Artifact, threads: int | None = None) -> Session:
        """Load an artifact with a fixed number of threads (None: the engine's default)."""

    def trace(self, artifact: Artifact, inputs: Arrays) -> list[Step]:
        """Every operator's results for one batch, in the order of the file, without the engine's fusions.

        Raises Unsupported where the engine cannot show them.
        """
        raise Unsupported(f"{type(self).__name__} cannot show what single operators compute")

    def compiled_bytes(self, artifact: Artifact) -> int | None:
        """Bytes of machine code and constants, where the artifact's files are source text; None elsewhere."""
        return None

    def untimed(self) -> str | None:
        """Why its latencies would mean nothing; None where an engine runs."""
        return None

    def limit(self, artifact: Artifact) -> float:
        """Largest difference from the simulation, over its largest value, that is no fault of the artifact."""
        return FLOAT_LIMIT


@dataclass(frozen=True)
class Contender:
    """One entry of a measurement: an artifact on an engine, under a label unique in the measurement."""

    label: str
    artifact: Artifact
    runtime: Runtime


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        threads: intra-operator threads of the engine.
        instances: engine instances per contender, the unit of the confidence interval.
        max_seconds: stop after this long even when the interval is still wide.
        half_width: stop when every ratio's interval is this narrow (relative).
        tolerance: ratios within 1 ± this are "same".
        seed: for the random order of blocks.
        cold: also time load, first inference and peak memory in fresh processes.
    """

    threads: int = 1
    instances: int = 5
    max_seconds: float = 60.0
    half_width: float = 0.01
    tolerance: float = 0.03
    seed: int = 0
    cold: bool = True


class Device(Part):
    """Where an artifact executes: a transport."""

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Name, processor, cores, system … of the machine. Raises DeviceError when it is not there."""

    @abstractmethod
    def measure(
        self,
        contenders: Sequence[Contender],
        settings: Settings,
        progress: Callable[[float], None] | None = None,
    ) -> list[Profile]:
        """Profiles in the contenders' order, all from one interleaved run; ratios are against the first."""


class Meter(Part):
    """A joule counter that only rises."""

    scope: ClassVar[str]

    @abstractmethod
    def check(self) -> str | None:
        """None when the meter works here, else the reason why not."""

    @abstractmethod
    def joules(self) -> float:
        """The counter now; windows are differences."""


class Packager(Part):
    """Artifact to something an app can include."""

    formats: ClassVar[tuple[str, ...]]

    @abstractmethod
    def write(self, artifact: Artifact, folder: Path) -> list[Path]:
        """Write the package and return its files."""
