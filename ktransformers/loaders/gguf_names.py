"""GGUF's names and layouts, family by family: what the gguf package's name map does not say.

The map turns `model.layers.3.self_attn.q_proj` into `blk.3.attn_q`. Exceptions are here, once, and are read by the
loader (bind_gguf.py) and by the writer (gguf_files/write.py). A new family is a row in FAMILIES; what its converter in
llama.cpp does to tensors on the way is a layout (gguf_layouts.py).
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache

from ktransformers.errors import UnsupportedError, WeightError, did_you_mean
from ktransformers.loaders import gguf_layouts as layouts
from ktransformers.loaders.gguf_layouts import Layout


@dataclass(frozen=True)
class Family:
    """One GGUF architecture. `model_types` are the transformers models whose weights such files hold.

    `layouts`: what a tensor looks like in the file, by a regular expression that finds its GGUF name; the first counts.
    `in_map`: how the gguf package's map spells the beginning of module names.
    `columns`: the model holds experts as [E, K, N], the file as [E, N, K]; `interleaved`: and gate and up rows in turn.
    """

    arch: str
    model_types: tuple[str, ...]
    layouts: dict[str, Layout | None] = field(default_factory=dict)
    in_map: str = "model."
    columns: bool = False
    interleaved: bool = False


_ROPE = {r"\.attn_q\.(weight|bias)$": layouts.ROPE_Q, r"\.attn_k\.(weight|bias)$": layouts.ROPE_K}
_SHIFTED_NORMS: dict[str, Layout | None] = {r"\.ssm_norm\.": None, r"norm\.weight$": layouts.PLUS_ONE}
_MAMBA2 = {r"\.ssm_a$": layouts.MINUS_EXP_COLUMN, r"\.ssm_d$": layouts.COLUMN, r"\.ssm_norm\.": layouts.GROUPS}

FAMILIES: dict[str, Family] = {
    family.arch: family
    for family in (
        Family("deepseek2", ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")),
        Family("glm-dsa", ("glm_moe_dsa",)),
        Family("glm4moe", ("glm4_moe",)),
        Family("qwen2moe", ("qwen2_moe",)),
        Family("qwen3moe", ("qwen3_moe",)),
        Family("qwen3next", ("qwen3_next",), {**_SHIFTED_NORMS, r"\.ssm_in\.": layouts.QKVZ}),
        Family(
            "qwen35moe",
            ("qwen3_5_moe_text",),
            {
                **_SHIFTED_NORMS,
                r"\.(attn_qkv|attn_gate|ssm_conv1d)\.": layouts.VALUES,
                r"\.(ssm_alpha|ssm_beta|ssm_dt)\.": layouts.VALUE_SCALARS,
                r"\.ssm_a$": layouts.VALUE_DECAYS,
                r"\.ssm_out\.": layouts.VALUE_COLUMNS,
            },
        ),
        Family("llama", ("mixtral",), _ROPE),
        Family("llama4", ("llama4_text",), columns=True),
        Family("phimoe", ("phimoe",)),
        Family("olmoe", ("olmoe",)),
        Family("granitemoe", ("granitemoe", "granitemoeshared"), _ROPE),
        Family("granitehybrid", ("granitemoehybrid",), {**_ROPE, **_MAMBA2}),
        Family("dots1", ("dots1",)),
        Family("ernie4_5-moe", ("ernie4_5_moe",)),
        Family("hunyuan-moe", ("hunyuan_v1_moe",)),
        Family("exaone-moe", ("exaone_moe",)),
        Family("afmoe", ("afmoe",)),
        Family("lfm2moe", ("lfm2_moe",)),
        Family("minimax-m2", ("minimax_m2",)),
        Family("mimo2", ("mimo_v2_flash",)),
        Family("gpt-oss", ("gpt_oss",), columns=True, interleaved=True),
        Family("kimi-linear", ("kimi_linear",)),
        Family("jamba", ("jamba",)),
        Family("nemotron_h_moe", ("nemotron_h",), _MAMBA2, in_map="backbone."),
    )
}

_LAYOUTS: dict[str, Layout] = {
    r"\.attn_kv_b\.": layouts.KV_B,
    r"\.ssm_a$": layouts.MINUS_EXP,
    r"\.ffn_gate_up_shexp\.": layouts.GATE_AND_UP_SHARED,
    r"\.ssm_conv1d_qkv\.": layouts.QKV_CONVOLUTIONS,
}
"""Layouts of any family that has none of its own."""

_BIASES: dict[bool, dict[str, Layout]] = {
    interleaved: {r"\.ffn_gate_up_exps\.bias$": how}
    for interleaved, how in ((False, layouts.EXPERT_BIASES), (True, layouts.EXPERT_BIASES_IN_TURN))
}

IGNORED = re.compile(r"(^|^blk\.\d+\.)rope_(freqs|factors_(long|short))\.weight$|\.attn_rot_embd(\.weight)?$")
"""Tensors about RoPE, which no module has: transformers computes frequencies from the config. What they scale is in the
config of a lone file (gguf_files/rope.py) and is checked against any other (bind_gguf.py); `attn_rot_embd`, of files of
2023, are the frequencies that `rope.freq_base` gives."""

_EXCEPTIONS = {
    r"(.+\.)?(e_score_correction_bias|expert_bias)": "exp_probs_b.bias",
    r"mlp\.shared_expert_gate\.weight": "ffn_gate_inp_shexp.weight",
    r"block_sparse_moe\.router\.weight": "ffn_gate_inp.weight",
    r"shared_mlp\.input_linear\.weight": "ffn_gate_up_shexp.weight",
    # Dense layers of families that are usually sparse throughout: the map knows them only for some.
    r"mlp\.(gate|up|down)_proj\.weight": r"ffn_\1.weight",
    r"self_attn\.sinks": "attn_sinks.weight",
    r".+\.dt_bias": "ssm_dt.bias",
    r".+\.A_log": "ssm_a",
    r".+\.D": "ssm_d",
    r"self_attn\.conv1d\.weight": "ssm_conv1d_qkv.weight",
    r"self_attn\.forget_gate\.f_(a|b)_proj\.weight": r"ssm_f_\1.weight",
}
"""Module names (after `model.layers.N.`) that the package's map lacks or gives another suffix. Where the name they get
is not GGUF's either, a layout splits the tensor into parts that have names."""

CHECKS = (
    ("embedding_length", ("hidden_size",)),
    ("attention.head_count", ("num_attention_heads",)),
    ("expert_count", ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")),
    ("expert_feed_forward_length", ("moe_intermediate_size",)),
    ("attention.kv_lora_rank", ("kv_lora_rank",)),
    ("attention.q_lora_rank", ("q_lora_rank",)),
)
"""Metadata keys (after the architecture) and the config attributes that must agree with them: they say how tensors are
shaped, or cut into heads and experts."""

_EPSILONS = ("rms_norm_eps", "norm_eps", "layernorm_epsilon", "layer_norm_epsilon")

CHOICES = (
    ("expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")),
    ("attention.layer_norm_rms_epsilon", _EPSILONS),
    ("attention.layer_norm_epsilon", _EPSILONS),
    ("rope.freq_base", ("rope_theta",)),
)
"""The same for what any weights can be computed with: the config's number counts, with a notice. `rope_theta` is that
of full attention where kinds of layers differ."""


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
    """GGUF's name for the model's tensor `name`, or None when it has none."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    for pattern, stored in _EXCEPTIONS.items() if layer else ():
        if found := re.fullmatch(pattern, layer[2]):
            return f"blk.{layer[1]}.{found.expand(stored)}"
    if name == "lm_head.weight":
        return "output.weight"
    if found := expert(name):  # their weights have several names, see expert_names; biases have one, or two in parts
        return f"blk.{found['layer']}.ffn_{found['which']}_exps.bias"
    base, _, suffix = name.rpartition(".")
    base = re.sub(r"^model\.", family.in_map, base)
    mapped = _name_map(family.arch, layers).get_name(base) if suffix in ("weight", "bias") else None
    return f"{mapped}.{suffix}" if mapped else None


def layout(family: Family, stored: str) -> Layout | None:
    """How a file of the family holds the tensor of that name; None for as it is."""
    known = (*family.layouts.items(), *_LAYOUTS.items(), *_BIASES[family.interleaved].items())
    return next((how for pattern, how in known if re.search(pattern, stored)), None)


def part_names(stored: str, how: Layout) -> list[str]:
    """The names of a layout's parts: of blk.3.attn_kv_b.weight, blk.3.attn_k_b.weight and blk.3.attn_v_b.weight."""
    return [re.sub(r"(?<=\.)[^.]+(?=\.\w+$)", part, stored) for part in how.parts] or [stored]


_EXPERT = re.compile(r"model\.layers\.(?P<layer>\d+)\.\w+\.experts\.(?P<which>gate_up|up|down)_proj(?P<bias>_bias)?")


def expert(name: str) -> re.Match | None:
    """Whether a tensor of the model is of routed experts: groups layer, which (gate_up, up, down), bias."""
    return _EXPERT.fullmatch(name)


def expert_names(layer: str, which: str, experts: int) -> list[str | tuple[str, ...]]:
    """The ways a file may hold `which` (gate, up, down) of a layer's routed experts: stacked, or one by one
    as Mixtral files of early 2024 do."""
    return [
        f"blk.{layer}.ffn_{which}_exps.weight",
        tuple(f"blk.{layer}.ffn_{which}.{e}.weight" for e in range(experts)),
    ]
