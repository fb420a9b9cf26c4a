"""PEFT's own `get_peft_model`, under upstream's path."""

from peft import get_peft_model

__all__ = ["get_peft_model"]
