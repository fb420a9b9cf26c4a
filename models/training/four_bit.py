"""What a 4-bit file does to a model, without the file: weights rounded to 16 levels per 32, and put back afterwards.

Used to train weights that stand the rounding, and to score them. It is cruder than Q4_K_M (which keeps some tensors
at 6 bits and searches its scales), so a model that answers well here answers well from the GGUF.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

GROUP = 32


def round_trip(weight: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """The nearest values 4 bits can say: minimum + scale * code, code 0..15, one pair per `group` along the rows."""
    blocks = weight.float().reshape(-1, group)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-12)
    return ((blocks - low).div_(scale).round_() * scale + low).view_as(weight).to(weight.dtype)


def rounded_names(model: torch.nn.Module) -> list[str]:
    """Linear and expert weights; not norms, not embeddings (6 bits in Q4_K_M), not the router (float in GGUF)."""
    skip = ("norm", "embed_tokens", "lm_head", ".gate.weight")
    return [name for name, weight in model.named_parameters() if weight.dim() > 1 and not any(s in name for s in skip)]


@contextmanager
def four_bit_weights(model: torch.nn.Module) -> Iterator[None]:
    """Inside: `model` has rounded weights (gradients flow to them as if unrounded). Outside: the exact ones again."""
    parameters = dict(model.named_parameters())
    exact = {name: parameters[name].data for name in rounded_names(model)}
    for name, weight in exact.items():
        parameters[name].data = round_trip(weight)
    try:
        yield
    finally:
        for name, weight in exact.items():
            parameters[name].data = weight
