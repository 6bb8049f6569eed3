"""What may stand in the JSON of a ``.pt2``: torch's own schema, plus a rule for every string.

torch turns some of those strings into code when the program is read or run: symbolic expressions go through
``eval``, guards and node names into generated Python, operator names through ``getattr``, tree specifications
through ``import``. So every string is checked against what a written program can contain.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import keyword
import math
import operator
import re
import types
import typing
from functools import cache
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.union import _Union

OPERATOR = re.compile(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)")
TEXT = re.compile(r"[\w .,:/+\-=*<>()\[\]|@!?%&^~]*")
NUMBER = re.compile(r"-?\d{1,30}(\.\d{0,30})?(e[+-]?\d{1,3})?")
PLAIN_OPERATORS = frozenset(
    [
        "eq",
        "ne",
        "le",
        "ge",
        "lt",
        "gt",
        "neg",
        "pos",
        "mul",
        "add",
        "sub",
        "floordiv",
        "mod",
        "pow",
        "truediv",
        "and_",
        "or_",
        "lshift",
        "rshift",
        "getitem",
    ]
)
HIGHER_ORDER = frozenset({"torch.ops.higher_order.wrap_with_set_grad_enabled"})
FILE_OPERATORS = frozenset({"from_file", "save"})
CONTAINERS = frozenset(
    {
        "builtins.tuple",
        "builtins.list",
        "builtins.dict",
        "collections.OrderedDict",
        "torch.fx.immutable_collections.immutable_list",
        "torch.fx.immutable_collections.immutable_dict",
    }
)
SYMPY_WORDS = """
Symbol Integer Rational Float Add Mul Pow Max Min Mod Eq Equality Ne Unequality Lt Le Gt Ge StrictLessThan LessThan
StrictGreaterThan GreaterThan And Or Not Abs floor ceiling FloorDiv ModularIndexing Where PythonMod CleanDiv
CeilToInt FloorToInt CeilDiv PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt
RoundToInt RoundDecimal ToFloat Identity IsNonOverlappingAndDenseIndicator
"""
SYMPY = frozenset(SYMPY_WORDS.split())
ASSUMPTION_WORDS = "positive integer nonnegative real negative finite precision evaluate"
ASSUMPTIONS = frozenset(ASSUMPTION_WORDS.split())
SYNTAX = (
    ast.Expression, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.Load, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip
MAX_EXPRESSION = 4000
MAX_POWERS = 4
BARE_NAME = re.compile(r"[a-z]{1,4}\d{1,6}|true|false|int_oo|oo|True|False")
SYMBOL = re.compile(r"[A-Za-z_]\w*")
NOTHING = re.compile(r"(?!)")
POWERS = frozenset({"Pow", "PowByNatural", "FloatPow"})
SMALL_EXPONENT = re.compile(r"-?\d|Integer\(-?\d\)|Rational\(-?\d, \d\)")
# Dropped rather than checked: they only describe where nodes came from, and torch would run the guards.
DROPPED: dict[str, Any] = {
    "Node.metadata": {},
    "GraphModule.metadata": {},
    "GraphModule.treespec_namedtuple_fields": {},
    "ExportedProgram.guards_code": [],
}


class Refused(ValueError):
    """Something that a written program never contains."""


def clean(cls: Any, data: Any, place: str = "") -> Any:
    """A checked copy of ``data``, which must be of the schema's type ``cls``, with tensors placed on the CPU.

    Raises:
        Refused: a value has another type, or a string may not stand where it stands.
    """
    if typing.get_origin(cls) in (typing.Union, types.UnionType):
        return None if data is None else clean(typing.get_args(cls)[0], data, place)
    if typing.get_origin(cls) is list:
        return [clean(typing.get_args(cls)[0], item, place) for item in _typed(data, list, place)]
    if typing.get_origin(cls) is dict:
        value = typing.get_args(cls)[1]
        return {_key(key, place): clean(value, item, place) for key, item in _typed(data, dict, place).items()}
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        return _clean_fields(cls, _typed(data, dict, place))
    return _clean_leaf(cls, data, place)


def _clean_fields(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    if cls is schema.Device:
        return {"type": "cpu", "index": None}
    if cls is schema.CustomObjArgument:
        raise Refused(f"it holds a custom object of class {data.get('class_fqn')!r}")
    hints = _hints(cls)
    if issubclass(cls, _Union) and len(data) != 1:
        raise Refused(f"{cls.__name__} has {len(data)} values")
    result = {}
    for key, value in data.items():
        place = f"{cls.__name__}.{key}"
        if key not in hints:
            raise Refused(f"there is no {place}")
        result[key] = DROPPED[place] if place in DROPPED else clean(hints[key], value, place)
    return result


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, globalns=vars(schema))


def _typed(data: Any, kind: type, place: str) -> Any:
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise Refused(f"{place} is a {type(data).__name__}, not a {kind.__name__}")
    return data


def _key(key: str, place: str) -> str:
    if place == "ExportedProgram.range_constraints" and not BARE_NAME.fullmatch(key):
        raise Refused(f"{place} has {key[:60]!r}")
    if place.startswith("Graph."):
        return _name(key, place)
    return _text(key, place)


def _clean_leaf(cls: Any, data: Any, place: str) -> Any:
    if cls is float and isinstance(data, (int, float)):
        return float(data)
    if cls is float and data in ("Infinity", "-Infinity", "NaN"):
        return data
    if cls is not str:
        return _typed(data, bool if cls is bool else int, place)
    check = STRINGS.get(place) or (_name if place.rpartition(".")[2] in NAMES else _text)
    return check(_typed(data, str, place), place)


def _text(text: str, place: str) -> str:
    if not TEXT.fullmatch(text):
        raise Refused(f"{place} is {text[:60]!r}")
    return text


def _name(text: str, place: str) -> str:
    if text and (not text.isidentifier() or keyword.iskeyword(text) or text.startswith("__")):
        raise Refused(f"{place} is {text[:60]!r}, not a name")
    return text


def _operator(text: str, place: str) -> str:
    matched = OPERATOR.fullmatch(text)
    if matched is not None:
        packet = getattr(getattr(torch.ops, matched[1]), matched[2], None)
        overload = getattr(packet, matched[3], None)
        if isinstance(overload, torch._ops.OpOverload) and matched[2] not in FILE_OPERATORS:
            return text
    module, _, name = text.rpartition(".")
    if module == "_operator" and name in PLAIN_OPERATORS and hasattr(operator, name):
        return text
    if module == "math" and not name.startswith("_") and hasattr(math, name):
        return text
    if (module == "torch" and re.fullmatch(r"_?sym_\w+", name) and hasattr(torch, name)) or text in HIGHER_ORDER:
        return text
    raise Refused(f"it uses the operator {text[:80]!r}, and only PyTorch's own operators (aten) are taken")


def _expression(text: str, place: str) -> str:
    try:
        if len(text) > MAX_EXPRESSION:
            raise ValueError("too long")
        tree = ast.parse(text, mode="eval")
        powers = [node for node in ast.walk(tree) if _check_syntax(node)]
        if len(powers) > MAX_POWERS:
            raise ValueError("too many powers")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(f"{place} is {text[:60]!r}, which is no expression over sizes") from error
    return text


def _check_syntax(node: ast.AST) -> bool:
    """Whether the node is a power. Raises ValueError where it may not stand in an expression over sizes."""
    if isinstance(node, ast.Call):
        return _check_call(node)
    if isinstance(node, ast.Name):
        ok = node.id in SYMPY or BARE_NAME.fullmatch(node.id) is not None
    elif isinstance(node, ast.Constant):
        ok = isinstance(node.value, (int, float, str)) and len(str(node.value)) <= 40
    elif isinstance(node, (ast.BinOp, ast.UnaryOp, ast.Compare)):
        parts = ast.iter_child_nodes(node)
        ok = not any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts)
    else:
        ok = isinstance(node, SYNTAX) and not isinstance(node, (ast.Pow, ast.LShift, ast.RShift))
    if not ok:
        raise ValueError(type(node).__name__)
    return False


def _check_call(node: ast.Call) -> bool:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name not in SYMPY or any(k.arg not in ASSUMPTIONS or not _plain(k.value) for k in node.keywords):
        raise ValueError(name)
    # SymPy evaluates a string wherever it expects an expression; only these three take it as it is.
    pattern = {"Symbol": SYMBOL, "Integer": NUMBER, "Float": NUMBER}.get(name, NOTHING)
    for argument in node.args:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            if not pattern.fullmatch(argument.value):
                raise ValueError(argument.value)
        elif not isinstance(argument, ast.expr) or name == "Symbol":
            raise ValueError(name)
    if name in POWERS and (len(node.args) != 2 or not SMALL_EXPONENT.fullmatch(ast.unparse(node.args[1]))):
        raise ValueError(name)
    return name in POWERS


def _plain(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (bool, int))


def _treespec(text: str, place: str) -> str:
    try:
        protocol, root = json.loads(text)
    except (ValueError, TypeError) as error:
        raise Refused(f"{place} is {text[:60]!r}") from error
    _check_tree(root, place)
    if protocol != 1:
        raise Refused(f"{place} has protocol {protocol!r}")
    if place.endswith("in_spec"):
        for key in _context(root["children_spec"][1], place) if len(root["children_spec"]) == 2 else ():
            _name(str(key), place)
    return text


def _check_tree(node: Any, place: str) -> None:
    kind = _typed(node, dict, place).get("type")
    if kind is None:
        if node.get("context") is not None or node.get("children_spec") != []:
            raise Refused(f"{place} has a leaf with content")
        return
    if kind not in CONTAINERS:
        raise Refused(f"it takes or gives a {kind}; tensors, tuples, lists and dictionaries can be loaded")
    for key in _context(node, place):
        if not isinstance(key, (str, int)) or not TEXT.fullmatch(str(key)):
            raise Refused(f"{place} has the key {str(key)[:60]!r}")
    for child in _typed(node.get("children_spec"), list, place):
        _check_tree(child, place)


def _context(node: dict[str, Any], place: str) -> list[Any]:
    context = node.get("context")
    if context is None:
        return []
    try:
        keys = json.loads(_typed(context, str, place))
    except ValueError as error:
        raise Refused(f"{place} is damaged") from error
    return [] if keys is None else list(_typed(keys, list, place))


NAMES = frozenset({"name", "as_name", "forward_arg_names"})
STRINGS = {
    "SymExpr.expr_str": _expression,
    "Node.target": _operator,
    "Argument.as_operator": _operator,
    "ModuleCallSignature.in_spec": _treespec,
    "ModuleCallSignature.out_spec": _treespec,
}
