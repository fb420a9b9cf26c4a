"""Weight formats: GGUF's blocks (`blocks`), separate scales (`scaled`), encoding (`encode`). Torch only."""

from ktransformers.quants.blocks import BY_ID, QUANT_TYPES, Packed, QuantType, computed_types, dequantize, quant_type
from ktransformers.quants.scaled import ScaledType, ScaledWeight

__all__ = [
    "BY_ID",
    "QUANT_TYPES",
    "Packed",
    "QuantType",
    "ScaledType",
    "ScaledWeight",
    "computed_types",
    "dequantize",
    "quant_type",
]
