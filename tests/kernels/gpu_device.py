"""The GPU that tests run on: the Mac's own, or simulated Metal. METALSTEP_TEST_GPU names another one, as `make test-cuda` does."""
import os
import sys

DEVICE = os.environ.get("METALSTEP_TEST_GPU") or ("metal" if sys.platform == "darwin" else "metal-sim")
KIND = "nvidia" if DEVICE.startswith("cuda") else "apple"  # as kernels/gpu calls it
