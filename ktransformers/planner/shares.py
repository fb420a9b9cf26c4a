"""What kernels reach of a machine's limits, by weight format: one table, measured once on one machine.

Of another machine, bandwidth and peaks are its own, measured or given; only these shares are assumed to hold there too.
"""

from dataclasses import dataclass

from ktransformers.planner.sizes import DENSE

MEASURED = "2026-11-28, `make bench`: 2 cores of an AMD EPYC (Zen 4, AVX-512 with VNNI and BF16), torch 2.13"
"""When, how and where."""


@dataclass(frozen=True)
class Share:
    """`read`: of the read bandwidth, for one token. `peak`: of the multiplier's peak, for many tokens per expert; None
    where only reading was measured. `measured`: False for an estimate from formats of the same kind."""

    read: float
    peak: float | None = None
    measured: bool = True


KERNELS = {
    "Q4_K": Share(0.93, 0.57),
    "Q6_K": Share(0.95, 0.58),
    "Q8_0": Share(0.90, 0.59),
    "Q4_0": Share(0.99, 0.62),
    "Q2_K": Share(0.71, 0.55),
    "IQ2_XXS": Share(0.63, 0.62),
    "IQ3_S": Share(0.70, 0.60),
    "MXFP4": Share(0.93, 0.59),
    "I4": Share(0.84, 0.59),
    "GPTQ4": Share(0.55, 0.48),
    "AWQ4": Share(0.75, 0.43),
    "F8_E4M3": Share(0.82, 0.70),
    "BF16": Share(0.80, 0.69),
    DENSE: Share(0.75, 0.70),
    "Q5_K": Share(0.90, measured=False),
    "Q3_K": Share(0.75, measured=False),
    "IQ2_XS": Share(0.45, measured=False),
    "IQ2_S": Share(0.45, measured=False),
    "IQ1_S": Share(0.35, measured=False),
    "IQ1_M": Share(0.30, measured=False),
    "IQ3_XXS": Share(0.65, measured=False),
    "IQ4_XS": Share(0.95, measured=False),
    "TQ1_0": Share(0.20, measured=False),
    "F4_E2M1": Share(0.90, measured=False),
    "GPTQ8": Share(0.54, measured=False),
    "I8": Share(0.90, measured=False),
    "F16": Share(0.80, 0.60, measured=False),
    "F32": Share(0.85, 0.60, measured=False),
}
"""A type of the C library, or DENSE for torch's own product -> its shares."""

OTHER = Share(0.70, 0.55, measured=False)
"""Of a type that is not in the table, and the peak of one whose products were not measured."""

FEW = 0.45
"""Of the multiplier's peak that a matrix with fewer than sixteen tokens reaches in the C library."""

TILES = {"int8": 0.058, "bf16": 0.21}
"""Of the peak of AMX's tile products, for many tokens: a panel is unpacked while none is multiplied, so the times of
reading and of multiplying add up. Measured 2026-11-30 on two cores of an Intel Xeon with AMX, Q4_K, Q8_0 and BF16."""
TILES_FROM = 5
"""Tokens of a matrix from which tiles are used."""


def read_share(type_: str) -> float:
    """Which share of the read bandwidth a matrix of this type is read with, for one token."""
    return KERNELS.get(type_, OTHER).read


def peak_share(type_: str) -> float:
    """Which share of the multiplier's peak a product with a matrix of this type reaches, for many tokens."""
    return KERNELS.get(type_, OTHER).peak or OTHER.peak
