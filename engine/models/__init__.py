"""Mirrors the part of mlx_lm.models that callers use."""
