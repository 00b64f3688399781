"""Tuning tables of devices that somebody has measured: a file per device in metalstep's cache folder."""
from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from metalstep.cache_folder import cache_folder
from metalstep.kernels.gpu import linear_tuning


def tuning_file(device: str) -> Path:
    """Where the table of a device lies that `metalstep tune` has made. device: the machine's own name of it (NativeDevice.info.name)."""
    return cache_folder() / "tuning" / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def use_tuning(device: str) -> Path | None:
    """From now on the table of the device's file, if there is one and METALSTEP_TUNING names no other. Returns the file.

    A file that is no table is left alone with a warning: it may be of another version.
    """
    file = tuning_file(device)
    if os.environ.get("METALSTEP_TUNING") or not file.is_file():
        return None
    try:
        linear_tuning.use(linear_tuning.load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} is not used ({error}); make it again with `metalstep tune`, or delete it", stacklevel=2)
        return None
    return file
