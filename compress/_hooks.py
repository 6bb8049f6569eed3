"""Hooks on layers, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(
    hooks: Iterable[tuple[nn.Module, Callable[..., None]]], *, before: bool = False, with_kwargs: bool = False
) -> Iterator[None]:
    """Have each layer call its hook behind it, or ``before`` it, as PyTorch calls forward hooks; then no more."""
    handles: list[Any] = []
    try:
        for layer, hook in hooks:
            register = layer.register_forward_pre_hook if before else layer.register_forward_hook
            handles.append(register(hook, with_kwargs=with_kwargs))
        yield
    finally:
        for handle in handles:
            handle.remove()
