"""GGUF keys of an architecture that are more than one field of its config: how to write them and how to read them.

Keys that are one field stand in config.py. An architecture without a reader can be written and its weights can be
loaded, but a file of it does not say enough to build the config.
"""

import struct
from collections.abc import Callable
from typing import Any

_SOFTMAX, _SIGMOID = 1, 2  # gguf.ExpertGatingFuncType

Metadata = Any
"""What a reader asks: config.Metadata, which is made by the file that imports this one."""

Writer = Callable[[Any], dict[str, Any]]
Reader = Callable[[Metadata], tuple[str, dict[str, Any]]]


def rope_of(config) -> dict:
    """The RoPE settings, those of full attention where kinds of layers differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def as_float(value) -> float | None:
    return None if value is None else float(value)


def shortest(value: float) -> float:
    """The decimal that a float32 of the file was made from: 1e-06, not 9.999999974752427e-07."""
    return next(short for digits in range(6, 18) if _float32(short := float(f"{value:.{digits}g}")) == _float32(value))


def _float32(value: float) -> bytes:
    return struct.pack("<f", value) if abs(value) < 3e38 else struct.pack("<d", value)


def _mla(config) -> dict[str, Any]:
    """MLA is described as llama.cpp computes it, absorbed: one key-value head of the latent's size."""
    latent = config.kv_lora_rank
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": latent + config.qk_rope_head_dim,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
    }


def _write_deepseek2(config) -> dict[str, Any]:
    rope = rope_of(config)
    sigmoid = config.model_type != "deepseek_v2"
    # A greedy deepseek_v2 has groups in its config and does not use them; llama.cpp would.
    grouped = sigmoid or config.topk_method != "greedy"
    return {
        **_mla(config),
        # A tenth of the config's number is what llama.cpp's own converter writes for this family.
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"] if "mscale_all_dim" in rope else None,
        "expert_shared_count": config.n_shared_experts or 0,
        "expert_weights_norm": bool(config.norm_topk_prob) if sigmoid else False,
        "expert_gating_func": _SIGMOID if sigmoid else _SOFTMAX,
        "expert_group_count": config.n_group if grouped else None,
        "expert_group_used_count": config.topk_group if grouped else None,
    }


def _read_mla(read: Metadata) -> dict[str, Any]:
    turned, rope = read("rope.dimension_count"), read.rope(None)
    if (multiplier := read("rope.scaling.yarn_log_multiplier", None)) is not None:
        scale = shortest(multiplier * 10)
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    return {
        "num_key_value_heads": read("attention.head_count"),
        "q_lora_rank": read("attention.q_lora_rank", None),
        "qk_rope_head_dim": turned,
        "head_dim": turned,  # what transformers' rotary embedding reads
        "qk_nope_head_dim": (read("attention.key_length_mla", None) or read("attention.key_length")) - turned,
        "v_head_dim": read("attention.value_length_mla", None) or read("attention.value_length"),
        "rope_parameters": rope,
    }


def _read_deepseek2(read: Metadata) -> tuple[str, dict[str, Any]]:
    sigmoid, found = read("expert_gating_func", _SOFTMAX) == _SIGMOID, _read_mla(read)
    if not sigmoid:
        grouped = read("expert_group_count", 0) > 1
        found["topk_method"] = "group_limited_greedy" if grouped else "greedy"
    return "deepseek_v3" if sigmoid else "deepseek_v2", found


def _read_qwen2moe(read: Metadata) -> tuple[str, dict[str, Any]]:
    norm = read("expert_weights_norm", False)
    return "qwen2_moe", {"mlp_only_layers": read.dense_layers(), "qkv_bias": read.has(r"\.attn_q\.bias$"),
                         "norm_topk_prob": norm}  # fmt: skip


def _read_qwen3moe(read: Metadata) -> tuple[str, dict[str, Any]]:
    # llama.cpp normalizes whatever the file says, and its converter does not say it.
    return "qwen3_moe", {"mlp_only_layers": read.dense_layers(), "norm_topk_prob": read("expert_weights_norm", True)}


def _read_glm4moe(read: Metadata) -> tuple[str, dict[str, Any]]:
    return "glm4_moe", {"use_qk_norm": read.has(r"\.attn_q_norm\.")}


def _read_gpt_oss(read: Metadata) -> tuple[str, dict[str, Any]]:
    rope = read.rope(None) | {"truncate": False}  # the family's YaRN has no whole-numbered borders
    return "gpt_oss", {"intermediate_size": read("expert_feed_forward_length"), "rope_parameters": rope}


def _read_minimax_m2(read: Metadata) -> tuple[str, dict[str, Any]]:
    return "minimax_m2", {"intermediate_size": read("expert_feed_forward_length")}


def _write_moe_width(config) -> dict[str, Any]:
    return {"expert_feed_forward_length": config.intermediate_size}


def _read_next(model_type: str) -> Reader:
    def read_next(read: Metadata) -> tuple[str, dict[str, Any]]:
        values = read("ssm.inner_size") // max(read("ssm.time_step_rank"), 1)
        # What the newer of the two always does, the older says in its config; llama.cpp does it for both.
        stated = {"mlp_only_layers": read.dense_layers(), "norm_topk_prob": read("expert_weights_norm", True)}
        return model_type, {"linear_value_head_dim": values, **(stated if model_type == "qwen3_next" else {})}

    return read_next


def _read_granite(read: Metadata) -> tuple[str, dict[str, Any]]:
    return "granitemoeshared" if read.has(r"\.ffn_gate_shexp\.") else "granitemoe", {}


def _read_ernie(read: Metadata) -> tuple[str, dict[str, Any]]:
    return "ernie4_5_moe", {"moe_layer_interval": read("interleave_moe_layer_step", 1),
                            "use_bias": read.has(r"\.attn_q\.bias$")}  # fmt: skip


def _read_exaone(read: Metadata) -> tuple[str, dict[str, Any]]:
    kinds = ("full_attention", "sliding_attention")
    dense = read("leading_dense_block_count", 0)
    layers = [kinds[bool(slides)] for slides in read.layers("attention.sliding_window_pattern")]
    return "exaone_moe", {"layer_types": layers, "mlp_layer_types": None, "first_k_dense_replace": dense}


def _read_lfm2(read: Metadata) -> tuple[str, dict[str, Any]]:
    heads = read.layers("attention.head_count_kv")
    kinds = ["full_attention" if count else "conv" for count in heads]
    return "lfm2_moe", {"layer_types": kinds, "num_key_value_heads": max(heads), "norm_topk_prob": True,
                        "use_expert_bias": read.has(r"\.exp_probs_b\.")}  # fmt: skip


def _mlp_kinds(read: Metadata) -> list[str]:
    dense = set(read.dense_layers())
    return ["dense" if n in dense else "sparse" for n in range(read("block_count") - read("nextn_predict_layers", 0))]


def _read_glm_dsa(read: Metadata) -> tuple[str, dict[str, Any]]:
    kinds = _mlp_kinds(read)
    full = read.layers("attention.indexer.types") if read.says("attention.indexer.types") else [1] * len(kinds)
    return "glm_moe_dsa", _read_mla(read) | {
        "index_n_heads": read("attention.indexer.head_count"),
        "index_head_dim": read("attention.indexer.key_length"),
        "index_topk": read("attention.indexer.top_k"),
        "indexer_types": ["full" if one else "shared" for one in full],
        "mlp_layer_types": kinds,
    }


def _read_afmoe(read: Metadata) -> tuple[str, dict[str, Any]]:
    return "afmoe", {"mup_enabled": True}  # as llama.cpp computes it, whatever the file says


def _read_kimi(read: Metadata) -> tuple[str, dict[str, Any]]:
    heads = read.layers("attention.head_count_kv")
    return "kimi_linear", _read_mla(read) | {
        "layer_types": ["full_attention" if count else "linear_attention" for count in heads],
        "mlp_layer_types": _mlp_kinds(read),
        "linear_head_dim": read("kda.head_dim"),
        "linear_num_heads": read("attention.head_count"),
        "moe_renormalize": read("expert_weights_norm", True),
    }


def _read_mimo2(read: Metadata) -> tuple[str, dict[str, Any]]:
    kinds = ("full_attention", "sliding_attention")
    rope = read.rope(read("attention.key_length"))
    slides = {"rope_theta": read("rope.freq_base_swa", rope["rope_theta"])}
    return "mimo_v2_flash", {
        "layer_types": [kinds[bool(one)] for one in read.layers("attention.sliding_window_pattern")],
        "mlp_layer_types": _mlp_kinds(read),
        "num_key_value_heads": min(read.layers("attention.head_count_kv")),
        "v_head_dim": read("attention.value_length"),
        "sliding_window": read("attention.sliding_window") + 1,
        "attention_value_scale": read("attention.value_scale", 1.0),
        "norm_topk_prob": True,
        "rope_parameters": dict(zip(kinds, (rope, rope | slides), strict=True)),
    }


def _every(layers: list[int], count: int) -> dict[str, int]:
    """Layers at equal distances, as (period, offset)."""
    period = layers[1] - layers[0] if len(layers) > 1 else count
    return {"period": period, "offset": layers[0] if layers else count}


def _read_jamba(read: Metadata) -> tuple[str, dict[str, Any]]:
    heads, kinds = read.layers("attention.head_count_kv"), _mlp_kinds(read)
    attention = _every([n for n, count in enumerate(heads) if count], len(heads))
    experts = _every([n for n, kind in enumerate(kinds) if kind == "sparse"], len(heads))
    return "jamba", {
        "num_key_value_heads": max(heads),
        **{f"attn_layer_{key}": value for key, value in attention.items()},
        **{f"expert_layer_{key}": value for key, value in experts.items()},
        "mamba_d_conv": read("ssm.conv_kernel"),
        "mamba_d_state": read("ssm.state_size"),
        "mamba_expand": read("ssm.inner_size") // read("embedding_length"),
        "mamba_dt_rank": read("ssm.time_step_rank"),
    }


def _read_granite_hybrid(read: Metadata) -> tuple[str, dict[str, Any]]:
    heads = read.layers("attention.head_count_kv")
    return "granitemoehybrid", {
        "num_key_value_heads": max(heads),
        "layer_types": ["attention" if count else "mamba" for count in heads],
        "mamba_d_conv": read("ssm.conv_kernel"),
        "mamba_d_state": read("ssm.state_size"),
        "mamba_n_groups": read("ssm.group_count"),
        "mamba_n_heads": read("ssm.time_step_rank"),
        "mamba_d_head": read("ssm.inner_size") // max(read("ssm.time_step_rank"), 1),
        "mamba_expand": read("ssm.inner_size") // read("embedding_length"),
        "position_embedding_type": "rope" if read("rope.scaling.finetuned", True) else "nope",
    }


def _read_plain(model_type: str) -> Reader:
    return lambda read: (model_type, {})


def _write_sigmoid(config) -> dict[str, Any]:
    return {"expert_gating_func": _SIGMOID}


def _sliding(config) -> list[bool]:
    return [kind == "sliding_attention" for kind in config.layer_types]


def _kv_heads(kinds: list[str], config) -> list[int]:
    """Key-value heads of each layer; none where the layer is no attention."""
    return [config.num_key_value_heads if "attention" in k and "linear" not in k else 0 for k in kinds]


def _write_glm_dsa(config) -> dict[str, Any]:
    full = [kind == "full" for kind in config.indexer_types or []]
    return _write_deepseek2(config) | {
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
        "attention.indexer.types": None if all(full) else full,
    }


def _write_llama4(config) -> dict[str, Any]:
    return {"expert_feed_forward_length": config.intermediate_size,
            "interleave_moe_layer_step": config.interleave_moe_layer_step}  # fmt: skip


def _write_qwen35(config) -> dict[str, Any]:
    sections = [*rope_of(config).get("mrope_section", [11, 11, 10]), 0, 0, 0, 0]
    return {"rope.dimension_sections": sections[:4]}


def _write_ernie(config) -> dict[str, Any]:
    shared = config.moe_intermediate_size * (config.moe_num_shared_experts or 0)
    return {"interleave_moe_layer_step": getattr(config, "moe_layer_interval", None) or 1,
            "expert_shared_feed_forward_length": shared}  # fmt: skip


def _write_hunyuan(config) -> dict[str, Any]:
    used = config.moe_topk if isinstance(config.moe_topk, int) else config.moe_topk[0]
    return {"expert_feed_forward_length": config.intermediate_size, "expert_used_count": used,
            "expert_shared_feed_forward_length": config.intermediate_size, "expert_shared_count": 1}  # fmt: skip


def _write_exaone(config) -> dict[str, Any]:
    shared = config.moe_intermediate_size * config.num_shared_experts
    return _write_sigmoid(config) | {"attention.sliding_window_pattern": _sliding(config),
                                     "expert_shared_feed_forward_length": shared}  # fmt: skip


def _write_lfm2(config) -> dict[str, Any]:
    return _write_sigmoid(config) | {"attention.head_count_kv": _kv_heads(config.layer_types, config)}


def _write_mimo2(config) -> dict[str, Any]:
    pattern = _sliding(config)
    heads = [config.num_key_value_heads * (2 if slides else 1) for slides in pattern]
    swa = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
    return _write_sigmoid(config) | {
        "attention.head_count_kv": heads,
        "attention.sliding_window": config.sliding_window - 1,  # transformers counts the token itself
        "attention.sliding_window_pattern": pattern,
        "rope.freq_base_swa": as_float(swa.get("rope_theta")),
        "attention.value_scale": as_float(getattr(config, "attention_value_scale", None)),
    }


def _write_kimi(config) -> dict[str, Any]:
    mla = {key: value for key, value in _mla(config).items() if key != "attention.head_count_kv"}
    heads = [1 if kind == "full_attention" else 0 for kind in config.layer_types]
    return mla | _write_sigmoid(config) | {
        "attention.head_count_kv": heads,
        "kda.head_dim": config.linear_head_dim,
        "expert_weights_norm": bool(config.moe_renormalize),
    }  # fmt: skip


def _mamba(config, conv: int, state: int, inner: int, ranks: int, groups: int | None = None) -> dict[str, Any]:
    return {"ssm.conv_kernel": conv, "ssm.state_size": state, "ssm.inner_size": inner, "ssm.time_step_rank": ranks,
            "ssm.group_count": groups}  # fmt: skip


def _write_granite_hybrid(config) -> dict[str, Any]:
    inner = config.mamba_expand * config.hidden_size
    sizes = (config.mamba_d_conv, config.mamba_d_state, inner, config.mamba_n_heads, config.mamba_n_groups)
    turned = getattr(config, "position_embedding_type", None) == "rope"
    return _mamba(config, *sizes) | {"attention.head_count_kv": _kv_heads(config.layer_types, config),
                                     "rope.scaling.finetuned": turned}  # fmt: skip


def _write_jamba(config) -> dict[str, Any]:
    sizes = (config.mamba_d_conv, config.mamba_d_state, config.mamba_expand * config.hidden_size, config.mamba_dt_rank)
    kinds = ["attention" if n % config.attn_layer_period == config.attn_layer_offset else "mamba"
             for n in range(config.num_hidden_layers)]  # fmt: skip
    return _mamba(config, *sizes) | {"attention.head_count_kv": _kv_heads(kinds, config)}


def _write_nemotron(config) -> dict[str, Any]:
    inner = config.mamba_num_heads * config.mamba_head_dim
    sizes = (config.conv_kernel, config.ssm_state_size, inner, config.mamba_num_heads, config.n_groups)
    kinds = config.layers_block_type
    widths = {"mlp": config.intermediate_size, "moe": config.moe_intermediate_size}
    return _mamba(config, *sizes) | _write_sigmoid(config) | {
        "attention.head_count_kv": _kv_heads(kinds, config),
        "feed_forward_length": [widths.get(kind, 0) for kind in kinds],
        "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }  # fmt: skip


WRITERS: dict[str, Writer] = {
    "deepseek2": _write_deepseek2,
    "glm-dsa": _write_glm_dsa,
    "glm4moe": _write_sigmoid,
    "qwen35moe": _write_qwen35,
    "llama4": _write_llama4,
    "dots1": _write_sigmoid,
    "ernie4_5-moe": _write_ernie,
    "hunyuan-moe": _write_hunyuan,
    "exaone-moe": _write_exaone,
    "afmoe": lambda config: _write_sigmoid(config) | {"expert_weights_norm": True},
    "lfm2moe": _write_lfm2,
    "minimax-m2": lambda config: _write_sigmoid(config) | _write_moe_width(config),
    "mimo2": _write_mimo2,
    "gpt-oss": _write_moe_width,
    "kimi-linear": _write_kimi,
    "granitehybrid": _write_granite_hybrid,
    "jamba": _write_jamba,
    "nemotron_h_moe": _write_nemotron,
}
"""What an architecture's files say beyond FIELDS."""

READERS: dict[str, Reader] = {
    "deepseek2": _read_deepseek2,
    "qwen2moe": _read_qwen2moe,
    "qwen3moe": _read_qwen3moe,
    "qwen3next": _read_next("qwen3_next"),
    "qwen35moe": _read_next("qwen3_5_moe_text"),
    "llama": _read_plain("mixtral"),
    "glm4moe": _read_glm4moe,
    "gpt-oss": _read_gpt_oss,
    "minimax-m2": _read_minimax_m2,
    "olmoe": _read_plain("olmoe"),
    "dots1": _read_plain("dots1"),
    "granitemoe": _read_granite,
    "ernie4_5-moe": _read_ernie,
    "hunyuan-moe": _read_plain("hunyuan_v1_moe"),
    "exaone-moe": _read_exaone,
    "lfm2moe": _read_lfm2,
    "glm-dsa": _read_glm_dsa,
    "afmoe": _read_afmoe,
    "kimi-linear": _read_kimi,
    "mimo2": _read_mimo2,
    "jamba": _read_jamba,
    "granitehybrid": _read_granite_hybrid,
}
"""Architectures whose files say enough to build the config."""
