"""Weight files: safetensors, or ``.pt`` / ``.pth`` with tensors only. No pickled code ever runs."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

NESTS = ("state_dict", "model_state_dict", "model", "net", "network")
PREFIXES = ("module.", "_orig_mod.", "model.")
SHOWN = 4


def load_weights(module: nn.Module, path: Path, source: str) -> None:
    """Put the weights of a file into ``module``; every key must fit.

    Raises:
        InputError: the file is missing, damaged, holds more than tensors, or its keys or shapes differ.
    """
    target = module.state_dict()
    state = _without_prefix(read_weights(path), target)
    problems = _differences(state, target)
    if problems:
        raise InputError("\n  - ".join([f"{path} does not fit {source}:", *problems]))
    module.load_state_dict(state, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises InputError."""
    if not path.is_file():
        raise InputError(f"weights {path} do not exist")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix in (".pt", ".pth", ".th", ".bin", ".ckpt"):
        return _read_torch(path)
    raise InputError(f"{path}: weights are .safetensors, .pt or .pth files")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
    return tensors


def _read_torch(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "not an allowed" in str(error):
            raise InputError(
                f"{path} holds more than tensors (code in a pickle), so it was not loaded",
                "save the tensors alone: torch.save(model.state_dict(), ...) or safetensors",
            ) from error
        raise InputError(f"{path} is damaged or no PyTorch file") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise InputError(f"{path} is damaged or no PyTorch file: {str(error).partition(chr(10))[0]}") from error
    return _state_of(content, path)


def _state_of(content: Any, path: Path) -> dict[str, Tensor]:
    import torch

    for _ in NESTS:
        nest = next(
            (key for key in NESTS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), None
        )
        if nest is None:
            break
        content = content[nest]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path} holds a {type(content).__name__}, not tensors by name")
    other = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise InputError(f"{path}: {_few(other)} {'is' if len(other) == 1 else 'are'} not a tensor")
    return {str(key): value for key, value in content.items()}


def _without_prefix(state: dict[str, Tensor], target: Mapping[str, Any]) -> dict[str, Tensor]:
    """Drop what wrappers such as DataParallel and torch.compile put before every name."""
    for prefix in PREFIXES * 2:
        if state and all(key.startswith(prefix) for key in state) and not any(k.startswith(prefix) for k in target):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _differences(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    # Batch norm's counter is only used in training, and old or converted files lack it.
    missing = [key for key in target if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in target]
    shapes = [
        f"{key} is {tuple(state[key].shape)} in the file, {tuple(target[key].shape)} in the model"
        for key in target
        if key in state and state[key].shape != target[key].shape
    ]
    lines = []
    if missing:
        lines.append(f"{len(missing)} missing: {_few(missing)}")
    if unexpected:
        lines.append(f"{len(unexpected)} unexpected: {_few(unexpected)}{_pair(unexpected[0], missing)}")
    if shapes:
        lines.append(f"{len(shapes)} of another shape: {_few(shapes, '; ')}")
    return lines


def _few(words: Iterable[str], comma: str = ", ") -> str:
    words = list(words)
    return comma.join(words[:SHOWN]) + (f"{comma}…" if len(words) > SHOWN else "")


def _pair(word: str, candidates: list[str]) -> str:
    text = nearest(word, candidates) if candidates else ""
    return f" ({word!r}: {text})" if text.startswith("did") else ""
