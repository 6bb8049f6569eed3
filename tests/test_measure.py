"""The timing loop in virtual time, on noise like that of a shared machine: two states, slower by another factor per
arm, an offset per engine instance. Nothing here waits for a real clock."""

from __future__ import annotations

import gc
from functools import partial

import numpy as np
import pytest

from _world import MIXED, World
from edgepack.contracts import Settings
from edgepack.devices import _measure
from edgepack.devices._measure import LEAST_BLOCKS, Timing, Tools, interleave, ratio
from edgepack.measurement import Ratio

SHORT = Settings(max_seconds=20.0)
HEAVY = (0.2, 0.5)
QUIET = (1.0, 0.0)


def compare(
    seed: int,
    times_s: tuple[float, float] = (1e-3, 1e-3),
    slow: tuple[float, float] = (1.26, 1.63),
    dwell_s: tuple[float, float] = MIXED,
    settings: Settings = SHORT,
) -> tuple[Timing, Ratio]:
    world = World(seed, dwell_s)
    arms = [world.arm(seconds, factor) for seconds, factor in zip(times_s, slow, strict=True)]
    timing = interleave(arms, settings, tools=world.tools())
    return timing, ratio(timing, 1, "first", settings)


MACHINES = [  # seconds of fast and slow spells, slow-down of either arm
    (QUIET, (1.0, 1.0)),
    (MIXED, (1.26, 1.26)),
    (MIXED, (1.26, 1.63)),
    (MIXED, (1.63, 1.26)),
    (HEAVY, (1.26, 1.63)),
]


@pytest.mark.parametrize("dwell_s, slow", MACHINES)
def test_a_model_against_itself_is_rarely_different(dwell_s: tuple[float, float], slow: tuple[float, float]) -> None:
    words = [compare(seed, (5e-3, 5e-3), slow, dwell_s)[1].verdict for seed in range(50)]
    assert sum(word in ("faster", "slower") for word in words) <= 0.02 * len(words), words
    assert words.count("same") >= 0.8 * len(words), words


@pytest.mark.parametrize("dwell_s, slow", MACHINES)
def test_ten_per_cent_slower_is_found(dwell_s: tuple[float, float], slow: tuple[float, float]) -> None:
    words = [compare(seed, (5e-3, 5.5e-3), slow, dwell_s)[1].verdict for seed in range(50)]
    assert words.count("slower") >= 0.95 * len(words), words


def test_ratio_is_that_of_the_undisturbed_machine() -> None:
    timing, result = compare(3, times_s=(1e-3, 0.855e-3), dwell_s=(0.3, 0.9))
    assert result.value == pytest.approx(0.855, rel=0.02)
    assert result.typical > 1.0
    assert _measure.contention_sensitive(result, 0.03)
    assert timing.state == "contended"
    assert timing.slow_share > 0.3


def test_quiet_machine_settles_and_both_ratios_agree() -> None:
    timing, result = compare(0, times_s=(1e-3, 1.2e-3), dwell_s=QUIET)
    assert timing.state == "settled"
    assert timing.steady
    assert timing.slow_share < 0.02
    assert timing.rounds >= LEAST_BLOCKS
    assert result.low < 1.2 < result.high
    assert result.verdict == "slower"
    assert not _measure.contention_sensitive(result, 0.03)


def test_a_slow_model_gets_single_runs_and_no_lead_in() -> None:
    timing, result = compare(0, times_s=(0.1, 0.1), dwell_s=QUIET, settings=Settings())
    assert timing.runs_per_block == (1, 1)
    assert not timing.lead_in
    assert timing.rounds >= LEAST_BLOCKS
    assert result.verdict == "same"


def test_when_time_runs_out_there_is_no_verdict() -> None:
    timing, result = compare(0, times_s=(0.1, 0.3), dwell_s=QUIET, settings=Settings(max_seconds=8.0))
    assert timing.rounds < LEAST_BLOCKS
    assert timing.state == "not reached"
    assert result.verdict == "cannot tell"


def test_one_round_is_always_finished() -> None:
    timing, _ = compare(0, times_s=(5.0, 5.0), dwell_s=QUIET, settings=Settings(max_seconds=1.0))
    assert timing.rounds == 1


def test_time_is_kept() -> None:
    timing, _ = compare(1, settings=Settings(max_seconds=6.0, half_width=1e-9))
    assert timing.state != "settled"
    assert 5.9 < timing.warm_up_s + timing.seconds < 6.6


def test_block_lengths() -> None:
    def runs(times_s: tuple[float, float], settings: Settings) -> tuple[int, ...]:
        return compare(0, times_s=times_s, dwell_s=QUIET, settings=settings)[0].runs_per_block

    assert runs((1e-3, 1.3e-3), Settings()) == (10, 10)
    assert runs((1e-3, 9e-3), Settings()) == (10, 1)
    assert runs((1e-4, 1e-4), Settings(max_seconds=1.6)) == (20, 20)


def test_one_arm_alone() -> None:
    world = World(0, QUIET)
    timing = interleave([world.arm(1e-3, 1.0)], SHORT, tools=world.tools())
    assert timing.state == "settled"
    assert timing.medians_s[0].shape == (5, timing.rounds)
    assert timing.runs_s[0].size == 5 * timing.rounds * timing.runs_per_block[0]
    alone = interleave([world.arm(1e-3, 1.0, instances=1)], SHORT, tools=world.tools())
    assert alone.state == "settled"


def test_three_arms_are_all_against_the_first() -> None:
    world = World(5, MIXED)
    arms = [world.arm(1e-3, 1.3), world.arm(0.8e-3, 1.3), world.arm(1.25e-3, 1.3)]
    timing = interleave(arms, Settings(), tools=world.tools())
    assert [ratio(timing, arm, "a", SHORT).verdict for arm in (0, 1, 2)] == ["same", "faster", "slower"]
    assert timing.canary_s.shape == (15, timing.rounds)


def test_warm_up_waits_until_times_settle() -> None:
    world = World(0, QUIET)

    def cooling() -> None:
        world.spend(1e-3 * (1 + 3 * np.exp(-world.now / 0.3)), 1.0)

    timing = interleave([[cooling] * 5], Settings(), tools=world.tools())
    assert timing.steady
    assert timing.warm_up_s > 0.9
    assert np.median(timing.runs_s[0]) == pytest.approx(1e-3, rel=0.1)


def test_warm_up_gives_up_in_time() -> None:
    world = World(0, QUIET)
    slowing = [partial(world.spend, 1e-3, 1.0) for _ in range(5)]

    def erratic() -> None:
        world.spend(1e-3 * world.random.uniform(1, 9), 1.0)

    timing = interleave([slowing, [erratic] * 5], Settings(max_seconds=4.0), tools=world.tools())
    assert not timing.steady
    assert timing.warm_up_s < 1.0


def test_order_is_random_but_repeatable() -> None:
    def sequence(seed: int) -> list[int]:
        world, seen = World(0, QUIET), []

        def call(index: int) -> None:
            seen.append(index)
            world.spend(0.05, 1.0)

        interleave([[partial(call, 0)], [partial(call, 1)]], Settings(seed=seed, max_seconds=2), tools=world.tools())
        return seen

    assert sequence(1) == sequence(1)
    assert sequence(1) != sequence(2)


def test_progress_rises_to_the_end() -> None:
    world, seen = World(0, QUIET), []  # type: ignore[var-annotated]
    interleave([world.arm(1e-3, 1.0)], Settings(max_seconds=3, half_width=1e-9), seen.append, world.tools())
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_garbage_collector_is_given_back() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        interleave([[fail]], SHORT)
    assert gc.isenabled()


def test_real_canary_is_short_and_pure() -> None:
    canary = _measure.matmul_canary()
    assert canary() is None
    assert Tools().clock() <= Tools().clock()
