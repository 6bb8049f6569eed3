"""Runtimes: how an artifact executes, one engine each."""
