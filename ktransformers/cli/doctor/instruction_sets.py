"""Which instruction set of the C library runs here, and why no other: words for what the library detected."""

from ktransformers import native

EMULATED = "amx_emulated"


def best() -> str:
    """The widest instruction set that this machine runs."""
    return native.isas()[-1]


def missing() -> dict[str, str]:
    """Instruction sets of this kind of processor that do not run here -> why."""
    features, usable = native.cpu_features(), native.isas()
    arm = any(features.get(name) for name in ("asimddp", "i8mm")) or any(name.startswith("neon") for name in usable)
    found = {}
    for name, needs in native.isa_needs().items():
        if name in usable or name == EMULATED or name.startswith("neon") != arm:
            continue
        lacks = [feature for feature in needs if not features.get(feature)]
        found[name] = f"the processor lacks {', '.join(lacks)}" if lacks else NOT_COMPILED
    return found


NOT_COMPILED = "the C library was built without it: on another machine, or by a compiler that does not know it"
"""Why an instruction set is missing whose features are all there."""
