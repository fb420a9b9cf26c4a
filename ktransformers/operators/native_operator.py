"""Operators that compute natively what the family's module was when it was loaded: what such operators share.

The call was made from the children and the numbers of that moment; `is_as_loaded` says whether these are the same.
Other numbers set since make another call; other children and trained tensors leave the module to the family's code.
"""

import itertools
import operator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ktransformers import native
from ktransformers.operators.base_operator import BaseInjectedModule, FamilyOperator, version
from ktransformers.operators.combining import has_hooks
from ktransformers.operators.watching import Numbers, Values

_LOADS = operator.itemgetter("loads")


class NativeOperator(FamilyOperator):
    """Makes `native` when weights were loaded; a subclass says of what, and when it computes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.native: Any = None
        self._parts: dict[str, nn.Module | None] = {}
        self._operators: list[dict[str, Any]] = []  # what children that are operators have, and their `loads`
        self._loads: list[int] = []
        self._tensors: list[Tensor] = []
        self._versions = 0
        self._numbers = self._contents = None

    def make_native(self) -> Any:
        """The native call on the loaded weights; None where they are not all on the CPU, or not recognized."""
        raise NotImplementedError

    def load(self) -> None:
        super().load()
        played = is_in_torch_dispatch_mode()  # a simulation: there are no weights to compute with
        self.native = self.make_native() if native.available() and not played else None
        if self.native is not None:
            self._remember()
        self._parts = dict(self._modules)
        self._operators = [vars(child) for child in self._parts.values() if isinstance(child, BaseInjectedModule)]
        self._note_weights()

    def _note_weights(self) -> None:
        self._loads = list(map(_LOADS, self._operators))
        self._tensors = [tensor for _, tensor in self.named_parameters()]
        self._versions = self._version()

    def _remember(self) -> None:
        self._numbers = Numbers([self, *self._modules.values()])
        self._contents = Values(itertools.chain(self.parameters(), self.buffers()))

    def unload(self) -> None:
        super().unload()
        self.native = None

    def renew(self, tokens: int) -> None:
        """Make the call again where numbers have changed since, or children have other weights; before a step of so
        many tokens, as in Watch."""
        changed = self.native is not None and not self._numbers.unchanged()
        if self.native is not None and list(map(_LOADS, self._operators)) != self._loads:
            if any(self._parts.get(name) is not child for name, child in self._modules.items()):
                return  # wrapped: by `is_as_loaded` there is no call, and later perhaps again
            changed = True
            self._note_weights()
        if changed or self.native is not None and tokens > 1 and not self._contents.unchanged():
            self.native = self.make_native()
            self._remember()

    def is_as_loaded(self) -> bool:
        """Whether children and parameters are those that the call was made from, and nobody looks at the children."""
        for name, child in self._modules.items():  # PEFT wraps children; accelerate gives them a forward
            if self._parts.get(name) is not child or child is not None and has_hooks(child):
                return False
        if list(map(_LOADS, self._operators)) != self._loads:  # other weights, or the same in another form
            return False
        return self._version() == self._versions  # trained since: all but the matrices was copied

    def wants_gradients(self, hidden: Tensor) -> bool:
        return hidden.requires_grad or any(p.requires_grad for p in self._tensors)

    def _version(self) -> int:
        return sum(version(tensor) for tensor in self._tensors)
