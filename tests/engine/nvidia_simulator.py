"""Simulated Metal taken for a GPU of NVIDIA's: what is loaded on it has plans as for one, in memory that the host does not see. NVIDIA's
compiler, driver and library of products are not in it."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gpu_device import DEVICE
from split_memory import split_devices

from metalstep import model
from metalstep.plan.gpu_target import GpuTarget
from metalstep.plan.target import Target


@pytest.fixture(scope="session", autouse=True)
def nvidia_simulator() -> Iterator[None]:
    make_target = model.make_target

    def make(device: str, **options: Any) -> Target | None:
        made = make_target(device, **options)
        return GpuTarget("nvidia", batch_invariant=options["batch_invariant"], library=True) if device == DEVICE else made

    with pytest.MonkeyPatch.context() as patch, split_devices():
        patch.setattr(model, "make_target", make)
        yield
