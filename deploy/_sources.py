"""The sources of a package: copied, or filled in by jinja2 where they depend on the contract."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from edgepack.artifact import describe_files

NAMES = {"onnx": "ONNX", "openvino": "OpenVINO"}
CXX_CHANNELS = (1, 3)  # what .pgm and .ppm hold
CXX_DTYPES = ("float32", "uint8")


def write_sources(contract: dict[str, Any], folder: Path) -> None:
    """Write C++, CMake, Python and README beside the model files and golden samples."""
    facts = _facts(contract, folder)
    with resources.as_file(resources.files("edgepack.deploy") / "templates" / "linux") as home:
        for path in sorted(path for path in home.rglob("*") if path.is_file()):
            target = folder / path.relative_to(home)
            if target.stem.startswith("model_") and target.stem != f"model_{contract['format']}":
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8")
            if target.suffix == ".j2":
                target, text = target.with_suffix(""), _filled(text, facts)
            target.write_text(text, encoding="utf-8")


def _facts(contract: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The contract with what the templates need besides."""
    inputs = [{**item, "cxx_image": _in_cxx(item)} for item in contract["inputs"]]
    places = {item["name"]: place for place, item in enumerate(inputs)}
    parity = contract["parity"]
    checked = f"largest error {parity['max_rel']:.2g} on {parity['runtime']}" if parity["max_rel"] is not None else None
    return {
        **contract,
        "inputs": inputs,
        "pixels": [{**item, "place": places[item["input"]]} for item in contract["pixels"]],
        "format_name": NAMES[contract["format"]],
        "package": contract["engine"]["package"],
        "engine_version": contract["engine"]["tested"],
        "identifier": "edgepack_" + re.sub(r"\W", "_", contract["name"], flags=re.ASCII),
        "parity_words": checked or parity["status"],
        "data_files": describe_files(folder),
    }


def _in_cxx(item: dict[str, Any]) -> bool:
    """Whether the C++ sample can make this input of an image file."""
    if not item["image"] or item["dtype"] not in CXX_DTYPES:
        return False
    return item["shape"][item["layout"].index("C")] in CXX_CHANNELS


def _filled(text: str, facts: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters |= {"cxx": _literal, "sizes": _sizes, "floats": _floats, "float32": _float32, "dtype": _dtype}
    return environment.from_string(text).render(facts)


def _literal(text: str) -> str:
    """A C++ string literal; octal escapes end after three digits, hexadecimal ones do not."""
    plain = {ord('"'): '\\"', ord("\\"): "\\\\", ord("?"): "\\?"}
    shown = (plain.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}") for byte in text.encode())
    return f'"{"".join(shown)}"'


def _sizes(shape: Sequence[int | str]) -> str:
    return "{" + ", ".join("-1" if isinstance(axis, str) else str(axis) for axis in shape) + "}"


def _floats(values: Sequence[float]) -> str:
    return "{" + ", ".join(_float32(value) for value in values) + "}"


def _float32(value: float) -> str:
    """The shortest literal of a double; C++ rounds it to a float as NumPy does."""
    return f"static_cast<float>({json.dumps(float(value))})"


def _dtype(name: str) -> str:
    return "boolean" if name == "bool" else name
