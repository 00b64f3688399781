"""Launches of the GPU devices (Metal, and what compiles the same text): one file per op, beside the .metal family it launches."""
