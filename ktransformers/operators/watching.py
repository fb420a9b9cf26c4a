"""Whether modules are still what a native call was made from: their numbers, small tensors, children, hooks, forwards.

Asked at every step, so each question is one pass in C over lists made beforehand. Nothing is computed or renewed here.
"""

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.models.traits import is_linear
from ktransformers.operators.base_operator import PLAIN
from ktransformers.operators.twin import original

_VALUES, _MODE = operator.methodcaller("values"), operator.itemgetter("training")
_FORWARD = operator.methodcaller("get", "forward")
_LOADS, _VERSION = operator.itemgetter("loads"), operator.attrgetter("_version")


class Numbers:
    """Plain attributes (numbers, names) of modules and of their configs as they are now, but for `training`; those of
    linear layers are sizes alone."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        settings = [vars(original(m)) for m in modules if m is not None and not is_linear(original(m))]
        configs = {id(held["config"]): held["config"] for held in settings if hasattr(held.get("config"), "to_dict")}
        named = [(held, name) for held in (*settings, *map(vars, configs.values()))
                 for name, value in held.items() if isinstance(value, PLAIN) and name != "training"]  # fmt: skip
        self._tables, self._names = [held for held, _ in named], [name for _, name in named]
        self._held = self._now()

    def _now(self) -> list[Any]:
        return list(map(dict.get, self._tables, self._names))

    def unchanged(self) -> bool:
        return all(map(operator.is_, self._now(), self._held))


class Values:
    """What the tensors that a native call copies hold now: norms, biases, sinks, frequencies, all but matrices. Nothing
    counts writes through `.data`, so they are compared; for a prompt, not for every token: that takes microseconds."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        copied = (t for t in tensors if t.dim() != 2 and t.device.type == "cpu" and t.is_contiguous())
        self._now = [t.detach().flatten().view(torch.uint8) for t in copied if t.is_floating_point()]
        self._held = [t.clone() for t in self._now]

    def unchanged(self) -> bool:
        return all(map(torch.equal, self._now, self._held))


class Watch:
    """A module and all below it as they are now: children, hooks, modes, numbers and tensors."""

    def __init__(self, module: nn.Module, but: Sequence[nn.Module] = ()) -> None:
        """`but`: those that write to themselves as they compute; their tensors and numbers are not looked at."""
        below, moving = list(module.modules()), set(map(id, but))
        fixed = [m for m in below if id(m) not in moving]
        self._tables = [m._modules for m in below if m._modules]
        self._tables += [t for m in fixed for t in (m._parameters, m._buffers) if t]
        self._held = self._values()
        self._hooks = [t for m in below for t in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooked = list(map(len, self._hooks))
        self._settings = [vars(m) for m in below]
        self._modes = list(map(_MODE, self._settings))
        self._forwards = list(map(_FORWARD, self._settings))
        self._operators = [values for values in self._settings if "loads" in values]
        self._loads = list(map(_LOADS, self._operators))
        self._tensors = [value for value in self._held if isinstance(value, Tensor)]
        self._places = list(map(Tensor.data_ptr, self._tensors))
        self._written = [tensor for tensor in self._tensors if not tensor.is_inference()]  # others do not say
        self._versions = list(map(_VERSION, self._written))
        self._numbers, self._contents = Numbers(fixed), Values(self._tensors)

    def _values(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(_VALUES, self._tables)))

    def unchanged(self, tokens: int) -> bool:
        """For a step of so many tokens: writes through `.data` are seen by those of more than one."""
        now = self._values()
        return (
            len(now) == len(self._held)
            and all(map(operator.is_, now, self._held))
            and list(map(len, self._hooks)) == self._hooked
            and list(map(_MODE, self._settings)) == self._modes
            and all(map(operator.is_, map(_FORWARD, self._settings), self._forwards))
            and list(map(_LOADS, self._operators)) == self._loads
            and list(map(Tensor.data_ptr, self._tensors)) == self._places
            and list(map(_VERSION, self._written)) == self._versions
            and self._numbers.unchanged()
            and (tokens == 1 or self._contents.unchanged())
        )
