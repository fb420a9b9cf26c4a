"""The table of families in models/README.md, made from the tables that the tests run over, so that it claims what they check.

`python -m tests.support` (`make support`) rewrites the section between two marks; a test fails when it is out of date.
Nothing is measured here.
"""

from pathlib import Path

from ktransformers.models import DEFAULT_RULES
from ktransformers.optimize_rules import NAMES

from ktransformers.loaders import gguf_names
from tests import families, multimodal

README = Path(__file__).resolve().parent.parent / "models" / "README.md"
BEGIN, END = "<!-- families: made by `make support` -->", "<!-- end of families -->"

LABELS = {
    "fp8_block": "FP8 in 128x128 blocks",
    "fp8_channel": "FP8 per channel",
    "int4_packed": "compressed-tensors INT4",
    "gptq4": "GPTQ INT4",
    "awq4": "AWQ INT4",
}
"""Format of tests/loaders/published.py -> words for it."""

OF_THEIR_OWN = {
    "deepseek_v4": ["FP8 in 128x128 blocks with MXFP4 experts"],
    "gpt_oss": ["MXFP4"],
    "qwen3_moe": ["every format of native/README.md"],
}
"""Families with tests of their own in test_published_checkpoints.py -> the formats checked there."""


def formats(model_type: str) -> str:
    """The checkpoint formats that a family is checked in."""
    found = ["F32, BF16, F16"]
    found += OF_THEIR_OWN.get(model_type, []) + [LABELS[form] for form in families.PUBLISHED.get(model_type, [])]
    if any(model_type in family.model_types for family in gguf_names.FAMILIES.values()):
        found.append("GGUF")
    return "; ".join(found)


def operator_of(model_type: str) -> str:
    """The inner operator that computes a family's experts."""
    return (families if model_type in families.FAMILIES else multimodal).operator_of(model_type)


def rows() -> dict[tuple[str, ...], list[str]]:
    """(checkpoint formats, rule file) -> the model types that they are the same for."""
    found: dict[tuple[str, ...], list[str]] = {}
    for model_type in families.FAMILIES | multimodal.FAMILIES | multimodal.BY_PART:
        name, operator = DEFAULT_RULES.get(model_type, "Default"), operator_of(model_type)
        rule = f"`{NAMES.get(name, name)}`" + ("" if operator == "KExpertsCPU" else f" with `{operator}`")
        found.setdefault((formats(model_type), rule), []).append(model_type)
    return dict(sorted(found.items(), key=lambda row: ("`Default`" in row[0][1], len(row[1]), row[1])))


NATIVE = {
    "the router": families.ROUTER_NOT_IN_C,
    "the block: router, routed and shared experts": families.BLOCK_NOT_IN_C,
    "attention, with its projections, norms, positions and cache": families.ATTENTION_NOT_NATIVE,
    "the whole decoder: all layers and the norm after them": families.DECODER_NOT_NATIVE,
}
"""What is one call to C on the CPU -> the families of the tests where it is not, and why."""


def native_parts() -> list[str]:
    """A table of what is one call to C, for how many families, and what keeps the others out."""
    known = families.known_here()
    lines = [
        f"One call to the C library each on the CPU, in how many of these {len(known)} families of language models; where a "
        "part is none, it alone keeps transformers' own code:",
        "",
        "| part | families | but for |",
        "|---|---|---|",
    ]
    for part, left_out in NATIVE.items():
        why: dict[str, list[str]] = {}
        for name, reason in left_out.items():
            why.setdefault(reason, []).append(f"`{name}`")
        reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items())
        lines.append(f"| {part} | {len(set(known) - left_out.keys())} | {reasons} |")
    only = ", ".join(f"`{name}`" for name in sorted(families.PROMPT_NOT_NATIVE))
    return [*lines, "", f"Of decoders with delta nets ({only}) it is one more token of each sequence that is one call."]


def section() -> str:
    """What stands between the marks, both included."""
    lines = [
        BEGIN,
        "",
        "| model types | checkpoints | rule file |",
        "|---|---|---|",
    ]
    for (checkpoints, rule), types in rows().items():
        lines.append(f"| {', '.join(f'`{name}`' for name in types)} | {checkpoints} | {rule} |")
    others = ", ".join(f"`{name}`" for name in multimodal.FAMILIES | multimodal.BY_PART)
    seen = ", ".join(f"`{name}`" for name in multimodal.IMAGES)
    lines += [
        "",
        f"Classes that take images or sounds too, with text in and text out (images: {seen}): {others}. Their language "
        "model is in a row above, or may be any that is.",
        "",
        *native_parts(),
        "",
        "Unsupported, or torch only:",
        "",
    ]
    refused = {
        **{name: f"{why}; use `KExpertsTorch`" for name, why in families.TORCH_ONLY.items()},
        **families.WITHOUT,
        **multimodal.WITHOUT,
        **families.ABSENT,
    }
    lines += [f"- `{name}`: {why}" for name, why in refused.items()]
    return "\n".join([*lines, "", END])


def rewritten(text: str) -> str:
    """The page's text with the section as it should be."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"{README}: found no section from {BEGIN!r} to {END!r}. Put both lines where it should stand.")
    return before + section() + after


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
