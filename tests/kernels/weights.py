"""Random weights for the kernels' tests. Not a test."""

import numpy as np

from ktransformers.kernels import words as w
from ktransformers.quants.blocks import QUANT_TYPES, Packed
from ktransformers.quants.scaled import ScaledWeight
from tests.native import blocks
from tests.native.scaled_blocks import KINDS, random_scaled

GGUF = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
SCALED = [name for name, kind in KINDS.items() if kind.type in w.TYPES]


def random_weight(name: str, rows: int = 24, cols: int = 512, seed: int = 0, nasty: bool = False) -> Packed | ScaledWeight:
    """A random matrix of a GGUF type, or of one of the published KINDS."""
    rng = np.random.default_rng(seed)
    if name in KINDS:
        return random_scaled(rng, name, rows, cols)
    made = blocks.random_weight(rng, name, rows, cols, nasty)
    return Packed(made.data, QUANT_TYPES[name], made.shape)
