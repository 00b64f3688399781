"""Apple's chips as `metalstep explain --chip` knows them: published figures alone. docs/launch-model.md has how they are used."""
from __future__ import annotations

from dataclasses import dataclass

LANES = 128  # float32 lanes of a GPU core (github.com/philipturner/metal-benchmarks, "ALUs", Apple 7 and 8)

# Where the figures below are from. Bandwidth and cores: Apple's specifications of the chip with the most GPU cores.
SPECIFICATIONS = "Apple's technical specifications (support.apple.com/specs) and newsroom"
CLOCKS = {
    1: "github.com/philipturner/metal-benchmarks: 1.278 GHz, 1.296 from Pro on",
    2: "github.com/philipturner/metal-benchmarks: 1.398 GHz",
    3: "hmc-tech.com, 40-core M3 Max: 1.398 GHz; the others alike",
    4: "hmc-tech.com, M4: 1.470 GHz in Macs with 10 cores; 1.578 GHz of its 8-core entry taken for Pro and Max (1.678 is listed too)",
    5: "hmc-tech.com, 10-core M5: 1.740 GHz; the others alike",
}


@dataclass(frozen=True)
class Chip:
    """name: as `--chip` takes it. bandwidth: of memory, GB/s. cores: of the GPU. clock: of the GPU, GHz."""

    name: str
    bandwidth: float
    cores: int
    clock: float

    @property
    def tflops(self) -> float:
        """Peak float32 TFLOP/s: one fused multiply-add per lane and cycle."""
        return self.cores * LANES * 2 * self.clock / 1e3

    @property
    def source(self) -> str:
        return f"bandwidth, cores: {SPECIFICATIONS}; clock: {CLOCKS[int(self.name[1])]}"


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("m1", 68.25, 8, 1.278),
        Chip("m1-pro", 200, 16, 1.296),
        Chip("m1-max", 400, 32, 1.296),
        Chip("m1-ultra", 800, 64, 1.296),
        Chip("m2", 100, 10, 1.398),
        Chip("m2-pro", 200, 19, 1.398),
        Chip("m2-max", 400, 38, 1.398),
        Chip("m2-ultra", 800, 76, 1.398),
        Chip("m3", 100, 10, 1.398),
        Chip("m3-pro", 150, 18, 1.398),
        Chip("m3-max", 400, 40, 1.398),
        Chip("m3-ultra", 819, 80, 1.398),
        Chip("m4", 120, 10, 1.470),
        Chip("m4-pro", 273, 20, 1.578),
        Chip("m4-max", 546, 40, 1.578),
        Chip("m5", 153, 10, 1.740),
        Chip("m5-pro", 307, 20, 1.740),
        Chip("m5-max", 614, 40, 1.740),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of this name, "M4 Max" and "m4-max" alike. Raises: ValueError listing those that are known."""
    key = "-".join(name.lower().removeprefix("apple").replace("-", " ").split())
    if key not in CHIPS:
        raise ValueError(f"chip is {name!r}, expected one of {', '.join(CHIPS)}; without a chip no time is predicted")
    return CHIPS[key]
