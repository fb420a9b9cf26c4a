"""Which instruction set of the C library runs here, and why no other: words for what the library detected."""

from ktransformers import native
from ktransformers.env import ISAS

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_VNNI = (*_AVX512, "avx512_vnni")
_BF16 = (*_VNNI, "avx512_bf16")
NEEDS = {
    "portable": (),
    "avx2": _AVX2,
    "avx_vnni": (*_AVX2, "avx_vnni"),
    "amx_emulated": _AVX512,
    "avx512": _AVX512,
    "avx512_vnni": _VNNI,
    "avx512_vbmi": (*_VNNI, "avx512_vbmi", "gfni"),
    "avx512_bf16": _BF16,
    "amx": (*_BF16, "amx_tile", "amx_int8", "amx_bf16"),
    "neon_dotprod": ("asimddp",),
    "neon_i8mm": ("asimddp", "i8mm", "arm_bf16"),
}
"""Instruction set -> features of the processor it needs, as native/src/dispatch.c has them; a test holds the two to
each other."""

EMULATED = "amx_emulated"


def best() -> str:
    """The widest instruction set that this machine runs."""
    return native.isas()[-1]


def missing() -> dict[str, str]:
    """Instruction sets of this kind of processor that do not run here -> why."""
    features, usable = native.cpu_features(), native.isas()
    arm = any(features.get(name) for name in ("asimddp", "i8mm")) or any(name.startswith("neon") for name in usable)
    found = {}
    for name in ISAS:
        if name in usable or name == EMULATED or name.startswith("neon") != arm:
            continue
        lacks = [feature for feature in NEEDS[name] if not features.get(feature)]
        found[name] = f"the processor lacks {', '.join(lacks)}" if lacks else NOT_COMPILED
    return found


NOT_COMPILED = "the C library was built without it: on another machine, or by a compiler that does not know it"
"""Why an instruction set is missing whose features are all there."""
