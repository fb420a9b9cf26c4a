"""Kimi-K2's model class: see kimi_k2.py."""

from ktransformers.models.kimi_k2 import KimiK2Config
from transformers import DeepseekV3ForCausalLM


class KimiK2ForCausalLM(DeepseekV3ForCausalLM):
    """DeepSeek-V3 under Kimi-K2's configuration."""

    config_class = KimiK2Config
