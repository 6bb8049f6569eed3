"""Meters: joule counters, one source each."""
