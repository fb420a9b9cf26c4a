"""What the C library takes for a call inside itself: bytes, by the layouts that its sources lay out in an arena.

An arena is kept from call to call at the size of the largest. Small parts (panels, lists of pairs) are left out.
Letters: T tokens, H hidden, I intermediate, K experts per token, P pairs of a token and an expert.
"""

from collections.abc import Callable
from typing import Any

from ktransformers.native import torch_ops

PAIRS_BYTES = 512 << 20
CHUNK_TOKENS = 4096
"""Of native/src/calls/moe_backward.c, chunk_tokens."""
FORMS = 4 + 2
"""A value in fp32 and, for a bf16 multiplier, in bf16."""


def of_training(operation: Any, args: tuple) -> int:
    """Of an operator of torch_ops that a training step calls; 0 of any other."""
    found = _OF.get(getattr(operation, "_schema", None) and operation._schema.name)
    return found(args) if found else 0


def _linear(args: tuple) -> int:
    x, number = args
    call = torch_ops.find(number)
    return x.numel() // x.shape[-1] * max(call.in_features, call.out_features) * FORMS


def _forward(args: tuple) -> int:
    hidden, ids = args[:2]
    call = torch_ops.find(args[-1])
    tokens, pairs = min(len(hidden), CHUNK_TOKENS), min(len(hidden), CHUNK_TOKENS) * ids.shape[1]
    return tokens * call.hidden * FORMS + pairs * (call.intermediate * FORMS + 4 * call.hidden)


def _backward(args: tuple) -> int:
    ids, adapted = args[2], len(args) > 5
    call = torch_ops.find(args[-1])
    inner, hidden, slots = call.intermediate, call.hidden, ids.shape[1]
    most = PAIRS_BYTES // (slots * 4 * (4 * inner + hidden) + 12 * hidden)
    tokens = min(len(ids), max(16, min(CHUNK_TOKENS, most)))
    return tokens * (2 * hidden * FORMS + slots * (2 * inner * FORMS + 4 * hidden + (4 * inner if adapted else 0)))


_OF: dict[str, Callable[[tuple], int]] = {
    "ktransformers::linear": _linear, "ktransformers::linear_backward": _linear,
    "ktransformers::experts": _forward, "ktransformers::adapted_experts": _forward,
    "ktransformers::experts_backward": _backward, "ktransformers::adapted_experts_backward": _backward,
}  # fmt: skip
