"""Rotary position embeddings as operators: a model built on the meta device has no frequencies yet.

The mathematics is transformers' own, and the model's config says which kind (default, yarn, dynamic, ...). So
the names below, which published rule files tell apart by checkpoint, are one and the same operator.
Loading computes on the CPU and then moves, so that every device holds the same bits.
"""

from torch import nn

from ktransformers.operators.base_operator import FamilyOperator


class RotaryEmbedding(FamilyOperator):
    """(x, position_ids [B, S]) -> (cos, sin) [B, S, R] each, or the complex factors that DeepSeek-V2 takes.

    The class names end in ``RotaryEmbedding`` because transformers finds rotary modules by that.
    """

    replaces = "a rotary embedding (a module with inv_freq and its config)"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return any(name.endswith("inv_freq") for name in module._buffers) and hasattr(module, "config")

    def load(self) -> None:
        fresh = type(self.orig_module)(self.orig_module.config)
        for name, value in vars(fresh).items():
            if isinstance(value, float):  # attention_scaling, or one per kind of layer
                setattr(self, name, value)
        for name, buffer in fresh._buffers.items():
            buffer = buffer.to(self.device)
            buffer._is_hf_initialized = True
            self._buffers[name] = buffer


class RotaryEmbeddingV2(RotaryEmbedding):
    """`RotaryEmbedding`, under the name of Llama's rule files."""


class RotaryEmbeddingV3(RotaryEmbedding):
    """`RotaryEmbedding`, under the name of DeepSeek-V3's rule files without yarn."""


class RotaryEmbeddingV4(RotaryEmbedding):
    """`RotaryEmbedding`, under another name that rule files use."""


class YarnRotaryEmbedding(RotaryEmbedding):
    """`RotaryEmbedding`, under the name of DeepSeek-V2's rule files."""


class YarnRotaryEmbeddingV3(YarnRotaryEmbedding):
    """`RotaryEmbedding`, under the name of DeepSeek-V3's rule files."""


class DynamicNTKScalingRotaryEmbedding(RotaryEmbedding):
    """`RotaryEmbedding`, under the name of rule files for dynamic NTK scaling."""


class KQwen3MoeRotaryEmbedding(RotaryEmbedding):
    """`RotaryEmbedding`, under the name of Qwen3-MoE's rule files."""


class KGlm4MoeRotaryEmbedding(RotaryEmbedding):
    """`RotaryEmbedding`, under the name of GLM-4-MoE's rule files."""


class KSmallthinkerRotaryEmbedding(RotaryEmbedding):
    """`RotaryEmbedding`, under the name of SmallThinker's rule files."""
