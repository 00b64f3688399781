"""What options may say, apart from what computes with it: the command line's help and completion import this and no MLX."""
from __future__ import annotations

import sys

DEVICES = ("host", "metal", "metal-sim", "eager")
DEFAULT_DEVICE = "metal" if sys.platform == "darwin" else "host"
ARITHMETIC = ("int16", "int8")  # of quantised weights on the host device: kernels/linear.py has what each is
KV_DTYPES = ("float16", "bfloat16", "float32")  # of the KV cache where it is not encoded
PREFILL_ROWS = 512  # rows of a step
MAX_SEQS = 64  # sequences that run at once
MAX_STEPS = 32  # decode steps of one native call
PEERS = ("mlx-lm", "llama.cpp")  # that benchmarks compare with
