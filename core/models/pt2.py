"""Read a ``.pt2`` without running anything in it.

``torch.export.load`` falls back to full unpickling and evaluates strings of the file, so a doctored file runs code
(tried). Here the archive's members are read one by one: tensors from raw bytes, the few pickled ones with
``weights_only``, the graph from JSON in which every string is checked first. Nothing else is accepted.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

MODEL = "models/model.json"
WEIGHTS = "data/weights/"
CONSTANTS = "data/constants/"
WEIGHTS_TABLE = f"{WEIGHTS}model_weights_config.json"
CONSTANTS_TABLE = f"{CONSTANTS}model_constants_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
PLAIN = frozenset({"archive_format", "archive_version", "byteorder", "version"})
IGNORED = (".data/", "extra/")
AGAIN = "save it again with torch.export.save, on the CPU, with the PyTorch installed here"


def load_program(path: Path) -> ExportedProgram:
    """The exported program in a file written by ``torch.export.save``; no code of the file runs.

    Raises:
        InputError: the file is missing, damaged, not a ``.pt2``, or holds anything but tensors and ATen operators.
    """
    from edgepack.models._pt2_schema import Refused

    archive = _Archive(path)
    try:
        archive.check_members()
        return _deserialize(archive)
    except Refused as error:
        raise InputError(f"{path} was not loaded: {error}", AGAIN) from error


class _Archive:
    """Members of a ``.pt2``, each read by the one reader that also lists them."""

    def __init__(self, path: Path) -> None:
        import torch

        if not path.is_file():
            raise InputError(f"{path} does not exist")
        self.path = path
        try:
            self._reader = torch._C.PyTorchFileReader(str(path))
            self.names = list(self._reader.get_all_records())
        except RuntimeError as error:
            raise InputError(f"{path} is damaged or no .pt2 file: {str(error).partition(chr(10))[0]}") from error

    def check_members(self) -> None:
        """Refuse compiled code, custom objects, unknown members and archives that unpack to more than they are."""
        from edgepack.models._pt2_schema import Refused

        if "archive_format" not in self.names or self.read("archive_format") != b"pt2":
            raise Refused("it is no archive written by torch.export.save")
        known = {MODEL, SAMPLE_INPUTS, WEIGHTS_TABLE, CONSTANTS_TABLE, *PLAIN}
        for name in self.names:
            stem = name.removeprefix(WEIGHTS).removeprefix(CONSTANTS)
            tensor = name != stem and stem.startswith(("weight_", "tensor_")) and "/" not in stem
            if not tensor and name not in known and not name.startswith(IGNORED):
                raise Refused(f"its member {name!r} is not tensors or a graph")
        if sum(self._reader.get_record_size(name) for name in self.names) > self.path.stat().st_size:
            raise Refused("its members are compressed, which torch.export.save never does")
        if "byteorder" in self.names and self.read("byteorder") != sys.byteorder.encode():
            raise Refused("it was written on a machine with another byte order")

    def read(self, name: str) -> bytes:
        try:
            content: bytes = self._reader.get_record(name)
        except RuntimeError as error:
            raise InputError(f"{self.path} is damaged: its member {name!r} cannot be read") from error
        return content

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path} is damaged: its member {name!r} is no JSON") from error

    def unpickle(self, name: str) -> Any:
        """Tensors and plain containers only."""
        import torch

        from edgepack.models._pt2_schema import Refused

        try:
            return torch.load(io.BytesIO(self.read(name)), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise Refused(f"its member {name!r} holds code in a pickle, or is damaged") from error
        except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise Refused(f"its member {name!r} is damaged") from error


def _deserialize(archive: _Archive) -> ExportedProgram:
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass

    from edgepack.models._pt2_schema import Refused, clean

    content = clean(schema.ExportedProgram, archive.read_json(MODEL))
    state = _tensors(archive, WEIGHTS_TABLE, WEIGHTS)
    constants = _tensors(archive, CONSTANTS_TABLE, CONSTANTS)
    example = _example_inputs(archive)
    try:
        program = _dict_to_dataclass(schema.ExportedProgram, content)  # type: ignore[no-untyped-call]
        return ExportedProgramDeserializer().deserialize(program, state, constants, example)
    except (RuntimeError, AssertionError, LookupError, ValueError, TypeError, AttributeError) as error:
        version = content.get("torch_version", "an unknown version")
        raise Refused(f"its graph is damaged, or PyTorch {version} wrote what this one cannot read") from error


def _example_inputs(archive: _Archive) -> Any:
    if not archive.read(SAMPLE_INPUTS):
        return None
    example = archive.unpickle(SAMPLE_INPUTS)
    if example is None or (isinstance(example, tuple) and len(example) == 2):
        return example
    raise InputError(f"{archive.path} is damaged: its sample inputs are no arguments")


def _tensors(archive: _Archive, table: str, folder: str) -> dict[str, Tensor]:
    from torch import nn
    from torch._export.serde import schema

    from edgepack.models._pt2_schema import clean

    payloads = clean(schema.PayloadConfig, archive.read_json(table), table)["config"]
    storages: dict[str, bytearray] = {}
    result: dict[str, Tensor] = {}
    for name, payload in payloads.items():
        member = folder + payload["path_name"]
        if payload["use_pickle"]:
            tensor = archive.unpickle(member)
        else:
            storage = storages.setdefault(member, bytearray(archive.read(member)))
            tensor = _strided(storage, payload["tensor_meta"], member)
        result[name] = nn.Parameter(tensor, requires_grad=False) if payload["is_param"] else tensor
    return result


def _strided(storage: bytearray, meta: Mapping[str, Any] | None, member: str) -> Tensor:
    import torch
    from torch._export.serde import schema
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    from edgepack.models._pt2_schema import Refused

    try:
        if meta is None or meta["layout"] != schema.Layout.Strided:
            raise ValueError("no dense tensor")
        dtype = _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]]
        sizes = [int(item["as_int"]) for item in meta["sizes"]]
        strides = [int(item["as_int"]) for item in meta["strides"]]
        if 0 in sizes:
            return torch.empty(sizes, dtype=dtype)
        flat = torch.frombuffer(storage, dtype=dtype)
        return torch.as_strided(flat, sizes, strides, int(meta["storage_offset"]["as_int"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Refused(f"its member {member!r} is damaged") from error
