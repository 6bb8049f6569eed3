"""``edgepack doctor --probe``: what the engines here make of single operators in 8 and 4 bits.

Tiny models of one operator each are loaded, held against reference implementations and timed beside the float operator
of the same size (Core ML off a Mac is interpreted, so not timed). What was found is kept in the user's cache folder,
per engine version and processor, and dialects ask ``known`` before they put an operator into integers.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack import _probe_coreml, _probe_models, _probe_tflite, parts
from edgepack._probe_engines import KERNELS
from edgepack._probe_models import OPERATORS, Case, Form, Written
from edgepack.artifact import GOLDEN, MANIFEST, Artifact, Golden, Manifest, Parity, describe_files, write_text
from edgepack.contracts import Contender, Device, Runtime, Settings, TensorSpec
from edgepack.errors import DeviceError, EdgepackError, MissingExtra, require
from edgepack.halves import apart
from edgepack.measurement import Ratio
from edgepack.progress import Progress
from edgepack.versions import installed

if TYPE_CHECKING:
    from types import ModuleType

SCHEMA = 1
# format whose dialect asks ``known`` → the engine it asks about
ENGINES = {"onnx": "onnxruntime", "tflite": "tflite"}
WRITERS: Mapping[str, ModuleType] = {"tflite": _probe_tflite, "coreml": _probe_coreml}  # others read ONNX
MODELS = {"onnx": ".onnx", "tflite": ".tflite", "coreml": ".mlmodel"}
FLOAT = "float"
TIMING = Settings(instances=3, max_seconds=1.2, half_width=0.05, cold=False)
STEPS_APART = 0.02  # share of integers that may be one step off
FLOAT_ERROR = 0.02  # of the largest value: activations rounded at run time may take another step on a tie


@dataclass(frozen=True)
class Probe:
    """One operator in one form on one engine.

    Attributes:
        reason: why it does not load, None where it does.
        error: largest difference from the reference: in steps for integers, else over the largest value.
        ratio: latency over the float operator's.
        beside_left: latency over the same file with the operator in float between the integers; None where the
            engine cannot be told to.
        kernels: what the engine computes it with.
        untimed: why it was not timed, None where it was or does not match.
    """

    engine: str
    operator: str
    form: str
    reason: str | None = None
    error: float | None = None
    matches: bool | None = None
    ratio: Ratio | None = None
    beside_left: Ratio | None = None
    kernels: tuple[str, ...] = ()
    untimed: str | None = None

    @property
    def slower(self) -> bool:
        """Whether integers cost more here than leaving the operator in float; False where that is not known."""
        judge = self.beside_left or self.ratio
        return judge is not None and judge.verdict == "slower"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def probe(progress: Progress, engines: Sequence[str] = tuple(KERNELS), force: bool = False) -> list[Probe]:
    """Try every operator on every engine installed; what an earlier or interrupted run found is not tried again.

    Raises:
        MissingExtra: onnx, which the models are written with, is not installed, or no engine is.
    """
    require("onnx", "onnx")
    here = [name for name in engines if _version(name) is not None]
    if not here:
        raise MissingExtra("no engine to probe is installed", "pip install 'edgepack[onnx-run]'")
    step = progress.start("probing operators", len(here) * len(OPERATORS))
    found = []
    for engine in here:
        stored = {} if force else _stored(engine)
        for operator in OPERATORS:
            if operator not in stored:
                stored[operator] = _tried(engine, operator)
                _store(engine, stored)
            step(1)
        found += [one for operator in OPERATORS for one in stored[operator]]
    return found


def known(engine: str, operator: str, form: str) -> Probe | None:
    """What a stored probe of the engine installed here, on this processor, says of an operator."""
    return next((one for one in _stored(engine).get(operator, ()) if one.form == form), None)


def digest(engine: str) -> str | None:
    """Changes when what dialects read from the stored probe changes; None without one."""
    stored = _stored(engine)
    if not stored:
        return None
    facts = {f"{one.operator}/{one.form}": one.slower for found in stored.values() for one in found}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def path_of(engine: str) -> Path | None:
    """Where the probe of an engine is kept; None where the engine is not installed."""
    version = _version(engine)
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    if version is None:
        return None
    return Path(root).expanduser() / "edgepack" / "probe" / f"{engine}-{version}-{_processor()}.json"


def _version(engine: str) -> str | None:
    try:
        return installed(engine) or parts.find(Runtime, engine)().version()
    except (MissingExtra, DeviceError):
        return None


def _processor() -> str:
    """What decides which kernels an engine takes: the processor's name and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    keys = ("model name", "flags", "Features", "CPU part")
    facts = sorted({line for line in lines if line.partition("\t")[0].strip() in keys})
    text = "\n".join([platform.machine(), platform.processor(), *facts])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _stored(engine: str) -> dict[str, list[Probe]]:
    """By operator; a file that cannot be read is as none."""
    path = path_of(engine)
    try:
        document = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        if document.get("schema") != SCHEMA:
            return {}
        return {name: [_from_json(one) for one in found] for name, found in document["operators"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _from_json(values: Mapping[str, Any]) -> Probe:
    ratios = {name: Ratio(**values[name]) if values[name] else None for name in ("ratio", "beside_left")}
    return Probe(**{**values, **ratios, "kernels": tuple(values["kernels"])})


def _store(engine: str, found: Mapping[str, Sequence[Probe]]) -> None:
    path = path_of(engine)
    assert path is not None
    operators = {name: [one.to_json() for one in several] for name, several in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"schema": SCHEMA, "operators": operators}, indent=1, allow_nan=False) + "\n")


def _tried(engine: str, name: str) -> list[Probe]:
    """All forms of one operator; those that match are timed in one interleaved run beside float."""
    operator, runtime = OPERATORS[name], parts.find(Runtime, engine)()
    case, writer = Case(operator), WRITERS.get(engine, _probe_models)
    with tempfile.TemporaryDirectory() as folder:
        first = _artifact(Path(folder) / FLOAT, writer.written(case, None))
        found: dict[str, Probe] = {}
        artifacts: dict[str, Artifact] = {}
        for form_name, form in writer.forms(operator).items():
            model = writer.written(case, form)
            artifacts[form_name] = _artifact(Path(folder) / form_name.replace(" ", "-"), model)
            found[form_name] = _checked(Probe(engine, name, form_name), runtime, artifacts[form_name], model)
        good = [form_name for form_name, one in found.items() if one.matches]
        if (why := runtime.untimed()) is not None:
            return [replace(one, untimed=why if one.matches else None) for one in found.values()]
        for form_name, ratio in zip(good, _ratios(runtime, first, [artifacts[key] for key in good]), strict=True):
            found[form_name] = replace(found[form_name], ratio=ratio)
        for form_name in good:
            left = _left(engine, case, writer.forms(operator)[form_name], artifacts[form_name], runtime)
            if left is not None:
                ratio = _beside(left, Contender("integers", artifacts[form_name], runtime))
                found[form_name] = replace(found[form_name], beside_left=ratio)
    return list(found.values())


def _left(engine: str, case: Case, form: Form, artifact: Artifact, runtime: Runtime) -> Contender | None:
    """The same integers around an operator without weights that stays float; None where that cannot be had."""
    if case.operator.weight:
        return None
    if engine == "tflite":
        folder = artifact.folder.with_name(f"{artifact.folder.name}-left")
        return Contender(
            "left in float", _artifact(folder, _probe_tflite.written(case, replace(form, left=True))), runtime
        )
    if hasattr(runtime, "optimize"):
        return Contender("left in float", artifact, replace(runtime, optimize=False))  # type: ignore[type-var]
    return None


def _artifact(folder: Path, model: Written) -> Artifact:
    for name, content in model.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    Golden(model.inputs, model.answers, model.answers).save(folder / GOLDEN)
    given, gives = (
        tuple(TensorSpec(name, str(array.dtype), array.shape) for name, array in arrays.items())
        for arrays in (model.inputs, model.answers)
    )
    accepted = Parity("checked", max_rel=1.0)  # held against the reference here, by steps
    manifest = Manifest(model.format, folder.name, FLOAT, given, gives, describe_files(folder), parity=accepted)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Artifact.open(folder)


def _checked(one: Probe, runtime: Runtime, artifact: Artifact, model: Written) -> Probe:
    try:
        session = runtime.load(artifact, 1)
        try:
            answers = session.run(model.inputs)["y"]
        finally:
            session.close()
        kernels = KERNELS[one.engine](artifact.file(MODELS[artifact.manifest.format]))
    except (EdgepackError, RuntimeError) as error:
        return replace(one, reason=str(error).partition("\n")[0][:300])
    wanted = model.answers["y"]
    if wanted.dtype.kind == "f":
        error_ = float(np.abs(answers.astype(np.float64) - wanted).max() / np.abs(wanted).max())
        return replace(one, error=error_, matches=error_ <= FLOAT_ERROR, kernels=kernels)
    differences = apart(answers, wanted, model.steps, model.zero)
    fits = bool(differences.max() <= 1 and (differences > 0).mean() <= STEPS_APART)
    return replace(one, error=float(differences.max()), matches=fits, kernels=kernels)


def _ratios(runtime: Runtime, first: Artifact, others: Sequence[Artifact]) -> Iterator[Ratio | None]:
    if not others:
        return
    contenders = [Contender(item.folder.name, item, runtime) for item in (first, *others)]
    seconds = TIMING.max_seconds * len(contenders) / 2
    profiles = _device().measure(contenders, replace(TIMING, max_seconds=seconds))
    yield from (profile.ratio for profile in profiles[1:])


def _beside(left: Contender, integers: Contender) -> Ratio | None:
    return _device().measure([left, integers], TIMING)[1].ratio


def _device() -> Device:
    return parts.find(Device, "host")()
