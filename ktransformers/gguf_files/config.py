"""A config as GGUF metadata, and back: `add_config` writes what `config_from_gguf` reads.

Written so that llama.cpp finds the keys it needs; keys and their meanings follow
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's own converter. Most keys are one field of the
config, told by FIELDS in both directions; what is more than that stands in families.py.
It knows no tensors but their names: some settings are told only by a tensor that is there or is not.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.gguf_files.families import READERS, WRITERS, as_float, rope_of, shortest
from ktransformers.gguf_files.rope import rope_parameters
from ktransformers.gguf_files.special import ends_of_turn
from ktransformers.gguf_files.unread import check_unread
from ktransformers.loaders import checkpoint_dtype, open_weights
from ktransformers.loaders.base import WeightFiles

_HYBRIDS = ("lfm2moe", "jamba", "granitehybrid", "nemotron_h_moe", "kimi-linear", "mimo2")
_BY_LAYER = {*(f"{arch}.attention.head_count_kv" for arch in _HYBRIDS), "nemotron_h_moe.feed_forward_length"}
"""Keys of FIELDS that an architecture has one number a layer for."""

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


def _head(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# --- writing ----------------------------------------------------------------------------------------------


def add_config(writer, arch: str, config) -> None:
    """Write the architecture's keys. `writer` is a gguf.GGUFWriter made for `arch`.

    Raises WeightError for a RoPE that GGUF has no words for.
    """
    values = {key: _first(config, names) for key, names, _ in FIELDS}
    values |= _numbers(config) | _rope_scaling(config)
    values |= WRITERS[arch](config) if arch in WRITERS else {}
    for key, value in values.items():
        value = as_float(value) if key in _FLOATS else value
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if type(value) in kinds:
            kinds[type(value)](f"{arch}.{key}", value)
        elif isinstance(value, list):  # one number for each layer
            writer.add_array(f"{arch}.{key}", value)


def _first(config, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _numbers(config) -> dict[str, Any]:
    """Keys of any family that are not one field."""
    rope, head = rope_of(config), _head(config)
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
        "rope.freq_base": as_float(rope.get("rope_theta")),
        "ssm.inner_size": values or None,
    }


def _rope_scaling(config) -> dict[str, str | int | float | None]:
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind not in ("linear", "yarn"):
        raise WeightError(f"RoPE of type {kind!r} cannot be written to GGUF by this version (linear and yarn can).")
    return {
        "rope.scaling.type": kind,
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        "rope.scaling.yarn_beta_fast": as_float(rope.get("beta_fast")),
        "rope.scaling.yarn_beta_slow": as_float(rope.get("beta_slow")),
        "rope.scaling.yarn_attn_factor": as_float(_attention_factor(config, rope)),
    }


def _attention_factor(config, rope: dict[str, Any]) -> float | None:
    """What sine and cosine are multiplied by, where a file's other keys do not tell it.

    A file has one logarithm's multiplier, which readers take for both of `mscale` and `mscale_all_dim`.
    """
    stated, whole = rope.get("attention_factor"), rope.get("mscale_all_dim")
    if stated is not None or rope["rope_type"] != "yarn" or not whole or rope.get("mscale") == whole:
        return stated
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")[1]


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
                f"{path}: the config of a GGUF file of architecture {arch!r} cannot be told from its metadata (it can "
                f"of {', '.join(READERS)}). Give the folder with the model's config.json and tokenizer (--model_path)."
            )
        read = Metadata(files, arch)
        model_type, special = READERS[arch](read)
        config = AutoConfig.for_model(model_type)
        special |= {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]}
        fields = read.fields(config) | special
        check_unread(read)
        try:
            return AutoConfig.for_model(model_type, **fields)
        except Exception as error:  # transformers and what it validates with raise many kinds
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise WeightError(f"{path}: its metadata make no {model_type} config: {reason}.") from error


class Metadata:
    """What a file of one architecture says: numbers by key, and which tensors there are."""

    def __init__(self, files: WeightFiles, arch: str) -> None:
        self.files, self.arch = files, arch
        self.asked: set[str] = set()
        blocks = [found for name in files.names() if (found := re.match(r"blk\.(\d{1,6})\.", name))]
        stored = 1 + max((int(found[1]) for found in blocks), default=-1)
        layers, predicting = self("block_count"), self("nextn_predict_layers", 0)
        if not 0 < layers - predicting <= stored:
            raise WeightError(
                f"{files.paths[0]}: {arch}.block_count is {layers}, the tensors are of {stored} layers. Download it "
                "again."
            )

    def __call__(self, key: str, absent: Any = _NEEDED) -> Any:
        """A number of the architecture, or `absent`."""
        self.asked.add(f"{self.arch}.{key}")
        value = self.files.metadata.get(f"{self.arch}.{key}", absent)
        if value is _NEEDED or value is not absent and not isinstance(value, (int, float, str, bool)):
            found = "missing" if value is _NEEDED else f"{value!r}, expected one number"
            raise WeightError(f"{self.files.paths[0]}: {self.arch}.{key} is {found}. Download it again.")
        return shortest(value) if isinstance(value, float) else value

    def says(self, key: str) -> bool:
        self.asked.add(f"{self.arch}.{key}")
        return f"{self.arch}.{key}" in self.files.metadata

    def layers(self, key: str) -> list[int]:
        """One number for each layer that transformers builds."""
        self.asked.add(f"{self.arch}.{key}")
        stored = self.files.metadata.get(f"{self.arch}.{key}")
        count = self("block_count") - self("nextn_predict_layers", 0)
        numbers = list(stored) if isinstance(stored, Sequence) and not isinstance(stored, str) else []
        if len(numbers) < count or not all(isinstance(number, int) for number in numbers):
            raise WeightError(
                f"{self.files.paths[0]}: {self.arch}.{key} is {stored!r}, expected {count} numbers. Download it again."
            )
        return numbers[:count]

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
            if name is not None and f"{self.arch}.{key}" not in _BY_LAYER and (value := self(key, absent)) is not None:
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
        found["dtype"] = str(checkpoint_dtype(self.files)).removeprefix("torch.")
        return found

    def special_tokens(self) -> dict[str, Any]:
        """Ids of the tokens that begin, end and fill; what ends a turn ends an answer as well."""
        ids = {name: self.files.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _SPECIAL}
        ids = {name: number if isinstance(number, int) else None for name, number in ids.items()}
        stated = [n for n in (ids["eos"], ids["eot"], ids["eom"]) if n is not None]
        ends = list(dict.fromkeys([*stated, *ends_of_turn(self.files.metadata)]))
        return {
            "bos_token_id": ids["bos"],
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
            "pad_token_id": ids["padding"],
        }

    def rope(self, head: int | None) -> dict[str, Any]:
        return rope_parameters(self, head)
