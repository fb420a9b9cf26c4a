"""Kimi-K2's text checkpoints: DeepSeek-V3's architecture under a model type of their own, which transformers lacks.

Their repositories bring code instead. Nothing here runs that: the model type is registered as what it is, so
`AutoConfig` and `AutoModelForCausalLM` build transformers' own DeepSeek-V3. The model class waits in
modeling_kimi_k2.py for the first config, as it brings seconds of imports.
"""

from functools import cache
from typing import Any

from transformers import AutoConfig, DeepseekV3Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class KimiK2Config(DeepseekV3Config):
    """DeepSeek-V3's configuration, read from a config.json whose model_type is kimi_k2."""

    model_type = "kimi_k2"

    def __new__(cls, *args: Any, **kwargs: Any) -> "KimiK2Config":
        _register_model()
        return super().__new__(cls)


@cache
def _register_model() -> None:
    from ktransformers.models.modeling_kimi_k2 import KimiK2ForCausalLM
    from transformers import AutoModelForCausalLM, conversion_mapping

    AutoModelForCausalLM.register(KimiK2Config, KimiK2ForCausalLM)
    as_deepseek = conversion_mapping.get_checkpoint_conversion_mapping("deepseek_v3")
    conversion_mapping.register_checkpoint_conversion_mapping("kimi_k2", as_deepseek)


def register() -> None:
    """Teach transformers the model type, unless it knows it already."""
    if "kimi_k2" not in CONFIG_MAPPING:
        AutoConfig.register("kimi_k2", KimiK2Config)
