"""Passes: module to module, one file each."""

from edgepack.rooms import make_callable

make_callable(__name__)
