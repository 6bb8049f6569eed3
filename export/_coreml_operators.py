"""Operators of edgepack's own for weights that Core ML makes float when it loads a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgepack.errors import require

if TYPE_CHECKING:
    from torch import Tensor


@functools.cache
def taught(name: str, compute: Callable[[Tensor, Tensor], Tensor], write: Callable[..., Any]) -> Any:
    """An operator of what is stored and what it is made float with, declared to PyTorch and taught to coremltools.

    Args:
        name: ``edgepack::…``
        compute: stored, values → floats: the shape of what is stored, the type of the values.
        write: coremltools' helpers, both arrays, and as ``name`` the result's name → the operation in MIL.

    Raises:
        MissingExtra: coremltools is not here.
    """
    import torch

    registry = require("coremltools.converters.mil.frontend.torch.torch_op_registry", "coreml")
    utils = require("coremltools.converters.mil.frontend._utils", "coreml")
    namespace, word = name.split("::")

    def operator(stored: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return compute(stored, values)

    def like(stored: Tensor, values: Tensor) -> Tensor:
        return torch.empty_like(stored, dtype=values.dtype)

    def convert(context: Any, node: Any) -> None:
        stored, values = (context[given].val for given in node.inputs)
        context.add(write(utils, stored, values, name=node.name), node.name)

    # postponed annotations would be looked up among this module's names, where torch is not
    operator.__annotations__ = dict.fromkeys(("stored", "values", "return"), torch.Tensor)
    torch.library.custom_op(name, operator, mutates_args=()).register_fake(like)
    convert.__name__ = word  # under which coremltools keeps it
    registry.register_torch_op(convert, torch_alias=[name, f"{namespace}.{word}"])
    return getattr(getattr(torch.ops, namespace), word).default
