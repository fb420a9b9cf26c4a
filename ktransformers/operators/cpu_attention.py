"""Attention of one new token over its cache on the CPU, as two batched products: what decoding needs there.

torch's fused kernel takes 16-bit keys apart number by number for a single query: Zen 4, two threads, 32 heads on 4, 512
tokens 3.7 ms against 0.7, 8192 tokens 30 against 3.5. Everything but one 16-bit query on the CPU goes to transformers'
own function, as before. It is registered with transformers under a name of its own, so `set_attn_implementation` still
says what runs.

Products are taken over whole STEPs of cached tokens, the last one filled up with zeros (`filled`): oneDNN compiles a
product for every length it meets and keeps it, a megabyte each, which would cost a millisecond a token and a gigabyte.
Letters: B batch, A heads, C heads of keys and values, G = A / C, T cached tokens, D head size.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAME = "kt_sdpa"
"""What `config._attn_implementation` is after `use`."""

STEP = 256
"""Cached tokens that lengths of products are multiples of."""


def use(model: nn.Module) -> None:
    """Let `model` decode by this function, if transformers' fused attention is what it has now."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if getattr(model.config, "_attn_implementation", None) != "sdpa" or _asks_by_name(model):
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


def _asks_by_name(model: nn.Module) -> bool:
    """Whether a family's code asks for "sdpa" by name, to make its masks for it (Gemma 4, sparse attention)."""
    files = {getattr(sys.modules.get(type(module).__module__), "__file__", None) for module in model.modules()}
    texts = [Path(file).read_text(encoding="utf-8") for file in files if file and "modeling_" in Path(file).name]
    return any('"sdpa"' in text for text in texts)


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
    """query [B, A, S, D], key and value [B, C, T, D or Dv] -> ([B, S, A, Dv], None), the contract of transformers."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not _is_ours(query, key, attention_mask, dropout, kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    batch, heads, _, size = query.shape
    groups, cached = key.shape[1], key.shape[2]
    packed, keys, values = query.reshape(batch * groups, heads // groups, size), filled(key), filled(value)
    length = keys.shape[2]
    products = torch.bmm(packed, keys.view(batch * groups, length, size).transpose(1, 2))[..., :cached].float()
    scores = products.view(batch, groups, heads // groups, cached) * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        # Not -inf: padding that may look at nothing must stay finite.
        lowest = torch.finfo(torch.float32).min
        mask = attention_mask[..., :cached]
        mask = mask.view(batch, groups, -1, cached) if mask.shape[1] == heads else mask
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    probs = filled(scores.softmax(-1).to(value.dtype), dim=3).view(batch * groups, heads // groups, length)
    out = torch.bmm(probs, values.view(batch * groups, length, value.shape[-1]))
    return out.view(batch, 1, heads, value.shape[-1]), None


def filled(x: Tensor, dim: int = 2) -> Tensor:
    """A copy of `x` [B, C, T, D] with zeros behind, so that dimension `dim` is a multiple of STEP."""
    size = x.shape[dim]
    out = x.new_empty(*x.shape[:dim], -(-size // STEP) * STEP, *x.shape[dim + 1 :])
    out.narrow(dim, 0, size).copy_(x)
    out.narrow(dim, size, out.shape[dim] - size).zero_()
    return out


def _is_ours(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> bool:
    """One 16-bit query on the CPU, with nothing that only transformers' function knows."""
    known = all(kwargs.get(name) is None for name in ("position_bias", "cache", "softcap", "s_aux"))
    return (
        query.device.type == "cpu" and query.shape[2] == 1 and query.dtype in (torch.bfloat16, torch.float16)
        and known and not dropout and key.shape[2] > 0 and query.shape[1] % key.shape[1] == 0
        and (mask is None or mask.dim() == 4 and mask.shape[1] in (1, query.shape[1]))
        and not (torch.is_grad_enabled() and query.requires_grad)
    )  # fmt: skip
