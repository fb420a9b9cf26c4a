"""Which experts a token goes to, and with which weights: native/src/calls/router.c's formula, from the logits on.

A program has the keys of a token in a tile [groups, experts of a group] and takes the largest, K times: a key and its
expert are one whole number of 64 bits, so equals go by ascending id, and a NaN counts as larger than any number.
Letters: T tokens, E experts, K experts of a token.
"""

from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError
from ktransformers.kernels.compiler import jit, launch, launchable, tl
from ktransformers.native.router import BIAS_ON, DIVIDE, GROUP_BY, SCORES, WEIGH, Choice

MOST_EXPERTS = 4096


@jit
def ordered(key, number):
    """A whole number in the order of keys, and among equal keys against that of numbers."""
    bits = tl.where(key == 0, 0.0, key).to(tl.int32, bitcast=True)
    order = tl.where(key != key, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)


@jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def tanh(x):
    """1 - 2 / (e^2x + 1), and where that would cancel, the series."""
    xx = x * x
    series = x * (1 - xx * (0.3333333333333333 - xx * (0.13333333333333333 - xx * 0.05396825396825397)))
    return tl.where(tl.abs(x) < 0.1, series, 1 - 2 / (tl.exp(2 * x) + 1))


@jit
def softplus(x):
    """log(1 + e^x), the identity above 20; what rounding loses of a small e^x is multiplied back."""
    e = tl.exp(tl.minimum(x, 20.0))
    more = 1 + e
    return tl.where(x > 20, x, tl.where(more == 1, e, tl.log(more) * (e / tl.where(more == 1, 1.0, more - 1))))


@jit
def best_groups(key, number, there, GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_BY: tl.constexpr, BG: tl.constexpr):
    """Keys [BG, BE] -> bool [BG]: the KEPT groups of the largest key, or of the largest sum of two."""
    LEAST: tl.constexpr = -9223372036854775808
    packed = tl.where(there, ordered(key, number), LEAST)
    best = tl.max(packed, axis=1)
    value = tl.sum(tl.where(packed == best[:, None], key, 0.0), axis=1)
    if GROUP_BY == "best2":
        packed = tl.where(packed == best[:, None], LEAST, packed)
        second = tl.max(packed, axis=1)
        value += tl.sum(tl.where((packed == second[:, None]) & there, key, 0.0), axis=1)
    group = tl.arange(0, BG)
    left = tl.where(group < GROUPS, ordered(value, group), LEAST)
    kept = group < 0
    for _ in tl.static_range(KEPT):
        chosen = left == tl.max(left, axis=0)
        kept = kept | chosen
        left = tl.where(chosen, LEAST, left)
    return kept


@jit
def router_kernel(
    logits, choice_bias, factors, ids, weights, E, logit_stride, cap, masked, divide_by, factor,
    K: tl.constexpr, BK: tl.constexpr, SCORE: tl.constexpr, BIAS_ON: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, GROUP_BY: tl.constexpr, WEIGH: tl.constexpr, DIVIDE: tl.constexpr, CAPPED: tl.constexpr,
    BG: tl.constexpr, SIZE: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """logits [T, E] -> ids and weights [T, K]. Grid (T,). SIZE experts a group, GROUPS groups, in a tile [BG, BE]."""
    LEAST: tl.constexpr = -9223372036854775808
    token = tl.program_id(0).to(tl.int64)
    member = tl.arange(0, BE)[None, :]
    number = tl.arange(0, BG)[:, None] * SIZE + member
    there = (member < SIZE) & (number < E)
    logit = tl.load(logits + token * logit_stride + number, mask=there, other=0).to(tl.float32)
    if CAPPED:
        logit = cap * tanh(logit / cap)
    score = logit
    if SCORE == "softmax":
        shown = tl.where(there, logit, float("-inf"))
        score = tl.exp(shown - tl.max(shown))
        score = score / tl.sum(score)
    elif SCORE == "sigmoid":
        score = sigmoid(logit)
    elif SCORE == "sqrtsoftplus":
        score = tl.sqrt(softplus(logit))
    key = logit if BIAS_ON == "logit" else score
    if BIAS_ON != "none":
        key += tl.load(choice_bias + number, mask=there, other=0).to(tl.float32)
    if GROUPS > 0:
        kept = best_groups(key, number, there, GROUPS, KEPT, GROUP_BY, BG)
        key = tl.where(kept[:, None], key, masked)
    packed = tl.where(there, ordered(key, number), LEAST)
    place = tl.arange(0, BK)
    chosen_ids = tl.zeros([BK], tl.int32)
    value = tl.full([BK], float("-inf"), tl.float32)
    weighed = score if WEIGH == "score" else logit
    for k in range(K):
        best = tl.max(tl.max(packed, axis=1), axis=0)
        chosen = packed == best
        chosen_ids = tl.where(place == k, (0x7FFFFFFF - (best & 0xFFFFFFFF)).to(tl.int32), chosen_ids)
        value = tl.where(place == k, tl.sum(tl.sum(tl.where(chosen, weighed, 0.0), axis=1), axis=0), value)
        packed = tl.where(chosen, LEAST, packed)
    inside = place < K
    if WEIGH == "softmax":
        value = tl.exp(value - tl.max(value, axis=0))
        value = value / tl.sum(value, axis=0)
    elif WEIGH == "sigmoid":
        value = sigmoid(value)
    if DIVIDE != "none":
        total = tl.sum(tl.where(inside, value, 0.0), axis=0)
        value = value / (total + divide_by if DIVIDE == "sum" else tl.where(total < divide_by, divide_by, total))
    value *= factor
    if factors is not None:
        value *= tl.load(factors + chosen_ids, mask=inside, other=0).to(tl.float32)
    tl.store(ids + token * K + place, chosen_ids.to(ids.dtype.element_ty), mask=inside)
    tl.store(weights + token * K + place, value, mask=inside)


def choose(
    logits: Tensor, choice: Choice, choice_bias: Tensor | None = None, factors: Tensor | None = None, *,
    ids: Tensor | None = None, weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits floats [T, E], as the router's product left them, bias and rounding done -> ids [T, K], weights float32.

    Of `choice` everything behind the logits is computed; its norm and `round` belong to the product. choice_bias,
    factors: floats [E], or None. ids: int64 (by default) or int32, weights float32, contiguous; allocates nothing when
    given both. Raises UnsupportedError for what does not fit.
    """
    _check(logits, choice, choice_bias, factors)
    shape = (logits.shape[0], choice.top_k)
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device) if ids is None else ids
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device) if weights is None else weights
    fits = ids.shape == weights.shape == shape and ids.is_contiguous() and weights.is_contiguous()
    if not fits or ids.dtype not in (torch.int64, torch.int32) or weights.dtype != torch.float32:
        raise UnsupportedError(
            f"Router: found ids {ids.dtype} {list(ids.shape)} and weights {weights.dtype} {list(weights.shape)}, "
            f"expected int64 or int32 and float32 {list(shape)}."
        )
    if not launchable(logits.device):
        made = reference(logits, choice, choice_bias, factors)
        return ids.copy_(made[0]), weights.copy_(made[1])
    if len(logits):
        made = arguments(logits, choice, choice_bias, factors, ids, weights)
        launch(router_kernel, (len(logits),), logits.device, made)
    return ids, weights


def arguments(
    logits: Tensor, choice: Choice, choice_bias: Tensor | None, factors: Tensor | None, ids: Tensor, weights: Tensor
) -> dict[str, Any]:
    """What `router_kernel` is launched with, and compiled for by the tests, where no GPU is."""
    block = lambda size: 1 << (size - 1).bit_length()  # noqa: E731
    count, groups = logits.shape[1], max(1, choice.groups)
    return {
        "logits": logits, "choice_bias": None if choice.bias_on == "none" else choice_bias, "factors": factors,
        "ids": ids, "weights": weights, "E": count, "logit_stride": logits.stride(0), "cap": float(choice.cap),
        "masked": float(choice.masked), "divide_by": float(choice.divide_by), "factor": float(choice.factor),
        "K": choice.top_k, "BK": block(choice.top_k), "SCORE": choice.score, "BIAS_ON": choice.bias_on,
        "GROUPS": choice.groups, "KEPT": choice.groups_kept, "GROUP_BY": choice.group_by, "WEIGH": choice.weigh,
        "DIVIDE": choice.divide, "CAPPED": choice.cap > 0, "BG": block(groups), "SIZE": count // groups,
        "BE": block(count // groups), "num_warps": 1 if count <= 256 else 4 if count <= 1024 else 8,
    }  # fmt: skip


def _check(logits: Tensor, choice: Choice, choice_bias: Tensor | None, factors: Tensor | None) -> None:
    names = {"score": SCORES, "bias_on": BIAS_ON, "group_by": GROUP_BY, "weigh": WEIGH, "divide": DIVIDE}
    unknown = [
        f"{field} {getattr(choice, field)!r}" for field, known in names.items() if getattr(choice, field) not in known
    ]
    count = logits.shape[-1]
    groups, size = choice.groups, count // max(1, choice.groups)
    fits = (
        logits.dim() == 2 and logits.stride(1) == 1 and 1 <= choice.top_k <= count <= MOST_EXPERTS and choice.cap >= 0
    )
    if groups:
        fits = fits and count % groups == 0 and 1 <= choice.groups_kept <= groups
        fits = fits and choice.top_k <= size * choice.groups_kept and (choice.group_by == "max" or size > 1)
    vectors = [vector for vector in (choice_bias, factors) if vector is not None]
    fits = fits and all(v.shape == (count,) and v.stride(0) == 1 and v.device == logits.device for v in vectors)
    if unknown or not fits or (choice.bias_on != "none" and choice_bias is None):
        raise UnsupportedError(
            f"Router: found logits {list(logits.shape)} with vectors {[list(v.shape) for v in vectors]} and {choice}, "
            f"expected [T, up to {MOST_EXPERTS}] and [E]{', unknown: ' + ', '.join(unknown) if unknown else ''}."
        )


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(
    logits: Tensor, choice: Choice, choice_bias: Tensor | None = None, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the kernel computes, in torch: ids int64 and weights float32 [T, K]."""
    logit = logits.float()
    if choice.cap:
        logit = choice.cap * torch.tanh(logit / choice.cap)
    score = _SCORES[choice.score](logit)
    key = logit if choice.bias_on == "logit" else score
    if choice.bias_on != "none":
        key = key + choice_bias.float()
    if choice.groups:
        grouped = key.unflatten(1, (choice.groups, -1))
        two = torch.gather(grouped, 2, _largest(grouped, 1 if choice.group_by == "max" else 2))
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=key.device)
        kept.scatter_(1, _largest(two.sum(2), choice.groups_kept), True)
        key = grouped.masked_fill(~kept[..., None], choice.masked).flatten(1)
    ids = _largest(key, choice.top_k)
    weights = torch.gather(score if choice.weigh == "score" else logit, 1, ids)
    if choice.weigh != "score":
        weights = torch.softmax(weights, 1) if choice.weigh == "softmax" else torch.sigmoid(weights)
    if choice.divide != "none":
        sums = weights.sum(1, keepdim=True)
        weights = weights / (sums + choice.divide_by if choice.divide == "sum" else sums.clamp(min=choice.divide_by))
    weights = weights * choice.factor
    return ids, weights if factors is None else weights * factors.float()[ids]


def _largest(keys: Tensor, count: int) -> Tensor:
    """Numbers of the `count` largest in the last dimension; a stable sort leaves equals in order, NaN first."""
    return torch.sort(keys + 0.0, dim=-1, descending=True, stable=True)[1][..., :count]


_SCORES = {
    "none": lambda x: x,
    "softmax": lambda x: torch.softmax(x, 1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: torch.sqrt(torch.nn.functional.softplus(x)),
}
