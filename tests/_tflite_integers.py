"""How networks become integer TFLite files in the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("litert_converter", reason="pip install 'edgepack[tflite]'")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="pip install 'edgepack[tflite-run]'")

from torch import nn  # noqa: E402

from _samples import Samples  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.compress.quantize import Quantize  # noqa: E402
from edgepack.compressing import compress  # noqa: E402
from edgepack.export._tflite_integer import lower_integers  # noqa: E402
from edgepack.exporting import Source  # noqa: E402
from edgepack.graph import fixed_batch  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

SHAPE = (1, 5, 8, 8)  # not an image: a narrow convolution of one stays float


def compressed(folder: Path, module: nn.Module, **options: Any) -> Source:
    values = np.random.default_rng(0).standard_normal((24, *SHAPE[1:])).astype(np.float32)
    task = Task((Input("x", SHAPE, layout="NCHW"),), calibration=Samples(values))  # type: ignore[arg-type]
    compress(module.eval(), task, [Quantize(**options)], folder, Silent())
    return Source.open(folder / "compressed")


def model_of(artifact: Artifact) -> Any:
    return schema.ModelT.InitFromPackedBuf(artifact.file(".tflite").read_bytes(), 0)


def simulation_of(source: Source) -> Any:
    return lower_integers(fixed_batch(source.graph), source.plan)
