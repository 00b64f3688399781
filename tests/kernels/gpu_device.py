"""The GPU that tests run on: the Mac's own, or simulated Metal. METALSTEP_TEST_GPU names another one, as `make test-cuda` does;
METALSTEP_TEST_KIND=nvidia takes a simulated one for one of NVIDIA's, as `make test-nvidia` does (tests/engine/nvidia_simulator.py)."""
import os
import sys

DEVICE = os.environ.get("METALSTEP_TEST_GPU") or ("metal" if sys.platform == "darwin" else "metal-sim")
KIND = os.environ.get("METALSTEP_TEST_KIND") or ("nvidia" if DEVICE.startswith("cuda") else "apple")  # as kernels/gpu calls it
SIMULATED = DEVICE == "metal-sim"
# Of a row's range of logits, against float32 with a float32 cache: float32 sums in another order and fast exponentials; on NVIDIA's
# GPUs the inputs of linears are float16 (docs/cuda.md).
LOGITS = {"apple": 5e-6, "nvidia": 4e-3}[KIND]
