"""Packagers: artifact to something an app can include, one platform each."""
