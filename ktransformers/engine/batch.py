"""Sequences decoded together: one forward pass gives each of them its next logits.

Where the whole decoder is native they are one ragged batch on pages; elsewhere (state spaces, sparse indices, GPUs,
caches of transformers) each takes a step of its own. Chooses nothing, knows nothing of requests.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.engine.step import Steps
from ktransformers.errors import UnsupportedError
from ktransformers.native import Decode
from ktransformers.operators.paged_cache import PagedCache
from ktransformers.operators.stack import decode_of, takes_ragged


class Batch:
    """Sequences in the order they came. For one thread.

    Whoever adds a sequence gives it away: its cache is the batch's until it is taken out again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.members: list[Steps] = []
        self._joined: PagedCache | None = None  # of all of them, in order
        self._lengths: list[int] = []
        self._recorded: Decode | None = None
        self._looked_up = False

    @torch.inference_mode()
    def add(self, steps: Steps) -> None:
        """Append a sequence whose prompt is computed."""
        if self.members and self._joined is None or not takes_ragged(self.model, steps.cache.cache):
            self._part()
        elif self._joined is None:
            self._joined = steps.cache.cache
        else:
            self._joined = PagedCache.together([self._joined, steps.cache.cache])
        self.members.append(steps)
        if self._joined is not None:
            self._lengths.append(len(steps.cache.ids))
            steps.cache.cache = None
        self._looked_up = False

    @torch.inference_mode()
    def remove(self, places: Sequence[int]) -> list[Steps]:
        """Take sequences out; each has its cache again."""
        gone = [self.members[i] for i in places]
        if self._joined is not None:
            for i, steps in zip(places, gone, strict=True):
                steps.cache.cache = self._joined.alone(i)
        left = [i for i in range(len(self.members)) if i not in set(places)]
        self.members = [self.members[i] for i in left]
        if self._joined is not None:
            self._lengths = [self._lengths[i] for i in left]
            if left:
                self._joined.batch_select_indices(torch.tensor(left, device="cpu"))
            else:
                self._joined = None
        self._looked_up = False
        return gone

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor | list[Tensor]:
        """The logits [V] of each sequence after one token more, in memory that the next call may write to again.

        Where it raises, sequences that were computed together cannot go on: their caches are of no use.
        """
        if self._joined is None:
            return [steps.next(token) for steps, token in zip(self.members, tokens, strict=True)]
        if len(tokens) == 1 and not self._looked_up:
            self._recorded, self._looked_up = decode_of(self.model, self._joined), True
        if len(tokens) == 1 and self._recorded is not None:
            logits = self._recorded(tokens[0])[None]
        else:
            logits = self._together(tokens)
            if logits is None:
                self._part()
                return self.step(tokens)
        self._lengths = [length + 1 for length in self._lengths]
        for steps, token in zip(self.members, tokens, strict=True):
            steps.cache.ids.append(token)
        return logits

    def _together(self, tokens: Sequence[int]) -> Tensor | None:
        """[B, V]; None where the model has become one that takes no ragged batch: a hook, an adapter."""
        ids, places = (torch.tensor(list(x), dtype=torch.int64, device="cpu")[:, None] for x in (tokens, self._lengths))
        try:
            out: Any = self.model(input_ids=ids, position_ids=places, past_key_values=self._joined, use_cache=True)
            return out.logits[:, -1]
        except UnsupportedError:
            if len(set(self._lengths)) == 1 or takes_ragged(self.model, self._joined):
                raise
            return None

    def _part(self) -> None:
        """Each sequence has its own cache from now on."""
        if self._joined is not None:
            for i, steps in enumerate(self.members):
                steps.cache.cache = self._joined.alone(i)
            self._joined, self._lengths = None, []
