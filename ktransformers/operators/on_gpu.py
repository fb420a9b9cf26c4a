"""How a weight lies on a GPU: packed or dense, by the operator that a rule names and by what the checkpoint has.

Said here once: operators load by it, and plans and simulations count by it. The packed forms are kernels/layouts.py's.
Letters: N rows, K columns, E experts.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.kernels.floats import Floats, Loss
from ktransformers.kernels.layouts import Layout, layout_of, quantized_layout, scaled_layout
from ktransformers.kernels.words import Words
from ktransformers.loaders.base import TensorInfo
from ktransformers.loaders.schemes import ScaledInfo
from ktransformers.machine.streams import streams_of
from ktransformers.native.checks import DTYPES
from ktransformers.operators.base_operator import warn_once
from ktransformers.operators.inner_ops import OBSOLETE_OPS, given

PACKS = ("KLinearMarlin", "VLinearMarlin", "KExpertsMarlin")
"""Operators that keep any weight packed: what has no packed form of its own is quantized at load."""

NUM_BITS, GROUP_SIZE = 4, 64
"""Of a weight that is quantized at load, unless a rule says otherwise (`num_bits`, `group_size`): upstream's."""

ALLOWED = {"num_bits": (4, 8), "group_size": (32, 64, 128, -1)}
"""-1: one scale a row."""


# --- what is kept how -------------------------------------------------------------------------------------------------


def layout_on_gpu(
    name: str | None, stored: Layout | None, columns: int, dtype: torch.dtype, kwargs: Mapping[str, Any] | None = None
) -> Layout | None:
    """The packed form of a weight of `columns` on a GPU, or None where it is dense there.

    name: the operator that a rule names. With None, or KLinearFP8, weights keep their own bits, and those that have no
    packed form are dense. stored: the form of the checkpoint's bits, None for none. dtype: the model's.
    """
    today = OBSOLETE_OPS.get(given(name), given(name))
    if today not in (None, "KLinearFP8", *PACKS):
        return None
    if stored is not None and stored.takes(columns):
        return stored
    if today not in PACKS:
        return None
    kwargs = kwargs or {}
    made = quantized_layout(dtype, columns, kwargs.get("num_bits", NUM_BITS), kwargs.get("group_size", GROUP_SIZE))
    return made if made.takes(columns) else None


def layout_of_infos(infos: Iterable[TensorInfo]) -> Layout | None:
    """The packed form of a weight that the checkpoint has as these tensors; the larger of gate's and up's.

    None where one of them has none, or there are more than two, which no kernel takes.
    """
    try:
        layouts = {_layout_of_info(info) for info in infos}
    except UnsupportedError:
        return None
    return max(layouts, key=lambda layout: (layout.bits, layout.group)) if 0 < len(layouts) <= 2 else None


def _layout_of_info(info: TensorInfo) -> Layout:
    if not isinstance(info, ScaledInfo):
        return layout_of(info.type.name)
    scale = "F32" if info.factor is not None and info.scale_type != "E8M0" else info.scale_type
    ordered = info.order is not None and not info.trivial_order
    return scaled_layout(
        info.type.name, info.shape[-1], info.scale_cols, scale, info.zeros is not None, info.zero_bias, ordered
    )


def as_packed(weight: Any, dtype: torch.dtype, quantizing: tuple[int, int] | None, loss: Loss) -> Any:
    """A weight [N, K], numbers or published bytes, as `words` takes it: as it is, or to be quantized.

    Raises UnsupportedError where it has no packed form, and `quantizing`, (bits, columns a scale), is None or does not
    suit its columns.
    """
    try:
        if not isinstance(weight, Tensor) and layout_of(weight).groups(weight.shape[-1]):
            return weight
        problem = UnsupportedError("Numbers have no packed form on a GPU.")
    except (UnsupportedError, WeightError) as error:
        problem = UnsupportedError(str(error))
    if quantizing is None:
        raise problem
    made = Floats(weight.detach() if isinstance(weight, Tensor) else weight, dtype, *quantizing, loss)
    try:
        made.layout.groups(made.shape[-1])
    except WeightError as error:
        raise UnsupportedError(str(error)) from error
    return made


# --- what is said -----------------------------------------------------------------------------------------------------


def quantizing_problems(kwargs: Mapping[str, Any]) -> list[str]:
    """What is wrong with a rule's `num_bits` and `group_size`."""
    asked = {word: kwargs[word] for word in ALLOWED if word in kwargs}
    named = {OBSOLETE_OPS.get(name, name) for name in (kwargs.get("generate_op"), kwargs.get("prefill_op"))}
    if asked and not named & set(PACKS):
        found = ", ".join(sorted(filter(given, named))) or "no operator"
        words = " and ".join(asked)
        return [f"{words}: only {', '.join(PACKS)} quantize weights, and this rule names {found}; leave {words} out"]
    return [
        f"{word}: found {value!r}, expected {', '.join(map(str, ALLOWED[word]))}"
        + (" (one scale a row)" if word == "group_size" else "")
        for word, value in asked.items()
        if value not in ALLOWED[word] or isinstance(value, bool)
    ]


def report(operator: Any, loss: Loss) -> float | None:
    """Say once what quantizing takes from weights; the share that it took from this operator's, None where nothing."""
    if not loss.total:
        return None
    bits, group = operator.quantizing
    scales = "one scale a row" if group == -1 else f"a scale for {group} columns"
    kind = f"{type(operator).__name__}: what has no packed form on a GPU is quantized to {bits} bits, {scales}"
    warn_once(f"{kind}; {operator.key} loses {loss.share:.1%} (root mean square)", about=kind)
    return loss.share


def form_of(words: Words, lost: float | None) -> str:
    """For a line about an operator: ", Q4_K", or ", INT4 (lost 5.9%)"."""
    return f", {words.layout.name}" + ("" if lost is None else f" (lost {lost:.1%})")


# --- memory that kernels use in turn ----------------------------------------------------------------------------------


class Workspace:
    """float32 memory of one model on one device, for kernels that follow one another."""

    MOST = 1 << 24
    """Elements that are kept. Long prompts take more, for which torch's allocator is asked each time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: list[Tensor] = []  # all that there was, for captured graphs have its addresses

    @classmethod
    def of(cls, model: Any, device: torch.device) -> "Workspace":
        """That of a model, which its weights stand for; one of its own for None."""
        if model is None:
            return cls(device)
        each = _workspaces.setdefault(model, {})
        return each.setdefault(device, cls(device))

    def take(self, size: int) -> Tensor | None:
        """So many elements or more; None where the caller has to allocate."""
        if self._memory and self._memory[-1].numel() >= size:
            return self._memory[-1]
        streams = streams_of(self.device)
        if size > self.MOST or streams is not None and streams.is_capturing():
            return None
        size = 1 << max(size - 1, 1).bit_length()
        self._memory.append(torch.empty(size, dtype=torch.float32, device=self.device))
        return self._memory[-1]


_workspaces: weakref.WeakKeyDictionary[Any, dict[torch.device, Workspace]] = weakref.WeakKeyDictionary()


def computable(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in, for activations of `dtype`."""
    return dtype if dtype in DTYPES else torch.float32
