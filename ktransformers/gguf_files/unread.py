"""What a lone GGUF file says and nothing reads: left for a reason, refused where it changes numbers, or named.

Keys of FIELDS and of families.py count as read where the family has a place for them. The tensors that are left
aside, and why, are in loaders/gguf_names.py (IGNORED); any other tensor without a place is an error of loading.
"""

import re
import warnings
from typing import Any

from ktransformers.errors import UnsupportedError

Metadata = Any
"""config.Metadata, after the config was made from it."""

LEFT: dict[str, str] = {
    r"general\.(?!sampling\.)": "who made the file of what; architecture, alignment and types are read with the header",
    r"split\.": "checked when the files of a set are opened",
    r"(quantize|imatrix)\.": "how the file was quantized",
    r"tokenizer\.": "tokenizer.py reads them, and says which it leaves",
    r"{arch}\.vocab_size": "the rows of token_embd are counted",
    r"{arch}\.(expert_|expert_shared_|expert_chunk_)?feed_forward_length": "shapes of tensors, which are checked",
    r"{arch}\.attention\.(key|value)_length(_mla|_swa)?": "shapes of tensors, which are checked",
    r"{arch}\.ssm\.(conv_kernel|inner_size|state_size|time_step_rank|group_count)": "shapes of tensors, likewise",
    r"{arch}\.expert_shared_count": "shapes of tensors, likewise: shared experts are one matrix",
    r"{arch}\.leading_dense_block_count": "layers without a router are counted",
    r"{arch}\.interleave_moe_layer_step": "layers without a router are counted",
    r"{arch}\.expert_weights_norm": "a family whose config lacks it always does it, or never, in llama.cpp too",
    r"{arch}\.rope\.dimension_count_swa": "as many as rope.dimension_count in every family here",
    r"{arch}\.rope\.dimension_sections": "which positions of an image turn what; in text all are the same",
    r"{arch}\.rope\.scaling\.(original_context_length|finetuned)": "of the training, where there is no scaling",
    r"{arch}\.rope\.scaling\.yarn_(beta_fast|beta_slow|attn_factor)": "no YaRN, or else they are read",
    r"{arch}\.n_deepstack_layers": "of images, which need a file of their own",
    r"{arch}\.tensor_data_layout": "who wrote the rows; llama's are in llama.cpp's order in every file",
}
"""Keys, as a regular expression of their beginning, and why it is right to leave them."""

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.value_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "classifier.output_labels": (),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0,),
    "expert_group_count": (0, 1),
    "expert_group_scale": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.freq_base_swa": (),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "router_logit_softcapping": (0,),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
    "use_parallel_residual": (False,),
}
"""Keys that change what is computed, and the values with which they do not: any other is refused in a family that has
no place for it. A router's gating is also without effect when it is the family's, a base when it is the other's."""

_SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN = 1, 2, 3  # gguf.ExpertGatingFuncType
GATING: dict[str, int] = {
    **dict.fromkeys(("glm4moe", "glm-dsa", "dots1", "exaone-moe", "afmoe", "lfm2moe"), _SIGMOID),
    **dict.fromkeys(("minimax-m2", "mimo2", "kimi-linear"), _SIGMOID),
    "gpt-oss": _SOFTMAX_OF_CHOSEN,
}
"""How a family's router makes scores of logits, where it is not softmax: code in transformers, a key in GGUF."""


def check_unread(read: Metadata) -> None:
    """Warn once of keys that nobody knows. Raises UnsupportedError for those that would be computed wrongly."""
    left = re.compile("|".join(LEFT).replace("{arch}", re.escape(read.arch)))
    refused, unknown = [], []
    for key, value in read.files.metadata.items():
        if key in read.asked or left.match(key):
            continue
        short = key.removeprefix(f"{read.arch}.")
        if short not in WITHOUT_EFFECT:
            unknown.append(key)
        elif not _without_effect(read, short, value):
            refused.append(f"{key} {value!r:.60}")
    if refused:
        raise UnsupportedError(
            f"{read.files.paths[0]}: says what transformers' model of this family does not compute: "
            f"{', '.join(refused)}. Use the model's own safetensors with a release of transformers that has it."
        )
    if unknown:
        warnings.warn(
            f"{read.files.paths[0].name}: not known and not used: {', '.join(unknown)}. If the answers are odd, give "
            "the folder with the model's config.json, and this file as its weights.",
            UserWarning,
            stacklevel=3,
        )


def _without_effect(read: Metadata, short: str, value: Any) -> bool:
    same = {
        "expert_gating_func": GATING.get(read.arch, _SOFTMAX),
        "rope.freq_base_swa": read.files.metadata.get(f"{read.arch}.rope.freq_base"),
    }
    if short in same and value == same[short]:
        return True
    values = [value] if isinstance(value, (int, float, str)) else list(value)
    return all(one in WITHOUT_EFFECT[short] for one in values)
