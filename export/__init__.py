"""Exporters: captured graph to model files, one format each."""

from edgepack.rooms import make_callable

make_callable(__name__)
