"""Prints the instruction sets that METALSTEP_CPU can choose on this machine, besides the one that is chosen by itself."""

import os
import subprocess
import sys

PROBE = "from metalstep.kernels.native import NativeDevice as D; d = D.open('host', 1); print(d.info.isa); d.close()"


def chosen(isa: str | None) -> str | None:
    """What the host device runs when METALSTEP_CPU asks for `isa`; None when it refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "METALSTEP_CPU"}
    if isa is not None:
        environment["METALSTEP_CPU"] = isa
    run = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    return run.stdout.split()[-1] if run.returncode == 0 else None


if __name__ == "__main__":
    default = chosen(None)
    if default is None:
        sys.exit("no host device: the kernels' tests cannot run (make build)")
    print(*(isa for isa in ("avx512", "avx2", "neon", "portable") if isa != default and chosen(isa) == isa))
