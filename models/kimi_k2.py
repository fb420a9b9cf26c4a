"""Kimi-K2's text checkpoints: DeepSeek-V3's architecture under a model type of their own, which transformers lacks.

Their repositories bring code instead. Nothing here runs that: the model type is registered as what it is, so
`AutoConfig` and `AutoModelForCausalLM` build transformers' own DeepSeek-V3. `ktransformers.optimize` imports this file.
"""

from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class KimiK2Config(DeepseekV3Config):
    """DeepSeek-V3's configuration, read from a config.json whose model_type is kimi_k2."""

    model_type = "kimi_k2"


class KimiK2ForCausalLM(DeepseekV3ForCausalLM):
    """DeepSeek-V3 under Kimi-K2's configuration."""

    config_class = KimiK2Config


def register() -> None:
    """Teach transformers the model type, unless it has learned it by itself."""
    if "kimi_k2" in CONFIG_MAPPING:
        return
    AutoConfig.register("kimi_k2", KimiK2Config)
    AutoModelForCausalLM.register(KimiK2Config, KimiK2ForCausalLM)
    register_checkpoint_conversion_mapping("kimi_k2", get_checkpoint_conversion_mapping("deepseek_v3"))


register()
