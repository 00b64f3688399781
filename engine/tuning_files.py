"""Tuning tables of devices that somebody has measured: a file per device in metalstep's cache folder."""
from __future__ import annotations

import re
import warnings
from pathlib import Path

from metalstep.cache_folder import cache_folder
from metalstep.kernels.gpu import linear_tables
from metalstep.kernels.gpu.linear_tuning import Tuning


def tuning_file(device: str) -> Path:
    """Where the table of a device lies that `metalstep tune` has made. device: the machine's own name of it (NativeDevice.info.name)."""
    return cache_folder() / "tuning" / ((re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "gpu") + ".json")


def tuning_of(device: str, kind: str) -> Tuning:
    """The table for a device: METALSTEP_TUNING's, else that of the device's file, else the packaged one. kind: of GPU, as tables name it.

    A file that is no table for such a GPU is ignored with a warning: it may be of another version. Raises: ValueError where
    METALSTEP_TUNING's is no table: who names one wants no other.
    """
    file = tuning_file(device)
    if linear_tables.named() is None:
        try:
            if file.exists():
                return _read(file, kind)
        except (OSError, ValueError) as error:
            told = str(error) if str(file) in str(error) else f"{file}: {error}"
            warnings.warn(f"{told}; it is ignored: make it again with `metalstep tune`, or delete it", stacklevel=2)
    return linear_tables.table(kind)


def _read(file: Path, kind: str) -> Tuning:
    tuning = linear_tables.read(file)
    if tuning.kind != kind:
        raise ValueError(f"it is a table for GPUs of kind {tuning.kind}, expected one for {kind}")
    return tuning
