"""Tuning tables of devices that somebody has measured: a file per device in metalstep's cache folder."""
from __future__ import annotations

import re
import warnings
from pathlib import Path

from metalstep.cache_folder import cache_folder
from metalstep.kernels.gpu import linear_tuning


def tuning_file(device: str) -> Path:
    """Where the table of a device lies that `metalstep tune` has made. device: the machine's own name of it (NativeDevice.info.name)."""
    return cache_folder() / "tuning" / ((re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "gpu") + ".json")


def use_tuning(device: str) -> Path | None:
    """From now on the table of the device's file, if there is one and METALSTEP_TUNING names no other. Returns the file.

    A file that is no table is ignored with a warning: it may be of another version. Raises: ValueError where METALSTEP_TUNING's is none:
    who names a table wants no other.
    """
    if linear_tuning.check_named() is not None:
        return None
    file = tuning_file(device)
    try:
        if not file.exists():
            return None
        linear_tuning.use(linear_tuning.read(file))
    except (OSError, ValueError) as error:
        told = str(error) if str(file) in str(error) else f"{file}: {error}"
        warnings.warn(f"{told}; it is ignored: make it again with `metalstep tune`, or delete it", stacklevel=2)
        return None
    return file
