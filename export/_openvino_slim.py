"""Make OpenVINO's model.xml small without changing what it says: indentation, inner names and inner shapes go."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path
from xml.etree import ElementTree

KEPT = ("Parameter", "Result")


def slim(path: Path, interface: AbstractSet[str]) -> None:
    """Rewrite the file.

    Inner shapes are inferred again when the file is read; inner names only serve people.

    Args:
        path: model.xml, as OpenVINO saved it.
        interface: tensor names of the model's inputs and outputs, which stay.
    """
    root = ElementTree.fromstring(path.read_bytes())
    root.set("name", "g")
    for number, layer in enumerate(root.iter("layer")):
        inner = layer.get("type") not in KEPT
        if inner:
            layer.set("name", str(number))
        for port in layer.iterfind("input/port"):
            port.attrib.pop("precision", None)
            _drop_shape(port)
        for port in layer.iterfind("output/port"):
            _keep_names(port, interface)
            if inner:
                _drop_shape(port)
    for element in root.iter():
        element.text = (element.text or "").strip() or None
        element.tail = None
    path.write_bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).replace(b'" />', b'"/>'))


def _drop_shape(port: ElementTree.Element) -> None:
    for dim in port.findall("dim"):
        port.remove(dim)


def _keep_names(port: ElementTree.Element, interface: AbstractSet[str]) -> None:
    kept = [name for name in port.get("names", "").split(",") if name in interface]
    if kept:
        port.set("names", ",".join(kept))
    else:
        port.attrib.pop("names", None)
