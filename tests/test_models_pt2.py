"""A ``.pt2`` is read without running anything in it: doctored files are refused and leave no trace."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgepack.errors import InputError
from edgepack.models.pt2 import load_program

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.canary), "w")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.bn = nn.BatchNorm2d(8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("offset", torch.rand(8))
        self.constant = torch.rand(8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            x = self.bn(self.conv(x)).flatten(2).transpose(1, 2) + self.offset + self.constant
        y, _ = self.lstm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return {"y": y.reshape(x.shape[0], y.shape[1] // 2, -1), "mean": x.mean()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.manual_seed(0)
    example = torch.rand(2, 3, 16, 16)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(Net().eval(), (example,), dynamic_shapes=dynamic), path)
    return path


def doctor(saved: Path, target: Path, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy with members replaced or added (names without the archive's root folder)."""
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(target, "w", compression) as copy:
        root = source.namelist()[0].partition("/")[0]
        left = dict(changes)
        for name in source.namelist():
            copy.writestr(name, left.pop(name.partition("/")[2], source.read(name)))
        for name, content in left.items():
            copy.writestr(f"{root}/{name}", content)
    return target


def graph_of(saved: Path, member: str = "models/model.json") -> dict[str, Any]:
    with zipfile.ZipFile(saved) as archive:
        root = archive.namelist()[0].partition("/")[0]
        content: dict[str, Any] = json.loads(archive.read(f"{root}/{member}"))
    return content


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def walk(value: Any, key: str, replace: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {k: replace(v) if k == key else walk(v, key, replace) for k, v in value.items()}
    return [walk(item, key, replace) for item in value] if isinstance(value, list) else value


def test_what_torch_writes_is_read_exactly(saved: Path, tmp_path: Path) -> None:
    loaded, expected = load_program(saved), torch.export.load(saved)
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        ours, theirs = loaded.module()(x), expected.module()(x)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    again = tmp_path / "again.pt2"
    torch.export.save(loaded, again)
    assert list(load_program(again).state_dict) == list(expected.state_dict)
    load_program(doctor(saved, tmp_path / "same.pt2", {}))


def test_shared_storage_stays_shared(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    path = tmp_path / "tied.pt2"
    torch.export.save(torch.export.export(net.eval(), (torch.rand(1, 4),)), path)
    state = load_program(path).state_dict
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()


def test_the_canary_sings(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Evil(canary))).close()
    assert canary.exists()


@pytest.mark.parametrize("place", ["sample inputs", "weight", "constant", "opaque", "custom", "legacy"])
def test_code_in_a_pickle_does_not_run(saved: Path, tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"
    evil = torch_bytes(Evil(canary))
    tables = {
        "weight": "data/weights/model_weights_config.json",
        "constant": "data/constants/model_constants_config.json",
    }
    changes: dict[str, bytes]
    if place in tables:
        table = walk(graph_of(saved, tables[place]), "use_pickle", lambda _: True)
        member = {"weight": "data/weights/weight_0", "constant": "data/constants/tensor_0"}[place]
        changes = {tables[place]: json.dumps(table).encode(), member: evil}
    else:
        name = {
            "sample inputs": "data/sample_inputs/model.pt",
            "opaque": "data/constants/opaque_obj_0",
            "custom": "data/constants/custom_obj_0",
            "legacy": "data/weights/model.pt",
        }[place]
        changes = {name: pickle.dumps(Evil(canary)) if place == "opaque" else evil}
    with pytest.raises(InputError, match="was not loaded: its member") as caught:
        load_program(doctor(saved, tmp_path / "bad.pt2", changes))
    assert caught.value.exit_status == 2
    assert not canary.exists()


EXPRESSIONS = [
    "__import__('pathlib').Path('CANARY').touch()",
    'Max(\'__import__("pathlib").Path("CANARY").touch()\')',
    "Symbol('s0').__class__",
    "[open('CANARY', 'w') for _ in (1,)]",
    "(lambda: open('CANARY', 'w'))()",
    'Symbol(\'open("CANARY","w")\')',
    "Integer(\"open('CANARY','w')\")",
    "Add(Integer(1), open('CANARY', 'w'))",
    "Symbol('s0', positive=open('CANARY', 'w'))",
    "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
    "9**9**9",
    "s0 if open('CANARY', 'w') else s0",
    "exec",
    "x" * 5000,
]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=[e[:24] for e in EXPRESSIONS])
def test_symbolic_expressions_are_no_code(saved: Path, tmp_path: Path, expression: str) -> None:
    canary = tmp_path / "canary"
    content = walk(graph_of(saved), "expr_str", lambda _: expression.replace("CANARY", str(canary)))
    with pytest.raises(InputError, match="expression over sizes"):
        load_program(doctor(saved, tmp_path / "bad.pt2", {"models/model.json": json.dumps(content).encode()}))
    assert not canary.exists()


def rename(content: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(content).replace(json.dumps(old), json.dumps(new)))
    return result


OPERATORS = [
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.save.default",
    "torch.ops.mine.twice.default",
    "torch.load",
    "torch.ops.aten.relu",
    "torch.ops.aten.__class__.mro",
    "torch.serialization.load",
    "_operator.attrgetter",
    "math.__loader__.load_module",
    "#mine",
    "builtins.eval",
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_only_atens_operators_are_taken(saved: Path, tmp_path: Path, operator: str) -> None:
    content = rename(graph_of(saved), "torch.ops.aten.mean.default", operator)
    with pytest.raises(InputError, match=f"operator {operator!r}"):
        load_program(doctor(saved, tmp_path / "bad.pt2", {"models/model.json": json.dumps(content).encode()}))


def test_generated_code_cannot_be_injected(saved: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"x'); open({str(canary)!r}, 'w'); ('"
    original = graph_of(saved)
    for old in ("mean", "x", "p_conv_weight", "conv.weight"):
        content = rename(original, old, code)
        with pytest.raises(InputError, match="was not loaded"):
            load_program(doctor(saved, tmp_path / "bad.pt2", {"models/model.json": json.dumps(content).encode()}))
    assert not canary.exists()


def test_guards_are_dropped(saved: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = graph_of(saved)
    content["guards_code"] = [f"open({str(canary)!r}, 'w')"]
    for node in content["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {"source_fn_stack": "a,torch.load", "custom": "{}", "stack_trace": "'''\nopen()"}
    program = load_program(doctor(saved, tmp_path / "odd.pt2", {"models/model.json": json.dumps(content).encode()}))
    program.module()(torch.rand(2, 3, 16, 16))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        ("builtins.dict", '[{"__enum__": true, "fqn": "antigravity:x", "name": "y"}, "mean"]'),
        ("collections.defaultdict", '{"default_factory_module": "os", "default_factory_name": "abort"}'),
        ("mine.Output", '["y", "mean"]'),
    ],
)
def test_tree_specifications_import_nothing(saved: Path, tmp_path: Path, kind: str, context: str) -> None:
    def replace(text: str) -> str:
        protocol, root = json.loads(text)
        return json.dumps([protocol, {**root, "type": kind, "context": context}])

    content = walk(graph_of(saved), "out_spec", replace)
    with pytest.raises(InputError, match="was not loaded"):
        load_program(doctor(saved, tmp_path / "bad.pt2", {"models/model.json": json.dumps(content).encode()}))
    assert "antigravity" not in sys.modules


def test_compiled_code_unknown_members_and_bombs(saved: Path, tmp_path: Path) -> None:
    for name in ("data/aotinductor/model/a.so", "data/weights/../../evil", "models/other.json", "stuff.bin"):
        with pytest.raises(InputError, match="not tensors or a graph"):
            load_program(doctor(saved, tmp_path / "bad.pt2", {name: b"x"}))
    big = {"extra/zeros": b"\0" * 10_000_000}
    with pytest.raises(InputError, match="compressed"):
        load_program(doctor(saved, tmp_path / "bomb.pt2", big, zipfile.ZIP_DEFLATED))


def test_damaged_and_missing_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_program(tmp_path / "none.pt2")
    short = tmp_path / "short.pt2"
    short.write_bytes(saved.read_bytes()[:20_000])
    with pytest.raises(InputError, match="damaged"):
        load_program(short)
    with pytest.raises(InputError, match="damaged"):
        load_program(doctor(saved, tmp_path / "cut.pt2", {"data/weights/weight_0": b"\0" * 8}))
    with pytest.raises(InputError, match="no JSON"):
        load_program(doctor(saved, tmp_path / "json.pt2", {"models/model.json": b"{"}))
    torch.save({"a": torch.rand(2)}, tmp_path / "weights.pt2")
    with pytest.raises(InputError, match="no archive written by"):
        load_program(tmp_path / "weights.pt2")


def test_wrong_types_are_refused(saved: Path, tmp_path: Path) -> None:
    for key, value in (("as_int", "open('x')"), ("requires_grad", "yes"), ("sizes", 3)):
        content = walk(graph_of(saved), key, lambda _, value=value: value)  # type: ignore[misc]
        with pytest.raises(InputError, match="was not loaded"):
            load_program(doctor(saved, tmp_path / "bad.pt2", {"models/model.json": json.dumps(content).encode()}))


def test_a_custom_operator_is_named(tmp_path: Path) -> None:
    @torch.library.custom_op("edgepack_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Custom(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    path = tmp_path / "custom.pt2"
    torch.export.save(torch.export.export(Custom(), (torch.rand(2),)), path)
    with pytest.raises(InputError, match=r"torch\.ops\.edgepack_tests\.twice\.default"):
        load_program(path)
