"""One model in several forms: as it was loaded, and with each of its adapters, whose weights lie beside its own.

An adapter stands around modules that it changes: to put it in place is to put these wrappers where the modules were,
and to take it away is to put the modules back. So the model without adapters is the very one that was loaded, as fast,
and a step may be that of any form. Knows nothing of what an adapter computes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ktransformers.errors import KTransformersError
from ktransformers.operators.base_operator import BaseInjectedModule

_MISSING = object()

Edit = tuple[dict[str, Any], str, Any, Any]
"""A table of a module, a name in it, and what it says there without the adapter and with it."""


@dataclass
class _Form:
    identity: bytes = b""
    edits: list[Edit] = field(default_factory=list)
    made: list[dict[str, Any]] = field(default_factory=list)  # of each operator, what it made of its children
    nbytes: dict[str, int] = field(default_factory=dict)


class Forms:
    """The forms of `model` by the names of adapters; "" is that without one, which is in place at first. For one
    thread: whoever computes calls `use` before."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.active = model, ""
        self._forms = {"": _Form()}
        self._operators: list[BaseInjectedModule] = []  # that make something of their children

    @property
    def names(self) -> list[str]:
        """Of adapters."""
        return [name for name in self._forms if name]

    def add(self, name: str, put: Callable[[nn.Module], Any], identity: bytes) -> None:
        """Have the form `name`, which `put` makes of the model in place.

        `identity`: of what is put; two forms of one identity compute the same. Where `put` raises the model is as it
        was, and so does this.
        """
        if name in self._forms:
            raise KTransformersError(f"adapter {name!r}: there is one of this name already. Choose another name.")
        self.use("")
        self._operators = [m for m in self.model.modules() if isinstance(m, BaseInjectedModule) and m.unmade()]
        own = {id(tensor) for tensor in _tensors(self.model)}
        before = [(table, dict(table)) for table in _tables(self.model)]
        form = _Form(identity, made=[operator.unmade() for operator in self._operators])
        try:
            put(self.model)
            form.nbytes = _bytes_by_device(tensor for tensor in _tensors(self.model) if id(tensor) not in own)
        finally:
            form.edits = [edit for table, old in before for edit in _edits(table, old)]
            _apply(form.edits, 2)
        self._forms[name] = form

    def use(self, name: str) -> None:
        """Put the form `name` in place."""
        if name == self.active:
            return
        old, new = self._forms[self.active], self._forms[name]
        old.made = [{one: getattr(each, one) for one in each.unmade()} for each in self._operators]
        _apply(old.edits, 2)
        _apply(new.edits, 3)
        for operator, made in zip(self._operators, new.made, strict=True):
            vars(operator).update(made)
        self.active = name

    def identity(self, name: str) -> bytes:
        """What tells the form from others whatever it is called; nothing for the model without an adapter."""
        return self._forms[name].identity

    def nbytes(self) -> dict[str, dict[str, int]]:
        """Adapter -> device -> bytes of its tensors."""
        return {name: self._forms[name].nbytes for name in self.names}


def _tables(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What modules hold, each table once: an operator shares its own with the family's module."""
    seen: set[int] = set()
    for module in model.modules():
        for table in (module._modules, module._parameters, module._buffers, vars(module)):
            if id(table) not in seen:
                seen.add(id(table))
                yield table


def _edits(table: dict[str, Any], old: dict[str, Any]) -> Iterator[Edit]:
    for name in old | table:
        was, now = old.get(name, _MISSING), table.get(name, _MISSING)
        if was is not now:
            yield table, name, was, now


def _apply(edits: list[Edit], which: int) -> None:
    for edit in edits:
        table, name, value = edit[0], edit[1], edit[which]
        if value is _MISSING:
            table.pop(name, None)
        else:
            table[name] = value


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _bytes_by_device(tensors: Iterator[Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in tensors:
        device = str(tensor.device)
        found[device] = found.get(device, 0) + tensor.nbytes
    return found
