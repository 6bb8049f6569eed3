"""The command line: options, exit statuses, JSON documents, and the whole job on the embedded example."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgepack import _console, cli, errors, pipeline, recipe

if TYPE_CHECKING:
    from conftest import Run

VERBS = ("init", "compress", "export", "run", "profile", "compare", "verify", "deploy", "report", "list", "doctor")


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    shutil.copytree(str(resources.files("edgepack") / "examples" / "digits"), tmp_path / "digits")
    return tmp_path / "digits"


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(recipe, "load", broken)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_examples(edgepack: Run, verb: str) -> None:
    status, out, _ = edgepack(verb, "--help")
    assert status == 0
    assert "Examples:" in out
    assert f"edgepack {verb}" in out
    assert "--json" in out


def test_help_names_every_verb_and_version_is_shown(edgepack: Run) -> None:
    status, out, _ = edgepack("--help")
    assert status == 0
    assert all(verb in out for verb in VERBS)
    assert edgepack("--version")[1].startswith("edgepack 0.")


FAILURES = {
    errors.InputError("m"): 2,
    errors.RecipeError(["a", "b"]): 2,
    errors.MissingExtra("m", "pip install x"): 3,
    errors.DeviceError("m"): 3,
    errors.BudgetError("m"): 4,
    errors.MeasurementError("m"): 5,
    errors.ParityError("m"): 6,
    errors.Unsupported("m"): 7,
    errors.IntegrityError("m"): 8,
    errors.StorageError("m"): 9,
    OSError(errno.ENOSPC, "full", "x.bin"): 9,
    PermissionError(errno.EACCES, "no"): 9,
    errors.StepError("m", errors.Unsupported("m")): 7,
}


@pytest.mark.parametrize("error, status", FAILURES.items(), ids=[type(error).__name__ for error in FAILURES])
def test_every_error_has_its_exit_status_and_says_so_twice(
    edgepack: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    fail_with(monkeypatch, error)
    found, out, err = edgepack("compress", "--json")
    assert found == status
    document = json.loads(out)["error"]
    assert document["exit_status"] == status
    assert document["message"]
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_bug_shows_its_traceback_and_asks_for_a_report(edgepack: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ZeroDivisionError("1/0"), errors.StepError("pass 1 failed", ZeroDivisionError("1/0"))):
        fail_with(monkeypatch, error)
        status, out, err = edgepack("compress", "--json")
        assert status == 1
        assert "ZeroDivisionError" in err
        assert "Traceback" in err
        assert "this is a bug in edgepack, please report it" in err
        assert json.loads(out)["error"]["exit_status"] == 1


def test_interrupts_and_readers_that_go_away(edgepack: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    status, out, err = edgepack("compress")
    assert (status, out) == (130, "")
    assert err.startswith("interrupted")
    fail_with(monkeypatch, BrokenPipeError(errno.EPIPE, "gone"))
    assert edgepack("compress")[0] == 9


def test_a_wrong_command_line_is_status_2(edgepack: Run) -> None:
    status, _, err = edgepack("compress", "--bitz", "4")
    assert status == 2
    assert "--bitz" in err
    status, out, _ = edgepack("shrink", "--json")
    assert status == 2
    assert json.loads(out)["error"]["exit_status"] == 2


def test_brackets_in_messages_are_not_markup(edgepack: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, errors.InputError("task.input: [bold]shape[/bold] [1, 3]", "see [[export]]"))
    _, _, err = edgepack("compress")
    assert "[bold]shape[/bold] [1, 3]" in err
    assert "see [[export]]" in err


def test_a_missing_recipe_and_a_missing_artifact_name_the_next_command(edgepack: Run, tmp_path: Path) -> None:
    status, _, err = edgepack("compress", tmp_path / "none.toml")
    assert status == 2
    assert "none.toml does not exist" in err
    assert "edgepack init" in err
    status, _, err = edgepack("compare", tmp_path / "a", tmp_path / "b")
    assert status == 2
    assert "does not exist" in err


def test_init_writes_a_recipe_and_never_replaces_one_unasked(edgepack: Run, tmp_path: Path) -> None:
    status, out, _ = edgepack("init", tmp_path / "new", "--json")
    assert status == 0
    assert json.loads(out)["files"] == [str(tmp_path / "new" / "edgepack.toml")]
    (tmp_path / "new" / "edgepack.toml").write_text("mine")
    status, _, err = edgepack("init", tmp_path / "new")
    assert status == 2
    assert "already has edgepack.toml" in err
    assert (tmp_path / "new" / "edgepack.toml").read_text() == "mine"
    assert edgepack("init", tmp_path / "new", "--force", "-q")[0] == 0
    assert (tmp_path / "new" / "edgepack.toml").read_text() != "mine"
    status, _, err = edgepack("init", tmp_path / "x", "--example", "digit")
    assert status == 2
    assert "did you mean 'digits'?" in err


def test_dry_run_and_set_do_no_work(edgepack: Run, digits: Path) -> None:
    status, out, err = edgepack("run", digits, "--dry-run", "--json", "--set", "export.onnx.precision=float16")
    assert status == 0
    plan = json.loads(out)["plan"]
    assert [(step["stage"], step["part"]) for step in plan] == [
        ("compress", "fold"), ("export", "onnx"), ("export", "openvino"), ("profile", "host"),
    ]  # fmt: skip
    assert plan[1]["options"]["precision"] == "float16"
    assert "nothing was done" in err
    assert not (digits / "edgepack-out").exists()


def test_list_and_doctor_describe_this_environment(edgepack: Run) -> None:
    status, out, _ = edgepack("list", "--json")
    assert status == 0
    parts = {(part["kind"], part["name"]): part for part in json.loads(out)["parts"]}
    assert parts["passes", "fold"]["summary"]
    assert parts["devices", "host"]["missing"] is None
    assert edgepack("list", "passes")[1].count("fold") == 1
    status, out, _ = edgepack("doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["core"]["edgepack"]
    assert {extra["name"] for extra in found["extras"]} >= {"compress", "onnx", "onnx-run", "openvino", "openvino-run"}
    assert all(meter["reason"] is None or meter["reason"] for meter in found["meters"])
    assert found["machine"]["python"]


def test_quiet_says_nothing_and_tables_keep_their_headings(edgepack: Run) -> None:
    assert edgepack("list", "--quiet") == (0, "", "")
    from edgepack import _tables

    headings = [str(column.header) for column in _tables.profiled([]).columns]
    assert "p50 \\[p90]" in headings


def test_profile_refuses_a_mixture_of_targets(edgepack: Run, tmp_path: Path) -> None:
    status, _, err = edgepack("profile", tmp_path / "a", tmp_path / "b")
    assert status == 2
    assert "is not an artifact folder" in err


def test_profile_options_change_the_recipes_measurements(
    edgepack: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[recipe.Recipe] = []
    monkeypatch.setattr(pipeline, "profile_recipe", lambda loaded, options: seen.append(loaded) or [])
    words = ("profile", digits, "--threads", "2", "--seconds", "1.5", "--runtime", "onnxruntime")
    assert edgepack(*words)[0] == 0
    one = seen[0].measurements[0]
    assert (one.settings.threads, one.settings.max_seconds) == (2, 1.5)
    assert type(one.runtime).__name__.lower() == "onnxruntime"
    assert edgepack(*words[:-1], "onnxruntim")[0] == 2


def test_a_missed_budget_still_measures_and_reports(
    edgepack: Run, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def miss(*arguments: Any) -> None:
        raise errors.BudgetError("size_ratio 1.0 is above 0.3")

    monkeypatch.setattr(cli, "compress", lambda *arguments: {})
    monkeypatch.setattr(pipeline, "export_recipe", miss)
    monkeypatch.setattr(pipeline, "profile_recipe", lambda *arguments: done.append("profile") or [])
    monkeypatch.setattr(pipeline, "report_recipe", lambda out: done.append("report") or out / "report.html")
    status, _, err = edgepack("run", digits)
    assert status == 4
    assert done == ["profile", "report"]
    assert "size_ratio 1.0 is above 0.3" in err


class Terminal:
    """Collects what a progress line would show."""

    def __init__(self, is_terminal: bool = False) -> None:
        self.is_terminal = is_terminal
        self.lines: list[str] = []

    def print(self, text: str, **options: Any) -> None:
        self.lines.append(text)


def test_progress_shows_only_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_console, "SHOW_AFTER_S", 0.05)
    monkeypatch.setattr(_console, "LINE_EVERY_S", 0.0)
    terminal = Terminal()
    progress = _console.TerminalProgress(terminal)  # type: ignore[arg-type]
    progress.start("quick")
    progress.done()
    step = progress.start("slow", total=10)
    time.sleep(0.2)
    step(5)
    progress.done()
    assert terminal.lines[0] == "slow …"
    assert terminal.lines[1].startswith("slow: 50%, about ")
    silent = _console.TerminalProgress(terminal, quiet=True)  # type: ignore[arg-type]
    silent.start("unseen", total=1)(1)
    assert len(terminal.lines) == 2


def test_starts_fast_and_without_heavy_packages() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "edgepack", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in found.stderr.splitlines()}
    assert not loaded & {"torch", "onnx", "onnxruntime", "openvino", "numpy", "pydantic", "scipy"}
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "edgepack", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    assert min(times) < 2.0, "0.3 s of work; leaves room for a busy machine"


def test_the_next_command_names_where_the_results_are(edgepack: Run, digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    status, out, err = edgepack("compress", digits, "--out", tmp_path / "results")
    assert status == 0, err
    said = "".join(out.split())
    assert "".join(f"next: edgepack export {digits} --out {tmp_path / 'results'}".split()) in said


def test_formats_of_a_recipe_are_picked_by_to(edgepack: Run, digits: Path) -> None:
    words = ("export", digits, "--dry-run", "--json", "--set", "export.onnx.precision=float16")
    status, out, err = edgepack(*words, "--to", "onnx", "--to", "tflite", "--to", "tflite")
    assert status == 0, err
    steps = [(step["part"], step["options"]["precision"]) for step in json.loads(out)["plan"]]
    assert steps == [("onnx", "float16"), ("tflite", "plan")]
    status, out, _ = edgepack("export", digits.parent, "--dry-run", "--json", "--to", "openvino")
    assert [step["part"] for step in json.loads(out)["plan"]] == ["openvino"]
    status, _, err = edgepack("export", digits, "--dry-run", "--to", "onyx")
    assert (status, "did you mean 'onnx'?" in err) == (2, True)


@pytest.mark.slow
def test_the_whole_job_on_the_example(edgepack: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="pip install 'edgepack[all]'")
    home = tmp_path / "demo"
    assert edgepack("init", "--example", "digits", home)[0] == 0
    words = ("run", home, "--json", "--set", "profile.0.seconds=2")
    status, out, err = edgepack(*words)
    assert status == 0, err
    document = json.loads(out)
    assert [item["manifest"]["parity"]["status"] for item in document["export"]["artifacts"]] == ["checked"] * 2
    assert len(document["profile"]["profiles"]) == 4
    assert Path(document["report"]).stat().st_size > 10_000
    assert document["profile"]["profiles"][1]["ratio"]["verdict"] in ("same", "cannot tell", "faster", "slower")
    assert "report: " in err
    status, out, _ = edgepack("export", home, "--json")
    assert status == 0
    assert all(item["up_to_date"] for item in json.loads(out)["artifacts"])
    assert edgepack("verify", home)[0] == 0
    model = home / "edgepack-out" / "onnx" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    results = home / "edgepack-out"
    assert edgepack("verify", results / "onnx")[0] == 8
    assert edgepack("compare", results / "baseline/onnx", results / "onnx", "--seconds", "1")[0] == 8


def test_what_user_code_prints_does_not_reach_the_json_document(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
    (tmp_path / "models.py").write_text(
        "import os\nfrom torch import nn\nprint('hello')\nos.system('echo from a child')\n"
        "def net():\n    print('building')\n    return nn.Linear(4, 2)\n"
    )
    (tmp_path / "edgepack.toml").write_text('[model]\nmodule = "models.py:net"\n[task]\ninput = {shape = [1, 4]}\n')
    command = [sys.executable, "-m", "edgepack", "compress", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["folder"].endswith("compressed")
    assert "hello" in done.stderr
    assert "from a child" in done.stderr


def test_a_missing_package_is_status_3_wherever_it_is_imported(edgepack: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'torch'", name="torch.nn"))
    status, _, err = edgepack("compress")
    assert status == 3
    assert "the package 'torch' is not installed" in err
    assert "pip install 'edgepack[compress]'" in err
