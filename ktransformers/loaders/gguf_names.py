"""GGUF's names and layouts, family by family: what the gguf package's name map does not say.

The map turns `model.layers.3.self_attn.q_proj` into `blk.3.attn_q`. Exceptions stand here, once, and are read
by the loader (names.py) and by the writer (quantize.py). A new family is a row in FAMILIES; check against a
real file whether its q and k rows are permuted.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from ktransformers.errors import UnsupportedError, WeightError, did_you_mean


@dataclass(frozen=True)
class Family:
    """One GGUF architecture. `model_types` are the transformers models whose weights such files hold.

    `permuted`: q and k rows are stored for interleaved RoPE and must be put back (see sources.Unpermuted).
    """

    arch: str
    model_types: tuple[str, ...]
    permuted: bool = False


FAMILIES: dict[str, Family] = {
    family.arch: family
    for family in (
        Family("deepseek2", ("deepseek_v2", "deepseek_v3")),
        Family("qwen2moe", ("qwen2_moe",)),
        Family("qwen3moe", ("qwen3_moe",)),
        Family("llama", ("mixtral",), permuted=True),
    )
}

IGNORED = re.compile(
    r"^rope_freqs\.weight$|^rope_factors_(long|short)\.weight$|\.attn_rot_embd$|\.rope_freqs\.weight$"
)
"""Tensors that repeat what the config says about RoPE; transformers computes them itself."""

# Module names (after `model.layers.N.`) that the package's map lacks or gives another suffix.
_EXCEPTIONS = {
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    # Dense layers of families that are usually sparse throughout: the map knows them only for some.
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}

CHECKS = (
    ("embedding_length", ("hidden_size",)),
    ("attention.head_count", ("num_attention_heads",)),
    ("expert_count", ("n_routed_experts", "num_local_experts", "num_experts")),
    ("expert_used_count", ("num_experts_per_tok",)),
    ("expert_feed_forward_length", ("moe_intermediate_size",)),
    ("attention.kv_lora_rank", ("kv_lora_rank",)),
    ("attention.q_lora_rank", ("q_lora_rank",)),
)
"""Metadata keys (after the architecture) and the config attributes that must agree with them."""


def family_of(arch: object, model_type: str) -> Family:
    """The family of a file of architecture `arch`, checked to hold the weights of a `model_type` model.

    Raises UnsupportedError for an architecture or model not known, WeightError for a file of another model.
    """
    family = FAMILIES.get(arch) if isinstance(arch, str) else None
    expected = [f.arch for f in FAMILIES.values() if model_type in f.model_types]
    if family is None:
        raise UnsupportedError(
            f"GGUF architecture {arch!r} is not known to this version{did_you_mean(str(arch), FAMILIES)}. "
            f"Known: {', '.join(FAMILIES)}. Use the model's safetensors, or add the family to "
            "loaders/gguf_names.py."
        )
    if model_type not in family.model_types:
        if expected:
            raise WeightError(
                f"The GGUF file is of architecture {arch!r}, the model is {model_type!r}, whose files are of "
                f"architecture {expected[0]!r}. Take model and weights from the same source."
            )
        raise UnsupportedError(
            f"The GGUF names of {model_type!r} models are not known to this version (known: "
            f"{', '.join(t for f in FAMILIES.values() for t in f.model_types)}). Use the model's "
            "safetensors, or add the family to loaders/gguf_names.py."
        )
    return family


@lru_cache(maxsize=8)
def _name_map(arch: str, layers: int):
    import gguf  # costs 0.2 s, so only where a GGUF file is met

    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(by_name[arch], layers)


def gguf_name(family: Family, layers: int, name: str) -> str | None:
    """GGUF's name for the model's tensor `name`, or None when there is no one tensor for it."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if layer and layer[2] in _EXCEPTIONS:
        return f"blk.{layer[1]}.{_EXCEPTIONS[layer[2]]}"
    base, _, suffix = name.rpartition(".")
    mapped = _name_map(family.arch, layers).get_name(base) if suffix in ("weight", "bias") else None
    return f"{mapped}.{suffix}" if mapped else None


def expert_names(layer: str, which: str, experts: int) -> list[str | tuple[str, ...]]:
    """The ways a file may hold `which` (gate, up, down) of a layer's routed experts: stacked, or one by one
    as Mixtral files of early 2024 do."""
    return [
        f"blk.{layer}.ffn_{which}_exps.weight",
        tuple(f"blk.{layer}.ffn_{which}.{e}.weight" for e in range(experts)),
    ]
