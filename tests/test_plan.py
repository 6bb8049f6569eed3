"""The plan: what it writes it reads again, in the same order each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepack.errors import InputError
from edgepack.plan import TENSORS, WORDS, Plan

NAMES = [f"layer{index}/weight_scale" for index in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {name: np.full(3, index, np.float32) for index, name in enumerate(NAMES)}
    Plan({"layer0": {"weight": {"bits": 4, "axis": 0}}}, tensors).save(tmp_path)
    return tmp_path


def test_reads_what_it_wrote_in_the_same_order_each_time(folder: Path) -> None:
    for _ in range(5):
        plan = Plan.load(folder)
        assert list(plan.tensors) == sorted(NAMES)
        assert plan.nodes == {"layer0": {"weight": {"bits": 4, "axis": 0}}}
        assert all((plan.tensors[name] == index).all() for index, name in enumerate(NAMES))


@pytest.mark.parametrize("name", [WORDS, TENSORS])
def test_damaged_files_are_refused(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="the plan cannot be read"):
        Plan.load(folder)
