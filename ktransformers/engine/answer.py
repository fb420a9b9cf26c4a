"""One answer as it grows: its tokens, how the next is chosen, and with which probability. No model runs here."""

import secrets

import torch
from torch import Tensor, nn

from ktransformers.engine.requests import Logprobs, Request
from ktransformers.engine.sampling import Chooser

_SEEDS = 1 << 62


class Answer:
    """Answer `index` to a request; for one thread.

    Raises KTransformersError for sampling that transformers refuses, and what the request's constraint raises.
    """

    def __init__(self, request: Request, index: int, model: nn.Module) -> None:
        self.request, self.index = request, index
        self.ids: list[int] = []
        self.is_complete = False
        """Whether its constraint lets nothing follow."""
        self._constraint = None if request.constraint is None else request.constraint()
        self._counts: dict[int, int] = {}
        adjusts = self._constraint or request.bias or request.frequency_penalty or request.presence_penalty
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed + index
        generator = torch.Generator("cpu").manual_seed(seed % (1 << 63))
        self._choose = Chooser(
            request.sampling, model, request.ids, max(1, request.max_new_tokens),
            generator=generator, adjust=self._adjust if adjusts else None,
        )  # fmt: skip

    def choose(self, logits: Tensor) -> tuple[int, Logprobs | None]:
        """The next token by `logits` [V], and its probability where it was asked for. Raises as Chooser does."""
        token = self._choose(logits)
        self.ids.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._constraint is not None:
            self.is_complete = self._constraint.accept(token)
        wanted = self.request.logprobs
        return token, None if wanted is None else logprobs_of(logits[None], [token], wanted)[0]

    @property
    def is_full(self) -> bool:
        """Whether it has all tokens that it may have, or must end with the last."""
        return len(self.ids) >= self.request.max_new_tokens or self.is_complete or self._choose.ended()

    def _adjust(self, scores: Tensor) -> None:
        request = self.request
        if (request.frequency_penalty or request.presence_penalty) and self._counts:
            tokens = torch.tensor(list(self._counts), device=scores.device)
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32, device=scores.device)
            scores[tokens] -= request.frequency_penalty * counts + request.presence_penalty
        if request.bias:
            tokens = torch.tensor(list(request.bias), device=scores.device)
            scores[tokens] += torch.tensor(list(request.bias.values()), dtype=torch.float32, device=scores.device)
        if self._constraint is not None:
            self._constraint.mask(scores)


def logprobs_of(logits: Tensor, tokens: list[int], top: int) -> list[Logprobs]:
    """Of each of `tokens` [T] by `logits` [T, V], with the `top` likeliest beside it."""
    each = logits.float().log_softmax(-1).cpu()
    chosen = each.gather(1, torch.tensor(tokens, device="cpu")[:, None])[:, 0].tolist()
    values, ids = each.topk(min(top, each.shape[-1]), -1)
    pairs = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Logprobs(one, likeliest) for one, likeliest in zip(chosen, pairs, strict=True)]
