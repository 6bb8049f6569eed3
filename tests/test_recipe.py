"""Recipes: everything wrong is found at once, with file and key; overrides; parts are built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgepack
from edgepack import recipe
from edgepack.contracts import Exporter, Pass
from edgepack.errors import InputError, RecipeError

GOOD = """
[model]
module = "models.py:net"
[task]
input = {shape = [1, 3, 8, 8], scale = 255}
[[compress]]
use = "fold"
[[export]]
use = "onnx"
[[export]]
use = "onnx"
name = "small"
precision = "float16"
[[profile]]
device = {use = "host", threads = 2}
runtime = "onnxruntime"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text("")
    (tmp_path / "edgepack.toml").write_text(GOOD)
    return tmp_path


def problems(folder: Path, text: str, *overrides: str) -> str:
    (folder / "edgepack.toml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipe.load(folder, overrides)
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_a_good_recipe_gives_parts_with_options(folder: Path) -> None:
    loaded = recipe.load(folder)
    assert [type(item).__name__ for item in loaded.passes] == ["Fold"]
    assert [recipe.artifact_name(item) for item in loaded.exporters] == ["onnx", "small"]
    assert loaded.exporters[1].precision == "float16"
    assert loaded.measurements[0].settings.threads == 2
    assert loaded.out == folder / "edgepack-out"


def test_all_problems_come_together_with_key_and_nearest_word(folder: Path) -> None:
    text = problems(
        folder,
        """
        [model]
        modul = "models.py:net"
        [task]
        input = {shape = [1, 3, 0, 8]}
        evaluation = {data = "missing.npz"}
        [[compress]]
        use = "fod"
        [[export]]
        use = "onnx"
        precison = "float16"
        [[export]]
        use = "openvino"
        precision = "int3"
        [budgte]
        """,
    )
    assert "model.module: missing" in text
    assert "model.modul: unknown key, did you mean 'module'?" in text
    assert "task.input.shape.2: input should be greater than or equal to 1, not 0" in text
    assert "compress.fod: there is no pass 'fod' (did you mean 'fold'?)" in text
    assert "export.onnx: onnx has no option 'precison', did you mean 'precision'?" in text
    assert "export.openvino: precision is 'plan', 'float32' or 'float16', not 'int3'" in text
    assert "budgte: unknown key, did you mean 'budget'?" in text
    assert all(line.startswith("  - edgepack.toml: ") for line in text.splitlines()[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('module = "models.py:net"', 'module = "gone.py:net"'), "model.module: gone.py does not exist"),
        (("scale = 255}", "scale = 255}\nevaluation = {data = 'x.npz'}"), "task.metric: missing"),
        (("scale = 255}", "scale = 255}\ncalibration = {samples = 3}"), "give either 'data', or both"),
        (("threads = 2", "threads = 0"), "profile.0.device.threads: a whole number from 1, not 0"),
        (('name = "small"', ""), "two exports have this name"),
        (('name = "small"', 'name = "../up"'), "must be a plain folder name"),
        (("scale = 255}", "scale = 255}\ninputs = {a = {shape = [1]}}"), "either 'input' (one input) or 'inputs'"),
    ],
)
def test_one_problem(folder: Path, change: tuple[str, str], message: str) -> None:
    assert message in problems(folder, GOOD.replace(*change))


def test_passes_in_a_wrong_order_are_refused_with_the_right_one(folder: Path) -> None:
    (folder / "late.py").write_text(
        "from dataclasses import dataclass\nfrom edgepack.contracts import Pass\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Late(Pass):\n    '''Comes last.'''\n    stage = 90\n"
        "    def apply(self, module, task, run):\n        return module\n"
    )
    import sys

    sys.path.insert(0, str(folder))
    try:
        text = GOOD.replace('use = "fold"', 'use = "late:Late"\n[[compress]]\nuse = "fold"')
        assert "the order late:Late, fold does not work; the right one is fold, late:Late" in problems(folder, text)
    finally:
        sys.path.remove(str(folder))


def test_overrides_reach_tables_and_list_entries(folder: Path) -> None:
    loaded = recipe.load(
        folder,
        [
            "task.input.scale=1",
            "export.small.precision=float32",
            "export.onnx.precision=float16",  # the one whose artifact is called so
            "compress.0.leave=['head']",
            "model.options.n=3",
        ],
    )
    assert loaded.exporters[0].precision == "float16"
    assert loaded.sheet.task.input is not None
    assert loaded.sheet.task.input.scale == 1
    assert loaded.exporters[1].precision == "float32"
    assert loaded.passes[0].leave == ("head",)  # type: ignore[attr-defined]
    assert loaded.sheet.model.options == {"n": 3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense", "is not key=value"),
        ("compress.fodl.leave=[]", "no entry 'fodl'"),
        ("model.module.x=1", "is not a table"),
        ("compress.fold={leave=['a']}", "'compress' is a list; what can be set is an option of an entry"),
    ],
)
def test_a_bad_override_is_wrong_input(folder: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.load(folder, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "compress.fold.leave=('a', 'b')",
            "compress.fold: leave: expected a list in square brackets, not \"('a', 'b')\"",
        ),
        ("compress.fold.leave={a=1}", "compress.fold: leave: expected a list in square brackets, not a table"),
        ("task.input.shape=(1, 3)", "task.input.shape: expected a list in square brackets, not '(1, 3)'"),
        ("compress={use='fold'}", "compress: expected a list in square brackets, not a table"),
        ("export=['onnx']", "export.0: expected a table {key = …}, not 'onnx'"),
        ("budget.size_ratio=[1]", "budget.size_ratio: input should be a valid number, not a list"),
        ("task.input=[{shape=[1]}]", "task.input: expected a table {shape = …}, not a list"),
        ("task.inputs=[{shape=[1]}]", "task.inputs: expected a table {key = …}, not a list"),
    ],
)
def test_a_value_of_another_kind_is_named_as_recipes_write_it(folder: Path, override: str, message: str) -> None:
    assert f"edgepack.toml: {message}" in problems(folder, GOOD, override)


def test_an_override_that_fits_several_entries_lists_them(folder: Path) -> None:
    text = (folder / "edgepack.toml").read_text()
    (folder / "edgepack.toml").write_text(text + '\n[[compress]]\nuse = "fold"\n')
    with pytest.raises(InputError, match="2 entries 'fold'") as caught:
        recipe.load(folder, ["compress.fold.leave=[]"])
    assert caught.value.hint == "say which: 0, 1, fold"


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist") as caught:
        recipe.load(tmp_path)
    assert caught.value.hint == "edgepack init writes one"
    (tmp_path / "edgepack.toml").write_text("[model\n")
    with pytest.raises(InputError, match="not valid TOML"):
        recipe.load(tmp_path)


def test_option_types_are_checked() -> None:
    with pytest.raises(InputError, match="normalize: input should be a valid boolean"):
        recipe.build(Exporter, {"use": "onnx", "normalize": "perhaps"})
    with pytest.raises(InputError, match="'use' is missing"):
        recipe.build(Pass, {})


def test_the_committed_schema_is_current() -> None:
    path = Path(edgepack.__file__).parent / "recipe.schema.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(recipe.schema())), (
        "run: python -m edgepack.recipe > core/recipe.schema.json"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("scale = 255", "scale = 0"), "task: input 'input': scale and std must be finite and above 0"),
        (("scale = 255", "mean = [1, 2]"), "task: input 'input': mean has 2 values"),
        (('name = "small"', 'name = ".."'), "must be a plain folder name"),
        (("threads = 2", "threads = true"), "profile.0.device.threads: a whole number from 1, not True"),
    ],
)
def test_values_that_only_make_no_sense_are_found_before_any_work(
    folder: Path, change: tuple[str, str], message: str
) -> None:
    assert message in problems(folder, GOOD.replace(*change))
