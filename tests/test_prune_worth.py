"""What a channel is worth, by each criterion of prune."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="pip install 'edgepack[compress]'")
pytest.importorskip("torch_pruning", reason="pip install 'edgepack[prune]'")
from torch import nn  # noqa: E402

from _pruning import ITEM, TASK, Residual, data, groups_of, net, prune, rows  # noqa: E402
from edgepack.compress._cutting import mask  # noqa: E402
from edgepack.compress._worth import magnitudes, scales, taylor  # noqa: E402
from edgepack.compressing import PassRun  # noqa: E402
from edgepack.plan import Plan  # noqa: E402
from edgepack.progress import Silent  # noqa: E402
from edgepack.task import Task  # noqa: E402


def test_a_removed_unit_is_worth_less_than_one_of_its_group_that_stays(tmp_path: Path) -> None:
    _, run = prune(net(), tmp_path, TASK, macs_ratio=0.6)
    for row in rows(run).values():
        if row["gone"]:
            assert row["criterion"]["gone"]["most"] <= row["criterion"]["kept"]["least"]


def test_magnitudes_are_those_of_all_slices() -> None:
    module = net()
    assert isinstance(module, Residual)
    groups = {group.name: group for group in groups_of(module)}
    for power, found in ((1, magnitudes(module, [groups["wide"]], 1)), (2, magnitudes(module, [groups["wide"]], 2))):
        parts = [module.wide.weight.flatten(1), module.deep.weight.flatten(1), module.thin.weight[:, :, 0, 0].T]
        wanted = torch.cat(parts, 1).norm(power, dim=1).detach()
        assert torch.allclose(found[0], wanted / wanted.mean(), rtol=1e-5)


def test_scales_are_those_of_batch_norms(tmp_path: Path) -> None:
    module = net()
    assert isinstance(module, Residual)
    groups = {group.name: group for group in groups_of(module)}
    found = scales(module, [groups["stem"], groups["wide"]])
    assert found[0] is not None
    assert torch.equal(found[0], module.norm.weight.detach().abs())
    assert found[1] is None
    _, run = prune(module, tmp_path, TASK, criterion="bn-scale", macs_ratio=0.95)
    assert run.findings["channels"]["left"]["wide"] == "no batch norm follows it"
    gone = set(rows(run)["stem"]["gone"])
    assert gone == set(module.norm.weight.detach().abs().argsort()[: len(gone)].tolist())


def test_taylor_expects_what_a_factor_changes() -> None:
    """Of an output that is linear in the factors, the first order is exact: the square of what removal changes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 12)).eval()
    task = Task((ITEM,), calibration=data(2048))
    run = PassRun(Path(), 0, Plan(), Silent(), module, task)
    (group,) = groups_of(module)
    found = taylor(module, [group], task, run, 2048)[0]
    wanted = []
    x = torch.from_numpy(next(iter(task.calibration.batches(2048))).inputs["x"])  # type: ignore[union-attr]
    with torch.no_grad():
        for unit in range(16):
            changed = module(x) - mask(copy.deepcopy(module), group.cut([unit]))(x)
            wanted.append(float((changed**2).sum(1).mean()))  # type: ignore[operator]
    assert torch.allclose(found, torch.tensor(wanted), rtol=0.6)  # 64 draws of signs
    assert abs(float(found.sum()) / sum(wanted) - 1) < 0.15
    assert all(value.grad is None for value in module.parameters())


def test_data_make_taylor_the_criterion_and_their_absence_magnitude(tmp_path: Path) -> None:
    assert prune(net(), tmp_path, Task((ITEM,), calibration=data()))[1].findings["channels"]["criterion"] == "taylor"
    assert prune(net(), tmp_path, TASK)[1].findings["channels"]["criterion"] == "l2"
