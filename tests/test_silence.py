"""What compiled code writes past Python."""

from __future__ import annotations

import os
import sys

import pytest

from edgepack.silence import muted


def noisy(channel: int) -> None:
    with muted(channel):
        os.write(channel, b"noise")
        os.write(3 - channel, b"other")
        raise ValueError("passes")


@pytest.mark.parametrize("channel", [1, 2])
def test_a_channel_is_muted_and_speaks_again(channel: int, capfd: pytest.CaptureFixture[str]) -> None:
    stream = sys.stdout if channel == 1 else sys.stderr
    stream.write("held back until now, ")
    with pytest.raises(ValueError, match="passes"):
        noisy(channel)
    os.write(channel, b"after")
    found = capfd.readouterr()
    texts = {1: found.out, 2: found.err}
    assert texts == {channel: "held back until now, after", 3 - channel: "other"}
