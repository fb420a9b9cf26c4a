"""Model families: what a family needs beyond what transformers says, and the embedded checkpoint.

`modeling_*.py` re-export transformers' classes under the names that published rule files match on. This package
holds no modelling code of its own.
"""

from importlib import import_module, resources
from pathlib import Path
from typing import Any

DEFAULT_RULES = {
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
    "glm4_moe": "GLM-4",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm4v_moe": "GLM-4.5V",
    "glm_moe_dsa": "GLM-5",
    "gpt_oss": "gpt-oss",
    "kimi_k2": "Kimi-K2",
    "kimi_k25": "Kimi-K2.5",
    "llama4": "Llama-4",
    "llama4_text": "Llama-4",
    "minimax_m2": "MiniMax-M2",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_5_moe": "Qwen3.5-MoE",
    "qwen3_5_moe_text": "Qwen3.5-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_next": "Qwen3-Next",
    "qwen3_omni_moe": "Qwen3-Omni-MoE",
    "qwen3_omni_moe_thinker": "Qwen3-Omni-MoE",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
}
"""config.model_type -> name of the packaged rules that the chat program uses when none is given."""

ONE_BY_ONE = frozenset({"jamba"})
"""Model types whose state-space layers, in transformers, start anew when several tokens come after others. Behind a
first piece of the prompt, their tokens are computed one by one."""


def builder(config: Any) -> tuple[type, Any] | None:
    """The auto class of transformers that builds the language model of `config`, and the config that it is given.

    Text in, text out, token by token: a causal LM where there is one (of a model that also sees, that is its text part
    alone), else the class that takes images or sounds too, else None. Of a model that speaks, it is what thinks.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        GenerationMixin,
    )

    config = getattr(config, "thinker_config", None) or config
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        built = auto._model_mapping.get(type(config), None)
        if built is not None:
            return (auto, config) if issubclass(built, GenerationMixin) else None
    return None


def register_families() -> None:
    """Teach transformers' Auto classes the model types that it lacks. Calling it again changes nothing."""
    from ktransformers.models import kimi_k2

    kimi_k2.register()


def family_members(family: str) -> dict[str, Any]:
    """Every class and function that transformers defines for `family`, such as ``qwen3_moe``, by name."""
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    own = vars(module).items()
    return {name: value for name, value in own if getattr(value, "__module__", None) == module.__name__}


def embedded_model() -> Path:
    """Folder of the small chat model that ships with the package (config, tokenizer, safetensors, GGUF)."""
    return Path(str(resources.files("ktransformers.models") / "embedded"))
