"""The answers that get tokens at every step: those of one adapter are a batch, and a step is one of each batch.

So every answer gets its token at every step, whatever adapter it is of, and no adapter waits for another's to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ktransformers.engine.batch import Batch
from ktransformers.engine.forms import Forms

if TYPE_CHECKING:
    from ktransformers.engine.schedule import Member


@dataclass(eq=False)
class Group:
    """Answers of one adapter."""

    batch: Batch
    members: list[Member] = field(default_factory=list)


class Running:
    """Members in the order they came, by adapter. For one thread."""

    def __init__(self, forms: Forms) -> None:
        self._forms = forms
        self._groups: dict[str, Group] = {}

    def __iter__(self) -> Iterator[Member]:
        for group in self._groups.values():
            yield from group.members

    def __len__(self) -> int:
        return sum(len(group.members) for group in self._groups.values())

    @property
    def adapters(self) -> list[str]:
        """Those that answers are of."""
        return list(self._groups)

    def members(self, adapter: str) -> list[Member]:
        return self._groups[adapter].members if adapter in self._groups else []

    def add(self, member: Member) -> None:
        """Its prompt is computed; its cache is the batch's now, as `Batch.add` has it."""
        self._forms.use(member.adapter)
        group = self._groups.setdefault(member.adapter, Group(Batch(self._forms.model)))
        group.members.append(member)
        group.batch.add(member.steps)

    def step(self, adapter: str) -> Tensor | list[Tensor]:
        """As `Batch.step` has it: the logits of each answer of the adapter after its last token."""
        self._forms.use(adapter)
        group = self._groups[adapter]
        return group.batch.step([member.answer.ids[-1] for member in group.members])

    def take_out(self, gone: Sequence[Member]) -> None:
        """Those of them that run; each has its cache again."""
        for adapter, group in list(self._groups.items()):
            places = [i for i, member in enumerate(group.members) if member in gone]
            if places:
                self._forms.use(adapter)
                group.batch.remove(places)
                group.members = [member for member in group.members if member not in gone]
            if not group.members:
                del self._groups[adapter]

    def drop(self, adapter: str) -> list[Member]:
        """Forget the answers of an adapter, whose caches are of no use."""
        return self._groups.pop(adapter).members

    def clear(self) -> None:
        """Forget all."""
        self._groups.clear()
