"""Measurements: speed against peers in interleaved runs, launch times, quality against a float32 oracle."""
