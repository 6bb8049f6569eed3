"""Devices: where an artifact executes, one transport each."""
