"""Packagers: artifact to something an app can include, one platform each."""

from edgepack.rooms import make_callable

make_callable(__name__)
