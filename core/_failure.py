"""How a command line ends: one exit status per kind of failure, said to people and, with ``--json``, to programs."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from edgepack.errors import EdgepackError, InputError, MissingExtra, StorageError

INTERRUPTED = 130
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE,
)  # fmt: skip
EXTRAS = {
    "torch": "compress", "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx-run", "openvino": "openvino",
    "timm": "zoo", "transformers": "zoo", "torchvision": "zoo", "safetensors": "compress", "PIL": "compress",
    "litert_torch": "tflite", "ai_edge_litert": "tflite-run", "coremltools": "coreml", "tensorrt": "tensorrt-run",
}  # fmt: skip
VERBOSE = {"-v", "-vv", "--verbose"}


def status(app: Callable[[Sequence[str]], Any], words: Sequence[str]) -> int:
    """Run one command line; the exit status it deserves."""
    try:
        app(words)
    except SystemExit as stop:
        return _stopped(stop.code if isinstance(stop.code, int) else 0, words)
    except EdgepackError as error:
        return _failed(error, words)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            message = f"cannot read or write {error.filename or 'a file'}: {os.strerror(error.errno)}"
            return _failed(StorageError(message), words)
        return _bug(error, words)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            return _bug(error, words)
        hint = f"pip install 'edgepack[{EXTRAS[package]}]'"
        return _failed(MissingExtra(f"the package {package!r} is not installed", hint), words)
    except Exception as error:
        return _bug(error, words)
    return 0


def _stopped(code: int, words: Sequence[str]) -> int:
    """What the parser ended by itself: help, a usage error, an interrupt, a reader that went away (its status 1)."""
    if code == INTERRUPTED:
        message = "interrupted; what was whole stays, the same command goes on from there"
        _say(message)
        _document(EdgepackError(message), words, code)
    if code == InputError.exit_status:
        _document(InputError("the command line is wrong, see stderr"), words)
    if code != 1:
        return code
    _document(StorageError("the reader of the output went away"), words)
    return StorageError.exit_status


def _failed(error: EdgepackError, words: Sequence[str]) -> int:
    if error.exit_status == EdgepackError.exit_status:
        return _bug(error, words)
    if VERBOSE & set(words):
        traceback.print_exception(error, file=sys.stderr)
    _say(f"error: {error}")
    _document(error, words)
    return error.exit_status


def _bug(error: Exception, words: Sequence[str]) -> int:
    traceback.print_exception(error, file=sys.stderr)
    _say("this is a bug in edgepack, please report it")
    _document(error if isinstance(error, EdgepackError) else EdgepackError(f"{type(error).__name__}: {error}"), words)
    return EdgepackError.exit_status


def _say(text: str) -> None:
    from edgepack._console import screen

    start, colon, rest = text.partition(":")
    people = screen().errors
    people.print(f"[bold red]{start}:[/bold red]" if colon else start, end="")
    people.print(rest, markup=False, soft_wrap=True)


def _document(error: EdgepackError, words: Sequence[str], code: int | None = None) -> None:
    from edgepack._console import screen

    facts = {"kind": type(error).__name__, "message": error.message, "hint": error.hint, **error.details}
    status = error.exit_status if code is None else code
    try:
        screen(as_json="--json" in words).result({"error": {**facts, "exit_status": status}})
    except BrokenPipeError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
