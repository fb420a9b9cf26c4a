"""A config as GGUF metadata, and back: `add_config` writes what `config_from_gguf` reads.

Written so that llama.cpp finds the keys it needs; keys and their meanings follow
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's own converter. Most keys are one field of the
config, told by FIELDS in both directions; what is more than that stands with its family below.
It knows no tensors but their names: some settings are told only by a tensor that is there or is not.
"""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.loaders import open_weights
from ktransformers.loaders.base import WeightFiles

_SOFTMAX, _SIGMOID = 1, 2  # gguf.ExpertGatingFuncType
_SPECIAL = ("bos", "eos", "eot", "eom", "padding")
_NEEDED = object()

FIELDS: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("context_length", ("max_position_embeddings",), _NEEDED),
    ("embedding_length", ("hidden_size",), _NEEDED),
    ("block_count", ("num_hidden_layers",), _NEEDED),
    ("feed_forward_length", ("intermediate_size_mlp", "intermediate_size"), None),
    ("vocab_size", ("vocab_size",), None),
    ("attention.head_count", ("num_attention_heads",), _NEEDED),
    ("attention.head_count_kv", ("num_key_value_heads",), None),
    ("attention.layer_norm_rms_epsilon", ("rms_norm_eps", "norm_eps", "layernorm_epsilon", "layer_norm_epsilon"), None),
    ("attention.sliding_window", ("sliding_window",), None),
    ("attention.q_lora_rank", ("q_lora_rank",), None),
    ("attention.kv_lora_rank", ("kv_lora_rank",), None),
    ("expert_count", ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"), _NEEDED),
    ("expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), _NEEDED),
    ("expert_feed_forward_length", ("moe_intermediate_size",), None),
    ("expert_shared_feed_forward_length", ("shared_expert_intermediate_size", "shared_intermediate_size"), 0),
    ("expert_shared_count", ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 0),
    ("leading_dense_block_count", ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    ("expert_weights_scale", ("routed_scaling_factor", "route_scale"), 1.0),
    ("expert_weights_norm", ("norm_topk_prob", "route_norm"), False),
    ("expert_group_count", ("n_group",), 1),
    ("expert_group_used_count", ("topk_group",), 1),
    ("full_attention_interval", ("full_attention_interval",), 4),
    ("ssm.conv_kernel", ("linear_conv_kernel_dim",), None),
    ("ssm.state_size", ("linear_key_head_dim",), None),
    ("ssm.group_count", ("linear_num_key_heads",), None),
    ("ssm.time_step_rank", ("linear_num_value_heads",), None),
    ("shortconv.l_cache", ("conv_L_cache",), None),
    ("logit_scale", ("logits_scaling",), None),
    ("residual_scale", ("residual_multiplier",), None),
    ("embedding_scale", ("embedding_multiplier",), None),
    ("attention.scale", ("attention_multiplier",), None),
)
"""Key (after the architecture), the config's names for it (a family has one of them), and what a file without it means:
None is the config class's own default for a number that tensors' shapes would contradict, or that few files change."""

_FLOATS = {
    "attention.layer_norm_rms_epsilon", "expert_weights_scale", "logit_scale", "residual_scale", "embedding_scale",
    "attention.scale",
}  # fmt: skip
"""Keys whose value is a float whatever the config writes."""


def _rope(config) -> dict:
    """The RoPE settings, those of full attention where kinds of layers differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def _head(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# --- writing ----------------------------------------------------------------------------------------------


def add_config(writer, arch: str, config) -> None:
    """Write the architecture's keys. `writer` is a gguf.GGUFWriter made for `arch`.

    Raises WeightError for a RoPE that GGUF has no words for.
    """
    values = {key: next((v for n in names if (v := getattr(config, n, None)) is not None), None) for key, names, _ in FIELDS}
    values |= _numbers(config) | _rope_scaling(config)
    values |= _WRITERS.get(arch, _nothing)(config)
    for key, value in values.items():
        value = _float(value) if key in _FLOATS else value
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if type(value) in kinds:
            kinds[type(value)](f"{arch}.{key}", value)
        elif isinstance(value, list):  # one number for each layer
            writer.add_array(f"{arch}.{key}", value)


def _numbers(config) -> dict[str, Any]:
    """Keys of any family that are not one field."""
    rope, head = _rope(config), _head(config)
    values = getattr(config, "linear_value_head_dim", 0) * getattr(config, "linear_num_value_heads", 0)
    dense = getattr(config, "first_k_dense_replace", None)
    if (kinds := getattr(config, "mlp_layer_types", None)) is not None:
        dense = next((n for n, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    return {
        **({"leading_dense_block_count": dense} if dense is not None else {}),
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "attention.key_length": head,
        "attention.value_length": getattr(config, "v_head_dim", None) or head,
        "rope.dimension_count": int(head * (rope.get("partial_rotary_factor") or 1.0)),
        "rope.freq_base": _float(rope.get("rope_theta")),
        "ssm.inner_size": values or None,
    }


def _rope_scaling(config) -> dict[str, str | int | float | None]:
    rope = _rope(config)
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


# --- reading ----------------------------------------------------------------------------------------------


def config_from_gguf(path: str | Path) -> Any:
    """The transformers config of the model in a GGUF file (or in a split set, by its first file).

    Raises:
        UnsupportedError: an architecture whose config cannot be told from its metadata.
        WeightError: no GGUF file, or one that lacks a number every model has.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with open_weights(path) as files:
        if files.format != "gguf":
            raise WeightError(f"{path}: not a GGUF file, so there is no config in it. Give the path of a .gguf.")
        arch = files.metadata.get("general.architecture")
        if arch not in READERS:
            raise UnsupportedError(
                f"{path}: the config of a GGUF file of architecture {arch!r} cannot be told from its metadata (it can of "
                f"{', '.join(READERS)}). Give the folder with the model's config.json and tokenizer (--model_path)."
            )
        read = _Read(files, arch)
        model_type, special = READERS[arch](read)
        config = AutoConfig.for_model(model_type)
        special |= {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]}
        try:
            return AutoConfig.for_model(model_type, **read.fields(config) | special)
        except Exception as error:  # transformers and what it validates with raise many kinds
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise WeightError(f"{path}: its metadata make no {model_type} config: {reason}. Download it again.") from error


class _Read:
    """A file's metadata and tensor names."""

    def __init__(self, files: WeightFiles, arch: str) -> None:
        self.files, self.arch = files, arch
        stored = 1 + max((int(n[1]) for n in map(re.compile(r"blk\.(\d{1,6})\.").match, files.names()) if n), default=-1)
        layers, predicting = self("block_count"), self("nextn_predict_layers", 0)
        if not 0 < layers - predicting <= stored:
            raise WeightError(
                f"{files.paths[0]}: {arch}.block_count is {layers}, the tensors are of {stored} layers. Download it again."
            )

    def __call__(self, key: str, absent: Any = _NEEDED) -> Any:
        """A number of the architecture, or `absent`."""
        value = self.files.metadata.get(f"{self.arch}.{key}", absent)
        if value is _NEEDED or value is not absent and not isinstance(value, (int, float, str, bool)):
            found = "missing" if value is _NEEDED else f"{value!r}, expected one number"
            raise WeightError(f"{self.files.paths[0]}: {self.arch}.{key} is {found}. Download it again.")
        return _shortest(value) if isinstance(value, float) else value

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, name) for name in self.files.names())

    def dense_layers(self) -> list[int]:
        """Layers without routed experts."""
        return [n for n in range(self("block_count")) if f"blk.{n}.ffn_gate_inp.weight" not in self.files]

    def fields(self, config: Any) -> dict[str, Any]:
        """What every family has, under the names that this one's config has."""
        found: dict[str, Any] = {}
        for key, names, absent in FIELDS:
            name = next((n for n in names if hasattr(config, n)), None)
            if name is not None and (value := self(key, absent)) is not None:
                found[name] = value
        predicting = self("nextn_predict_layers", 0)  # layers that the file counts and transformers does not build
        found["num_hidden_layers"] -= predicting
        if hasattr(config, "num_nextn_predict_layers"):
            found["num_nextn_predict_layers"] = predicting
        found.setdefault("num_key_value_heads", found["num_attention_heads"])
        # Models look for it whether their config class has it or not.
        found["head_dim"] = self("attention.key_length", found["hidden_size"] // found["num_attention_heads"])
        found["rope_parameters"] = self.rope(found["head_dim"])
        found["tie_word_embeddings"] = "output.weight" not in self.files
        found["vocab_size"] = self.files.info("token_embd.weight").shape[0]
        if hasattr(config, "attention_bias"):
            found["attention_bias"] = self.has(r"\.attn_q\.bias$")
        found |= self.special_tokens()
        found["dtype"] = "float32" if self._is_float32() else "bfloat16"
        return found

    def special_tokens(self) -> dict[str, Any]:
        """Ids of the tokens that begin, end and fill; what ends a turn ends an answer as well."""
        ids = {name: self.files.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _SPECIAL}
        ids = {name: number if isinstance(number, int) else None for name, number in ids.items()}
        ends = list(dict.fromkeys(n for n in (ids["eos"], ids["eot"], ids["eom"]) if n is not None))
        return {
            "bos_token_id": ids["bos"],
            "eos_token_id": ends if len(ends) > 1 else ids["eos"],
            "pad_token_id": ids["padding"],
        }

    def _is_float32(self) -> bool:
        """Whether every matrix is stored in full; else half precision computes what is not computed packed."""
        return all(self.files.info(n).type.name == "F32" for n in self.files.names() if len(self.files.info(n).shape) > 1)

    def rope(self, head: int | None) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self("rope.freq_base", 10000.0)}
        turned = self("rope.dimension_count", None)
        if turned and head and turned != head:
            rope["partial_rotary_factor"] = turned / head
        kind = self("rope.scaling.type", "none")
        if kind not in ("none", ""):
            if kind not in ("linear", "yarn"):
                raise UnsupportedError(
                    f"{self.files.paths[0]}: RoPE scaling of type {kind!r} is not read yet (linear and yarn are). Give the "
                    "folder with the model's config.json (--model_path)."
                )
            names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor",
                     "original_context_length": "original_max_position_embeddings"}  # fmt: skip
            stated = {name: self(f"rope.scaling.{key}", None) for key, name in names.items()}
            rope |= {"rope_type": kind, "factor": self("rope.scaling.factor", 1.0)}
            rope |= {name: value for name, value in stated.items() if value is not None}
        return rope


def _shortest(value: float) -> float:
    """The decimal that a float32 of the file was made from: 1e-06, not 9.999999974752427e-07."""
    return next(short for digits in range(6, 18) if _float32(short := float(f"{value:.{digits}g}")) == _float32(value))


def _float32(value: float) -> bytes:
    return struct.pack("<f", value) if abs(value) < 3e38 else struct.pack("<d", value)


# --- families: keys that are more than one field, (to write, to read) each ------------------------------------

Writer = Callable[[Any], dict[str, Any]]
Reader = Callable[[_Read], tuple[str, dict[str, Any]]]


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
    rope = _rope(config)
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


def _read_deepseek2(read: _Read) -> tuple[str, dict[str, Any]]:
    sigmoid = read("expert_gating_func", _SOFTMAX) == _SIGMOID
    turned = read("rope.dimension_count")
    whole, rope = read("attention.key_length_mla", None) or read("attention.key_length"), read.rope(None)
    if (multiplier := read("rope.scaling.yarn_log_multiplier", None)) is not None:
        rope["mscale_all_dim"] = rope["mscale"] = _shortest(multiplier * 10)
    found = {
        "num_key_value_heads": read("attention.head_count"),
        "q_lora_rank": read("attention.q_lora_rank", None),
        "qk_rope_head_dim": turned,
        "head_dim": turned,  # what transformers' rotary embedding reads
        "qk_nope_head_dim": whole - turned,
        "v_head_dim": read("attention.value_length_mla", None) or read("attention.value_length"),
        "rope_parameters": rope,
    }
    if not sigmoid:
        grouped = read("expert_group_count", 0) > 1
        found["topk_method"] = "group_limited_greedy" if grouped else "greedy"
    return "deepseek_v3" if sigmoid else "deepseek_v2", found


def _read_qwen2moe(read: _Read) -> tuple[str, dict[str, Any]]:
    norm = read("expert_weights_norm", False)
    return "qwen2_moe", {"mlp_only_layers": read.dense_layers(), "qkv_bias": read.has(r"\.attn_q\.bias$"),
                         "norm_topk_prob": norm}  # fmt: skip


def _read_qwen3moe(read: _Read) -> tuple[str, dict[str, Any]]:
    # llama.cpp normalizes whatever the file says, and its converter does not say it.
    return "qwen3_moe", {"mlp_only_layers": read.dense_layers(), "norm_topk_prob": read("expert_weights_norm", True)}


def _read_glm4moe(read: _Read) -> tuple[str, dict[str, Any]]:
    return "glm4_moe", {"use_qk_norm": read.has(r"\.attn_q_norm\.")}


def _read_gpt_oss(read: _Read) -> tuple[str, dict[str, Any]]:
    rope = read.rope(None) | {"truncate": False}  # the family's YaRN has no whole-numbered borders
    return "gpt_oss", {"intermediate_size": read("expert_feed_forward_length"), "rope_parameters": rope}


def _read_minimax_m2(read: _Read) -> tuple[str, dict[str, Any]]:
    return "minimax_m2", {"intermediate_size": read("expert_feed_forward_length")}


def _write_moe_width(config) -> dict[str, Any]:
    return {"expert_feed_forward_length": config.intermediate_size}


def _read_next(model_type: str) -> Reader:
    def read_next(read: _Read) -> tuple[str, dict[str, Any]]:
        values = read("ssm.inner_size") // max(read("ssm.time_step_rank"), 1)
        dense = {"mlp_only_layers": read.dense_layers()} if model_type == "qwen3_next" else {}
        return model_type, {"linear_value_head_dim": values, **dense}

    return read_next


def _read_plain(model_type: str) -> Reader:
    return lambda read: (model_type, {})


def _nothing(config) -> dict[str, Any]:
    return {}


def _write_sigmoid(config) -> dict[str, Any]:
    return {"expert_gating_func": _SIGMOID}


def _sliding(config) -> list[bool]:
    return [kind == "sliding_attention" for kind in config.layer_types]


def _kv_heads(kinds: list[str], config) -> list[int]:
    """Key-value heads of each layer; none where the layer is no attention."""
    return [config.num_key_value_heads if "attention" in k and "linear" not in k else 0 for k in kinds]


def _write_glm_dsa(config) -> dict[str, Any]:
    indexer = {"indexer.head_count": config.index_n_heads, "indexer.key_length": config.index_head_dim,
               "indexer.top_k": config.index_topk}  # fmt: skip
    return {f"attention.{key}": value for key, value in indexer.items()} | _write_deepseek2(config)


def _write_llama4(config) -> dict[str, Any]:
    return {"expert_feed_forward_length": config.intermediate_size,
            "interleave_moe_layer_step": config.interleave_moe_layer_step}  # fmt: skip


def _write_qwen35(config) -> dict[str, Any]:
    sections = [*_rope(config).get("mrope_section", [11, 11, 10]), 0, 0, 0, 0]
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
        "rope.freq_base_swa": _float(swa.get("rope_theta")),
        "attention.value_scale": _float(getattr(config, "attention_value_scale", None)),
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


_WRITERS: dict[str, Writer] = {
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
}
"""Architectures whose files say enough to build the config."""
