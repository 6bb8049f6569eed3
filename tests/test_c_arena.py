from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgepack.export._c_arena import ALIGNMENT, SLACK, lives, peak, plan, rounded
from edgepack.export._c_graph import Buffer, Network, Step, View


def view(buffer: Buffer) -> View:
    return View(buffer, (buffer.size,), (1,), (0,))


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Steps that each write a new value and read some that are there."""
    network, values = Network(), [Buffer("float32", 5, "x")]
    for number in range(draw(st.integers(1, 15))):
        sources = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
        made = Buffer(draw(st.sampled_from(["float32", "int8"])), draw(st.integers(1, 4000)))
        scratch = Buffer("int32", draw(st.integers(1, 500))) if draw(st.booleans()) else None
        step = Step("copy", f"s{number}", [view(source) for source in sources], view(made), scratch=scratch)
        network.steps.append(step)
        values.append(made)
    return network


@given(networks())
def test_values_that_live_at_the_same_time_never_meet(network: Network) -> None:
    size = plan(network)
    found = lives(network)
    assert all(buffer.offset % ALIGNMENT == 0 and buffer.offset + buffer.bytes + SLACK <= size for buffer in found)
    for one, life in found.items():
        for other, span in found.items():
            if one is not other and life.meets(span):
                assert one.offset + one.bytes <= other.offset or other.offset + other.bytes <= one.offset
    assert peak(network) <= size <= sum(rounded(buffer.bytes) for buffer in found) + SLACK


def test_memory_of_a_chain_is_used_again() -> None:
    network, last = Network(), Buffer("float32", 100, "x")
    for number in range(10):
        made = Buffer("float32", 100)
        network.steps.append(Step("copy", f"s{number}", [view(last)], view(made)))
        last = made
    assert plan(network) == 2 * rounded(400) + SLACK
    assert peak(network) == 800
