from __future__ import annotations

import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from _compiler import needs_compiler

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
needs_compiler()

from torch import nn  # noqa: E402

from _c_files import captured, engine, write  # noqa: E402
from _networks import Network  # noqa: E402
from edgepack.artifact import Artifact  # noqa: E402
from edgepack.export._c_files import kernels, sanitized  # noqa: E402
from edgepack.graph import capture  # noqa: E402
from edgepack.task import Input, Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Werror")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, 2, 1, groups=24), nn.Conv2d(24, 10, 1))
    return Network(lambda a, b, c, x: c(b(torch.relu(a(x)))).mean((2, 3)), *layers)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write(captured(network(), 1, 3, 9, 11), tmp_path_factory.mktemp("c") / "c")[0]


def build(folder: Path, program: Path, *flags: str, compiler: str = "cc") -> Path:
    words = [compiler, *flags, "-o", str(program), *map(str, sorted(folder.glob("*.c"))), "-lm"]
    subprocess.run(words, check=True)
    return program


@pytest.fixture(scope="module")
def program(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(artifact.folder, tmp_path_factory.mktemp("program") / "selftest", "-O0")


def test_one_line_of_cc_gives_a_self_test_that_passes(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("self-test of 1 samples: largest difference ")


def test_the_self_test_fails_when_a_weight_is_wrong(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(artifact.folder, folder)
    text = (folder / "weights.c").read_text(encoding="utf-8")
    start = text.index("{\n") + 2
    (folder / "weights.c").write_text(f"{text[:start]}9.0f + {text[start:]}", encoding="utf-8")
    assert (
        subprocess.run([build(folder, tmp_path / "selftest", "-O0")], check=False, capture_output=True).returncode == 1
    )


def test_the_runner_reads_and_writes_raw_files(artifact: Artifact, program: Path, tmp_path: Path) -> None:
    inputs = {"x": np.random.default_rng(3).standard_normal((1, 3, 9, 11)).astype(np.float32)}
    inputs["x"].tofile(tmp_path / "in")
    subprocess.run([program, "run", tmp_path / "in", tmp_path / "out"], check=True)
    (wanted,) = engine().load(artifact).run(inputs).values()
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out", np.float32), wanted.ravel())
    timed = subprocess.run([program, "time", "3"], capture_output=True, text=True, check=True)
    assert float(timed.stdout.split()[0]) > 0
    (tmp_path / "short").write_bytes(b"1234")
    for words, text in (
        (["run", "short", "out"], "too short"),
        (["run", "none", "out"], "cannot open"),
        (["x"], "usage"),
    ):
        done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert text in done.stderr


def test_files_are_strict_c99(artifact: Artifact) -> None:
    sources = sorted(map(str, artifact.folder.glob("*.c")))
    for plain in ((), ("-DMODEL_PLAIN", "-DMODEL_TRACE")):
        subprocess.run(["cc", "-fsyntax-only", *STRICT, *plain, *sources], check=True)


def test_the_same_network_gives_the_same_bytes(artifact: Artifact, tmp_path: Path) -> None:
    again, _ = write(captured(network(), 1, 3, 9, 11), tmp_path / "c")
    assert {name: facts.sha256 for name, facts in again.manifest.files.items()} == {
        name: facts.sha256 for name, facts in artifact.manifest.files.items()
    }


def test_its_size_is_what_an_application_carries(artifact: Artifact, tmp_path: Path, monkeypatch: Any) -> None:
    weights_bytes = 4 * sum(parameter.numel() for parameter in network().parameters())
    found = engine().compiled_bytes(artifact)
    assert weights_bytes < found < 100_000
    sized = Artifact(artifact.folder, replace(artifact.manifest, compiled_bytes=found))
    assert sized.size_bytes == found < artifact.size_bytes == sized.files_bytes
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cc").symlink_to(shutil.which("cc") or "")
    monkeypatch.setenv("PATH", str(tools))
    assert engine().compiled_bytes(artifact) is None  # binutils' size is missing


def test_two_networks_live_in_one_program(artifact: Artifact, tmp_path: Path) -> None:
    other, _ = write(captured(network(), 1, 3, 5, 5), tmp_path / "c", prefix="Other net-2")
    (other.folder / "selftest.c").unlink()
    text = '#include "other/model.h"\nint main(void) { return OTHER_NET_2_ARENA_BYTES > 0 ? 0 : 1; }'
    shutil.copytree(other.folder, tmp_path / "other")
    (tmp_path / "main.c").write_text(text, encoding="utf-8")
    mine = [str(path) for path in sorted(artifact.folder.glob("*.c")) if path.name != "selftest.c"]
    theirs = sorted(map(str, (tmp_path / "other").glob("*.c")))
    words = ["cc", "-O0", "-o", str(tmp_path / "both"), str(tmp_path / "main.c"), *mine, *theirs, "-lm"]
    subprocess.run(words, check=True)  # a name that both have would be an error of the linker
    assert subprocess.run([tmp_path / "both"], check=False).returncode == 0


def test_nothing_is_allocated_and_only_the_library_of_c_is_read(artifact: Artifact) -> None:
    standard = {"math.h", "stddef.h", "stdint.h", "string.h", "float.h", "immintrin.h", "arm_neon.h"}
    for name, text in kernels().items():
        found = {line.split("<")[1].split(">")[0] for line in text.splitlines() if line.startswith("#include <")}
        assert found <= standard, name
        assert not {"malloc", "calloc", "realloc", "free"} & set(text.replace("(", " ").split()), name


@pytest.mark.parametrize("name, word", [("model", "model"), ("My Net-20", "my_net_20"), ("3x", "m_3x"), ("é", "m")])
def test_names_become_words_of_c(name: str, word: str) -> None:
    assert sanitized(name) == word


def test_the_example_fits_the_header_that_its_recipe_makes(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "c"
    item = Input("input", (1, 1, 8, 8))
    graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), Task((item,)))
    write(graph, tmp_path / "c", prefix=tomllib.loads((example / "edgepack.toml").read_text())["export"][0]["prefix"])
    words = ["cc", "-fsyntax-only", *STRICT, "-I", str(tmp_path / "c"), str(example / "main.c")]
    subprocess.run(words, check=True)


@pytest.mark.slow
def test_sanitizers_find_nothing(artifact: Artifact, tmp_path: Path) -> None:
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    for level in (0, 1, 2):
        program = build(artifact.folder, tmp_path / f"sane{level}", *flags, f"-DMODEL_LEVEL={level}")
        subprocess.run([program], check=True)


def test_a_missing_operator_ends_the_command_with_exit_7_and_its_name(edgepack: Any, tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(
        "from torch import nn\n\n\ndef network():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 3))\n"
    )
    recipe = '[model]\nmodule = "models.py:network"\n[task]\ninput = { shape = [1, 3, 8, 8] }\n[[export]]\nuse = "c"\n'
    (tmp_path / "edgepack.toml").write_text(recipe)
    status, _, error = edgepack("run", str(tmp_path / "edgepack.toml"))
    assert status == 7
    assert "the C target has no operator 'conv_transpose2d'" in error
