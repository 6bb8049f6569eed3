"""``torch.export`` on inputs that fit the specs, with what goes wrong in edgepack's words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack.collector import without_collection
from edgepack.contracts import TensorSpec
from edgepack.errors import InputError, Unsupported
from edgepack.silence import silence

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

EXAMPLE_BATCH = 2  # torch.export would treat a dynamic axis of size 1 as fixed


class FixedAxis(Exception):
    """torch.export found that the network fixes an axis that was to be dynamic."""


def trace(module: nn.Module, specs: Sequence[TensorSpec]) -> ExportedProgram:
    """The program of a module in inference mode; axes with names are dynamic.

    Raises:
        FixedAxis, Unsupported, InputError: it cannot be captured so.
    """
    import torch
    from torch._dynamo.exc import UserError
    from torch.export import Dim
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    examples = example_inputs(specs)
    dynamic = tuple({i: Dim.DYNAMIC for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in specs)
    variadic = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
    try:
        with silence(), without_collection(), torch.no_grad():
            return torch.export.export(
                module, examples, dynamic_shapes=(dynamic,) if variadic else dynamic, strict=False
            )
    except GuardOnDataDependentSymNode as error:
        raise Unsupported(
            f"control flow depends on data: {_culprit(str(error))}",
            "compute both branches and choose with torch.where",
        ) from error
    except UserError as error:
        if "dynamic" in str(error) and "constant" in str(error):
            raise FixedAxis(_sentence(error)) from error
        raise Unsupported(f"the network cannot be captured: {_sentence(error)}") from error
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        shapes = ", ".join(f"{spec.name} {list(tensor.shape)}" for spec, tensor in zip(specs, examples, strict=True))
        raise InputError(f"the network does not run on the task's inputs ({shapes}): {_sentence(error)}") from error


def example_inputs(specs: Sequence[TensorSpec], batch: int = EXAMPLE_BATCH) -> tuple[torch.Tensor, ...]:
    """Seeded tensors that fit the specs; the batch axis is ``batch``, other dynamic axes 64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = []
    for spec in specs:
        shape = [axis if isinstance(axis, int) else batch if axis == "batch" else 64 for axis in spec.shape]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            tensors.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return tuple(tensors)


def _culprit(text: str) -> str:
    lines = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(\S[^\n]*)', text)
    if not lines:
        return text.partition("\n")[0]
    path, line, code = lines[-1]
    return f"{Path(path).name}:{line}: {code.strip()}"


def _sentence(error: BaseException) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    marked = [line for line in lines if line.startswith("You marked")]
    return (marked or lines or [type(error).__name__])[0]
