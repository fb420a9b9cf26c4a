"""What a GGUF file says about its model besides the weights: config and tokenizer as GGUF metadata.

Written so that llama.cpp finds every key it needs for the families of loaders/gguf_names.py; keys and their
meanings follow https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's own converter.
It writes no tensors.
"""

from ktransformers.errors import WeightError

_SOFTMAX, _SIGMOID = 1, 2  # gguf.ExpertGatingFuncType


def _config_numbers(config) -> dict[str, int | float | bool | None]:
    """Keys that any family may have, without the architecture; None is left out."""

    def get(*names: str):
        return next((v for n in names if (v := getattr(config, n, None)) is not None), None)

    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "context_length": get("max_position_embeddings"),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": get("intermediate_size"),
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": get("num_key_value_heads", "num_attention_heads"),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]) if "rope_theta" in rope else None,
        "expert_count": get("n_routed_experts", "num_local_experts", "num_experts"),
        "expert_used_count": get("num_experts_per_tok"),
    }


def _rope_scaling(config) -> dict[str, str | int | float | None]:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind not in ("linear", "yarn"):
        raise WeightError(
            f"RoPE of type {kind!r} cannot be written to GGUF by this version (linear and yarn can)."
        )
    return {
        "rope.scaling.type": kind,
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        "rope.scaling.yarn_beta_fast": _float(rope.get("beta_fast")),
        "rope.scaling.yarn_beta_slow": _float(rope.get("beta_slow")),
        "rope.scaling.yarn_attn_factor": _float(rope.get("attention_factor")),
    }


def _float(value) -> float | None:
    return None if value is None else float(value)


def _deepseek2(config) -> dict[str, int | float | bool | None]:
    """MLA is described as llama.cpp computes it, absorbed: one key-value head of the latent's size."""
    rope = getattr(config, "rope_parameters", None) or {}
    latent = config.kv_lora_rank
    sigmoid = config.model_type == "deepseek_v3"
    # A greedy deepseek_v2 has groups in its config and does not use them; llama.cpp would.
    grouped = sigmoid or config.topk_method != "greedy"
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + config.qk_rope_head_dim,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        # A tenth of the config's number is what llama.cpp's own converter writes for this family.
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"]
        if "mscale_all_dim" in rope
        else None,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts or 0,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob) if sigmoid else False,
        "expert_gating_func": _SIGMOID if sigmoid else _SOFTMAX,
        "expert_group_count": config.n_group if grouped else None,
        "expert_group_used_count": config.topk_group if grouped else None,
    }


def _qwen(config) -> dict[str, int | bool | None]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", None),
        "expert_weights_norm": bool(config.norm_topk_prob),
    }


def _llama(config) -> dict[str, int | None]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head}


_ARCHITECTURES = {"deepseek2": _deepseek2, "qwen2moe": _qwen, "qwen3moe": _qwen, "llama": _llama}


def add_config(writer, arch: str, config) -> None:
    """Write the architecture's keys. `writer` is a gguf.GGUFWriter made for `arch`."""
    values = _config_numbers(config) | _rope_scaling(config) | _ARCHITECTURES[arch](config)
    for key, value in values.items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }[type(value)]
        add(f"{arch}.{key}", value)
