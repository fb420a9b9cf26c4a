"""Names of upstream's first interface for training (`ktransformers.sft.lora`), thin over PEFT and transformers."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear as KTransformersLinearLora
from torch import nn
from transformers import Trainer

from ktransformers.errors import SFTError
from ktransformers.sft.peft_utils.mapping import get_peft_model


def inject_lora_layer(model: nn.Module, use_adapter_path: str) -> nn.Module:
    """Put an adapter that was saved in a folder on `model`, in place; returns the PeftModel around it.

    Raises SFTError for a folder without adapter_config.json.
    """
    if not (Path(use_adapter_path) / "adapter_config.json").exists():
        raise SFTError(f"{use_adapter_path}: found no adapter_config.json, expected a folder that PEFT wrote.")
    return PeftModel.from_pretrained(model, use_adapter_path)


class KTrainer(Trainer):
    """transformers' Trainer with upstream's arguments. What it saves of a PeftModel is the adapter; nothing is moved,
    as rules have placed the modules."""

    def __init__(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **({"processing_class": tokenizer} if tokenizer is not None else {}), **kwargs)


__all__ = ["KTrainer", "KTransformersLinearLora", "LoraConfig", "get_peft_model", "inject_lora_layer"]
