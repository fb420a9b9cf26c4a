"""Attention of one new token over its cache on the CPU by torch's fused kernel: what decoding needs there.

The query heads that share a head of keys go in as that head's queries, so the kernel multiplies matrices and reads each
key once. A single query row it takes apart number by number on CPUs without AMX, and does so for every query head. CPU
milliseconds of a layer with 32 heads on 4, head size 128, one thread of a Sapphire Rapids, torch 2.13; "AVX2": MKL and
oneDNN held to that:

    cached, dtype        this    products in 16 bits (AVX2)    transformers' function (AVX2)
    512, bf16      0.13 (0.29)                 0.52 (3.2)                       0.19 (2.8)
    2048, bf16      0.6 (1.1)                  1.45 (11.8)                      0.87 (12.7)
    512, fp16      0.22 (0.29)                 0.61 (3.2)                       0.87 (1.2)

Scores are fp32 inside the kernel, whatever the dtype of keys: in fp16 a product of large keys would be infinite.
It is registered with transformers under a name of its own, so `set_attn_implementation` still says what runs.
Letters: B batch, A heads, C heads of keys and values, S queries, T cached tokens, D head size, V value size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "kt_sdpa"
"""What `config._attn_implementation` is after `use`."""

ASK_FOR_SDPA = frozenset(
    "axk2 cohere_compass data2vec deepseek_ocr2 deepseek_v32 dots3_note edgetam edgetam_video exaone4_5 falcon gemma4 "
    "gemma4_unified glm5_next glm_moe_dsa hy_v4 minimax_m3_vl mistral_large4 qwen2_5_omni qwen2_5_vl qwen2_vl qwen3_5 "
    "qwen3_5_moe qwen3_omni_moe qwen3_vl qwen3_vl_moe qwen4_exp sam sam2 sam2_video sam3 sam3_lite_text sam3_tracker "
    "sam3_tracker_video sam_hq unlimited_ocr".split()
)
"""Families of transformers whose code asks for "sdpa" by name, mostly to make masks for it: they keep it."""


def use(model: nn.Module) -> None:
    """Let `model` decode by this function, if transformers' fused attention is what it has now."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    families = {family_of(module) for module in model.modules()}
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or families & ASK_FOR_SDPA:
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


def family_of(module: nn.Module) -> str:
    """The folder of transformers that the class of `module` is from, or ``""``."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 3 else ""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' contract: query [B, A, S, D], key [B, C, T, D], value [B, C, T, V] -> ([B, S, A, V], None)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not _is_ours(query, key, attention_mask, dropout, kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    out = one_query(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2), None


def one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query [B, A, 1, D], key [B, C, T, D], value [B, C, T, V], mask [B, 1 or A, 1, T] -> [B, A, 1, V]."""
    batch, heads, _, size = query.shape
    shared = heads // key.shape[1]
    rows = query.reshape(batch, -1, shared, size)
    if mask is not None and mask.shape[1] != 1:
        mask = mask.reshape(batch, -1, shared, mask.shape[-1])
    if shared == 1 and query.element_size() == 2:
        rows = rows.expand(-1, -1, 2, -1)  # twice the same: without AMX half the time of the kernel's single row
    return fused(rows, key, value, mask, scale)[:, :, :shared].reshape(batch, heads, 1, -1)


def fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    """torch's fused attention, which holds no scores in memory.

    query [B, A, S, D], key [B, A, T, D], value [B, A, T, V], mask [B, 1 or A, 1 or S, T] -> [B, A, S, V].
    It wants values as wide as keys, so the narrower are padded with zeros: for DeepSeek-V3's sizes and 1024 tokens on a
    CPU 2.4 times as fast as what torch falls back to otherwise. `causal`: the first query sees the first key alone.
    """
    width, size = value.shape[-1], query.shape[-1]
    if width < size:
        value = F.pad(value, (0, size - width))
    elif width > size:
        query, key = (F.pad(x, (0, width - size)) for x in (query, key))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)[..., :width]


def _is_ours(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> bool:
    """One query on the CPU, with nothing that only transformers' function knows."""
    known = all(kwargs.get(name) is None for name in ("position_bias", "cache", "softcap", "s_aux"))
    return (
        query.device.type == "cpu" and query.shape[2] == 1 and known and not dropout
        and key.shape[2] > 0 and query.shape[1] % key.shape[1] == 0
        and (mask is None or mask.dim() == 4 and mask.shape[1] in (1, query.shape[1])
             and mask.shape[-1] == key.shape[2] and mask.dtype in (torch.bool, query.dtype))
    )  # fmt: skip
