"""Low-rank adapters on parameters, as stock PEFT puts them there: `LoraConfig(target_parameters=[...])`.

PEFT wraps the module that has a parameter `gate_up_proj` or `down_proj` [E, ., .] in a `ParamWrapper`, and for every
call adds B @ A to it: a matrix as large as all experts of the layer, which nothing here has in dense form. For
`KTransformersExperts` the wrapper hands the two factors over instead, and the experts compute x A' B' beside their own
product. So it does for `weight` of a `KTransformersLinear`, the one way that PEFT has to a dense layer whose name it
takes for an expert's. Names and shapes of what is trained and saved are PEFT's own; merging is `kt merge`'s.
PEFT is not imported here: it is met when it asks operators for their parameters.

Letters: E experts, r rank, H hidden, I intermediate; a parameter of the family is [E, out, in], or [E, in, out].
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.errors import UnsupportedError
from ktransformers.loaders.lora import from_peft
from ktransformers.models.traits import is_interleaved, is_transposed
from ktransformers.operators.base_operator import version, warn_once
from ktransformers.operators.packed_weight import PackedWeight


@dataclass(frozen=True)
class Factors:
    """y += scale * (x A') B' for each expert: `a` [E, r, in], `b` [E, out, r], views of what is trained. Gate rows of
    `b` come before those of up."""

    a: Tensor
    b: Tensor
    scale: float

    def of(self, expert: int, x: Tensor) -> Tensor:
        """The term for rows [t, in] of one expert: [t, out]."""
        a, b = self.a[expert].to(x), self.b[expert].to(x)
        return (x @ a.T @ b.T) * self.scale

    def joined(self, other: Factors) -> Factors:
        """The sum of two, as one of the sum of their ranks."""
        scaled = torch.cat((self.b * self.scale, other.b * other.scale), 2)
        return Factors(torch.cat((self.a, other.a), 1), scaled, 1.0)


@dataclass(frozen=True)
class Adapters:
    """What is added inside the experts of a layer; None where a product has no adapter."""

    first: Factors | None = None
    down: Factors | None = None

    def flat(self) -> Iterator[Tensor | float | None]:
        """As the C library takes them, on the CPU: A, B and scale of each."""
        for factors in (self.first, self.down):
            yield from (None, None, 0.0) if factors is None else (factors.a.cpu(), factors.b.cpu(), factors.scale)


def parameters_of(experts: nn.Module) -> Iterator[tuple[str, Any]]:
    """What PEFT finds as the parameters of `experts`, a KTransformersExperts: those that can have an adapter. None
    where a rule says SkipLoRA."""
    if getattr(experts, "skips_lora", False):
        return
    family = experts.orig_module
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if isinstance(family._parameters.get(name), Tensor) and name not in experts._parameters:
            yield name, weight_of(experts, name)


def weight_of(experts: nn.Module, name: str) -> PackedWeight:
    given = experts.orig_module._parameters[name]
    instead = "leave the experts to transformers (class: default) to have one, or merge an adapter with `kt merge`"
    return PackedWeight(f"{experts.key}.{name}", given.shape, given.dtype, experts.active.device, instead)


def beside(out: Tensor, x: Tensor, wrapper: nn.Module, active: list[str]) -> Tensor:
    """`out` of a linear layer for `x`, with the wrapper's adapters added: as PEFT adds those of linear layers."""
    dtype = out.dtype
    for name in active:
        a, b = wrapper.lora_A[name], wrapper.lora_B[name]
        term = b(a(wrapper.lora_dropout[name](x.to(a.weight.device, a.weight.dtype)))) * wrapper.scaling[name]
        out = out + term.to(out.device)
    return out.to(dtype)


def meet_peft() -> None:
    """Have PEFT's wrapper of parameters hand its factors to our operators; of all other modules nothing changes."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    if layer is None or getattr(layer.ParamWrapper, "hands_over", False):
        return
    wrapper = layer.ParamWrapper
    for name in ("_activate_lora", "merge"):
        if not hasattr(wrapper, name):
            raise UnsupportedError(f"PEFT {sys.modules['peft'].__version__}: ParamWrapper has no {name}; adapters on "
                                   "experts are tested with PEFT 0.21.")  # fmt: skip
    wrapper._activate_lora = _instead_of(wrapper._activate_lora, _hand_over, lambda operator: True)
    wrapper.merge = _instead_of(wrapper.merge, _refuse_merge, lambda operator: "weight" not in operator._parameters)
    wrapper.__init__ = _with_dropout(wrapper.__init__, 1)
    wrapper.update_layer = _with_dropout(wrapper.update_layer, 0)
    wrapper.hands_over = True


def _with_dropout(theirs: Any, name_at: int) -> Any:
    """PEFT refuses dropout in adapters of parameters, whose input it never sees. Linear layers here see it; experts go
    without, since the input of down is within the C call. `name_at`: the argument that names the adapter."""

    @functools.wraps(theirs)
    def method(wrapper: nn.Module, *args: Any, config: Any = None, **kwargs: Any) -> None:
        target = args[0] if args and isinstance(args[0], nn.Module) else wrapper
        while hasattr(target, "base_layer"):
            target = target.base_layer
        if problem := getattr(target, "adapter_problem", str)():
            raise UnsupportedError(f"{problem}.")
        if config is None or not config.lora_dropout or not hasattr(target, "adapters"):
            theirs(wrapper, *args, config=config, **kwargs)
            return
        plain = copy.copy(config)
        plain.lora_dropout = 0.0
        theirs(wrapper, *args, config=plain, **kwargs)
        if isinstance(target, nn.Linear):
            wrapper.lora_dropout[args[name_at]] = nn.Dropout(config.lora_dropout)
        else:
            found = f"lora_dropout {config.lora_dropout:g}: linear layers' adapters have it, those of experts do not"
            warn_once(f"{found}. PEFT loads the saved adapter once adapter_config.json says 0")

    return method


def _instead_of(theirs: Any, ours: Any, concerns: Callable[[nn.Module], bool]) -> Any:
    @functools.wraps(theirs)
    def method(wrapper: nn.Module, *args: Any, **kwargs: Any) -> Any:
        operator = wrapper.get_base_layer()
        mine = hasattr(operator, "adapters") and concerns(operator)
        return ours(operator, wrapper, *args, **kwargs) if mine else theirs(wrapper, *args, **kwargs)

    return method


@contextmanager
def _hand_over(operator: nn.Module, wrapper: nn.Module, active: list[str]) -> Iterator[None]:
    """While it lasts, `operator` computes with the wrapper's active adapters."""
    before, names = operator.adapters, [name for name in active if name in wrapper.lora_A]
    if names and isinstance(operator, nn.Linear):
        operator.adapters = wrapper, names
    elif names:
        operator.adapters = _in_experts(operator, wrapper, names)
    try:
        yield
    finally:
        operator.adapters = before


def _in_experts(experts: nn.Module, wrapper: nn.Module, names: list[str]) -> Adapters:
    """Those that `experts` have already, of another wrapper, and adapters of this one."""
    found = [_factors(experts, wrapper, name) for name in names]
    role = "down" if wrapper.parameter_name == "down_proj" else "first"
    before = experts.adapters
    made = {"first": None if before is None else before.first, "down": None if before is None else before.down}
    made[role] = functools.reduce(Factors.joined, found)
    return Adapters(**made)


def _factors(experts: nn.Module, wrapper: nn.Module, adapter: str) -> Factors:
    """An adapter of the wrapper as `Factors`; (o, i) of a 3-D parameter [E, o, i] are PEFT's (out, in).

    Without gradients they are fp32 in the order that C reads, kept for as long as the adapter is the same: PEFT's own
    has experts innermost in B, and to order it anew took longer than a token's products."""
    parameters = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    family, scale = experts.orig_module, wrapper.scaling[adapter]
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    state = [x for p in parameters for x in (p.data_ptr(), version(p))]
    kept = wrapper.__dict__.setdefault("ordered_factors", {})  # no part of the module: not saved, not moved
    if trained:
        kept.clear()
    elif adapter in kept and kept[adapter][0] == state:
        return Factors(*kept[adapter][1], scale)
    exchanged = wrapper._did_swap_in_out_features == is_transposed(family)
    a, b = from_peft(*parameters, wrapper.num_experts, exchanged)
    if wrapper.parameter_name == "gate_up_proj" and is_interleaved(family):
        b = torch.cat((b[:, 0::2], b[:, 1::2]), 1)
    if not trained:
        a, b = (t.detach().to(torch.float32).contiguous() for t in (a, b))
        kept[adapter] = state, (a, b)
    return Factors(a, b, scale)


def _refuse_merge(operator: nn.Module, wrapper: nn.Module, *args: Any, **kwargs: Any) -> None:
    raise UnsupportedError(
        f"{operator.key}: computes from the checkpoint's packed bytes, into which no adapter can be merged here. "
        "`kt merge` writes a checkpoint with the adapter merged in; for chat and serving the adapter stays beside it."
    )
