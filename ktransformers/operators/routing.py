"""Which experts a token goes to: one formula with parameters, and how a family's router is recognized as one of it.

A family's router says how it scores, chooses and weighs in code, not in data. Here that code is recognized by its
results on random weights of the same shapes, so that the C library can be told its parameters; `Routing.apply` is the
formula that C is held to. Letters: T tokens, H hidden, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ktransformers import native
from ktransformers.quants.blocks import QUANT_TYPES, Packed


@dataclass(frozen=True, eq=False)
class Routing:
    """`choice` and the tensors it works with: `weight` [E, H], and where there are such `bias` (of the product),
    `choice_bias` and `factors` [E], `norm` [H]."""

    choice: native.Choice
    weight: Tensor
    bias: Tensor | None = None
    choice_bias: Tensor | None = None
    factors: Tensor | None = None
    norm: Tensor | None = None

    def apply(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, H] -> (logits [T, E] float32, weights [T, K] float32, ids int64 [T, K])."""
        logits = self.logits(hidden)
        score = _score(self.choice.score, logits)
        ids = self._ids(logits, score)
        return logits, self._weights(logits.gather(1, ids), score.gather(1, ids), ids), ids

    def logits(self, hidden: Tensor) -> Tensor:
        c, x = self.choice, hidden.float()
        rounded = (lambda t: t.to(hidden.dtype).float()) if c.round else (lambda t: t)
        if self.norm is not None:
            x = rounded(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c.norm_eps))
            x = rounded(rounded(x * self.norm.float()) * c.norm_factor)
        logits = rounded(F.linear(x, self.weight.float(), None if self.bias is None else self.bias.float()))
        return c.cap * torch.tanh(logits / c.cap) if c.cap else logits

    def _ids(self, logits: Tensor, score: Tensor) -> Tensor:
        c, key = self.choice, score
        if c.bias_on != "none":
            key = (logits if c.bias_on == "logit" else score) + self.choice_bias.float()
        if c.groups:
            parts = key.view(len(key), c.groups, -1)
            best = parts.amax(-1) if c.group_by == "max" else parts.topk(2, -1).values.sum(-1)
            kept = _largest(best, c.groups_kept)
            outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            key = parts.masked_fill(outside.unsqueeze(-1), c.masked).flatten(1)
        return _largest(key, c.top_k)

    def _weights(self, logits: Tensor, score: Tensor, ids: Tensor) -> Tensor:
        c = self.choice
        weights = {"score": score, "softmax": logits.softmax(-1), "sigmoid": logits.sigmoid()}[c.weigh]
        if c.divide != "none":
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total.clamp(min=c.divide_by) if c.divide == "clamp" else total + c.divide_by)
        weights = weights * c.factor
        return weights if self.factors is None else weights * self.factors.float()[ids]

    def in_c(self, name: str) -> native.Router:
        """The same by the C library, on the memory of `weight`."""
        parts = {"bias": self.bias, "choice_bias": self.choice_bias, "factors": self.factors, "norm": self.norm}
        return native.Router(packed(self.weight), self.choice, **parts, name=name)


def _score(kind: str, logits: Tensor) -> Tensor:
    if kind == "none":
        return logits
    if kind == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return logits.softmax(-1) if kind == "softmax" else logits.sigmoid()


def _largest(key: Tensor, k: int) -> Tensor:
    """Ids of the k largest of [T, E], the lowest first among equals."""
    return key.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def packed(weight: Tensor) -> Packed:
    """A dense matrix [N, K] on the CPU as the C library reads it: its own memory where that is in order."""
    weight = weight.detach().contiguous()
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[weight.dtype]
    return Packed(weight.view(torch.uint8).view(-1), QUANT_TYPES[kind], tuple(weight.shape))
