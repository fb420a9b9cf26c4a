"""Decoder layers: attention or delta net, MLP, the norms around them and the sums in one native call where all parts
compute on the CPU.

Where a family's layer has norms, and what it adds to what, is recognized by what its parts are given, as routing.py
recognizes routers: its own code runs on a twin whose parts are stand-ins. A layer of another kind, or one with parts
that are observed, trained, or elsewhere, stays the family's own, and its parts are whatever operators they are.
Letters: B batch, S tokens, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ktransformers import native
from ktransformers.models.traits import TRAITS
from ktransformers.native import torch_ops
from ktransformers.operators.base_operator import FamilyOperator, version
from ktransformers.operators.combining import is_observed
from ktransformers.operators.delta_net import KeptStates, KGatedDeltaNet
from ktransformers.operators.experts_in_c import mlp_in_c
from ktransformers.operators.gpu_layer import GpuSteps, gpu_steps
from ktransformers.operators.moe import ComputedInC
from ktransformers.operators.native_operator import NativeOperator
from ktransformers.operators.norms import Normed, normed_as
from ktransformers.operators.paged_attention import PagedAttention
from ktransformers.operators.paged_cache import PagedLayer
from ktransformers.operators.routing import may_use_c
from ktransformers.operators.twin import Listener, close, noise, original, remembered, tensors_of, twin
from ktransformers.operators.watching import Numbers, Values, Watch

_POSITIONS = "position_embeddings"


@dataclass(frozen=True)
class Half:
    """How a part joins the sum: keep * x + factor * after(part(before(x))). Names of children; None: no norm."""

    part: str
    before: str | None
    after: str | None
    keep: float
    factor: float


@dataclass(frozen=True)
class Stacking:
    """What mixes tokens, attention or a delta net, then the MLP; `parallel`: that is given the sum as the mixer was."""

    first: Half
    second: Half
    parallel: bool
    norms: dict[str, Normed]
    """What the norms compute."""

    @property
    def children(self) -> list[str]:
        return [self.first.part, self.second.part, *self.norms]


@remembered
def stacking_of(layer: nn.Module) -> Stacking | None:
    """How `layer` is put together, or None where it is otherwise."""
    return _recognize(layer)


def _gives(scale: float, pair: bool) -> Callable[..., Any]:
    """In the place of mixer or MLP: a fixed function of what it is given."""

    def give(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        gave = torch.tanh(hidden_states.roll(1, -1) * scale)
        return (gave, None) if pair else gave

    return give


def _recognize(layer: nn.Module) -> Stacking | None:
    children = {name: child for name, child in layer._modules.items() if child is not None}
    attention = [n for n, c in children.items() if TRAITS["attention"](original(c))]
    nets = [n for n, c in children.items() if TRAITS["delta_net"](original(c))]
    norms = [n for n, c in children.items() if TRAITS["norm"](original(c)) and tensors_of(c).keys() == {"weight"}]
    rest = [n for n in children if n not in (*attention, *nets, *norms)]
    if len(attention + nets) != 1 or not norms or len(rest) != 1 or layer._parameters or layer._buffers:
        return None
    x = noise(1, 5, original(children[norms[0]]).weight.shape[-1], seed=3)
    (mixer,), told = attention + nets, dict.fromkeys(("attention_mask", "position_embeddings"))
    if nets:
        told |= {"attention_mask": object(), "past_key_values": object()}
    for pair in (False, True):  # gpt-oss's block gives its router's weights, too
        parts = {name: Listener(twin(children[name], torch.float32), children[name]) for name in norms}
        parts[mixer] = Listener(_gives(1.5, not nets), children[mixer])
        parts[rest[0]] = Listener(_gives(0.7, pair), children[rest[0]])
        try:
            out = twin(layer, torch.float32, parts)(x, **told)
            return None if nets and not _is_told(parts[mixer], told) else _stacking(x, out, parts, mixer, rest[0])
        except (TypeError, ValueError):
            if pair:
                raise
    return None


def _is_told(net: Listener, told: dict[str, Any]) -> bool:
    """Whether a delta net was given mask and cache as the layer was, and nothing besides."""
    _, kwargs, _ = net.once
    expected = {"cache_params": told["past_key_values"], "attention_mask": told["attention_mask"]}
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return others.keys() == expected.keys() and all(others[name] is value for name, value in expected.items())


def _stacking(x: Tensor, out: Any, parts: dict[str, Listener], mixer: str, mlp: str) -> Stacking | None:
    """By what was heard of all parts when the layer gave `out` for x."""
    heard = {name: _heard(part, x) for name, part in parts.items()}
    norms = {name: heard[name] for name in parts if name not in (mixer, mlp)}
    (before_a, seen_a), (after_a, gave_a) = _around(norms, *heard[mixer])
    (before_m, seen_m), (after_m, gave_m) = _around(norms, *heard[mlp])
    parallel = close(seen_m, x)
    factors = _factors([x, gave_a, gave_m], out) if parallel else _factors([x, gave_a], seen_m)
    if not isinstance(out, Tensor) or not close(seen_a, x) or factors is None:
        return None
    joined = (1.0, factors[2]) if parallel else _factors([seen_m, gave_m], out)
    found = {name: normed_as(parts[name].inner, *norms[name]) for name in norms}
    if joined is None or None in found.values() or found.keys() != {before_a, after_a, before_m, after_m} - {None}:
        return None
    first, second = Half(mixer, before_a, after_a, *factors[:2]), Half(mlp, before_m, after_m, *joined)
    return Stacking(first, second, parallel, found)


def _heard(part: Listener, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a part was given and what it gave, in the shape of x."""
    args, kwargs, gave = part.once
    given = args[0] if args else kwargs["hidden_states"]
    return given.reshape(x.shape), (gave[0] if isinstance(gave, tuple) else gave).reshape(x.shape)


Named = tuple[str | None, Tensor]


def _around(norms: dict[str, tuple[Tensor, Tensor]], given: Tensor, gave: Tensor) -> tuple[Named, Named]:
    """The norm before a part and what it was given; the norm after it and what it gave. Or no name, and the part's."""
    before = next(((name, before) for name, (before, after) in norms.items() if close(after, given)), (None, given))
    return before, next(((name, after) for name, (before, after) in norms.items() if close(before, gave)), (None, gave))


def _factors(terms: list[Tensor], result: Any) -> list[float] | None:
    """Of each term, so that their sum is `result`; None where there are no such."""
    if not isinstance(result, Tensor) or result.shape != terms[0].shape:
        return None
    columns = torch.stack([term.flatten() for term in terms], -1).double()
    found = torch.linalg.lstsq(columns, result.flatten()[:, None].double()).solution.flatten()
    factors = [round(float(factor), 7) for factor in found]  # what is left is rounding of the sums
    return factors if close(sum(f * term for f, term in zip(factors, terms, strict=True)), result) else None


class KDecoderLayer(FamilyOperator):
    """hidden [B, S, H] -> [B, S, H]."""

    replaces = "a decoder layer (attention and an MLP among its children)"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stacking: Stacking | None = None
        self._mlp: tuple[nn.Module, Watch, native.Experts | None] | None = None
        self._layer: tuple[tuple, native.Layers] | None = None
        self.gpu_steps: GpuSteps | None = None
        self._norms: list[int] = []
        self._numbers: Numbers | None = None
        self._contents: Values | None = None

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["layer"](module)

    def load(self) -> None:
        super().load()
        played = is_in_torch_dispatch_mode()  # a simulation: there are no weights to compute with
        if native.available() and not played:
            self._recognize()
        self._norms = self._own_norms()
        self.gpu_steps = gpu_steps(self)

    def unload(self) -> None:
        super().unload()
        self.gpu_steps = self.stacking = self._layer = self._mlp = None

    def unmade(self) -> dict[str, Any]:
        return {"_mlp": None, "_layer": None}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.gpu_steps is not None and not args and self._own_norms() == self._norms:
            out = self.gpu_steps.forward(self, hidden_states, kwargs)
            if out is not None:
                return out
        found = None if args else self.native_step(hidden_states, kwargs)
        if found is None:
            return super().forward(hidden_states, *args, **kwargs)
        layer, held = found
        if isinstance(held, KeptStates):
            return layer.forward(hidden_states, [held])
        positions, mask, first, factor = self.mixer.step(held, hidden_states, kwargs)
        out = layer.forward(hidden_states, [held.pages], [positions], mask, first, q_factors=[factor])
        held.advanced()
        return out

    def _recognize(self) -> None:
        self.stacking, self._layer = stacking_of(self.orig_module), None
        norms = [] if self.stacking is None else [self._modules[name] for name in self.stacking.norms]
        self._numbers, self._contents = Numbers([self, *norms]), Values(norm.weight for norm in norms)

    def renew(self, tokens: int) -> None:
        """Forget what numbers and small tensors were before; before a step of so many tokens, as in Watch."""
        if self.stacking is None:
            return
        if not self._numbers.unchanged() or tokens > 1 and not self._contents.unchanged():
            self._recognize()
        if self._mlp is not None and not self._mlp[1].unchanged(tokens):
            self._mlp = None
        if self.stacking is not None and isinstance(self.mixer, NativeOperator):
            self.mixer.renew(tokens)

    def _own_norms(self) -> list[int]:
        return [] if self.stacking is None else [id(self._modules[name]) for name in self.stacking.norms]

    @property
    def mixer(self) -> nn.Module:
        """The attention or delta net among its children."""
        return self._modules[self.stacking.first.part]

    def native_step(
        self, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[native.Layers, PagedLayer | KeptStates] | None:
        """The layer in C and its part of the cache, or None where its parts must compute one by one."""
        made = self._made(hidden)
        held = None if made is None else self._held(hidden, kwargs)
        return None if held is None else (made, held)

    def native_layer(self, hidden: Tensor) -> native.Layers | None:
        """The layer in C, on whatever cache of the kind that it computes on; None as above."""
        made = self._made(hidden)
        if made is None:
            return None
        if isinstance(self.mixer, KGatedDeltaNet):
            return made if self.mixer.computes(hidden, {}) else None
        return None if self.mixer.pages(hidden, {}) is None else made

    def _held(self, hidden: Tensor, kwargs: dict[str, Any]) -> PagedLayer | KeptStates | None:
        """The layer's part of the cache that these arguments bring."""
        if not isinstance(self.mixer, KGatedDeltaNet):
            return self.mixer.pages(hidden, kwargs)
        others = {name: value for name, value in kwargs.items() if name not in ("past_key_values", _POSITIONS)}
        return self.mixer.step(hidden, {**others, "cache_params": kwargs.get("past_key_values")})

    def _made(self, hidden: Tensor) -> native.Layers | None:
        if self.stacking is None or not may_use_c(self, hidden) or torch_ops.is_traced(hidden):
            return None
        self.renew(hidden.shape[1])
        if self.stacking is None or self._own_norms() != self._norms:  # others since: nobody knows what they compute
            return None
        children = self._modules
        mixer, mlp = self.mixer, children[self.stacking.second.part]
        if not isinstance(mixer, (PagedAttention, KGatedDeltaNet)) or is_observed(self, self.stacking.children):
            return None
        narrow = isinstance(mixer, PagedAttention) and mixer.attending is not None and mixer.attending.narrow
        if mixer.native is None or narrow:  # an index sees what the first norm gives
            return None
        second = self._second(mlp, hidden.dtype)
        if second is None:
            return None
        norms = [children[name].weight for name in self.stacking.norms]
        key = (mixer.native, second, *((norm.data_ptr(), version(norm)) for norm in norms))
        if self._layer is None or self._layer[0] != key:
            joinings = [self._joining(half) for half in (self.stacking.first, self.stacking.second)]
            made = native.Layer(mixer.native, second, *joinings, self.stacking.parallel, self.key)
            self._layer = key, native.Layers([made])
        return self._layer[1]

    def _joining(self, half: Half) -> native.Joining:
        before, after = (
            None if name is None else self.stacking.norms[name].native(self._modules[name])
            for name in (half.before, half.after)
        )
        return native.Joining(before, after, half.keep, half.factor)

    def _second(self, mlp: nn.Module, dtype: torch.dtype) -> native.Block | native.Experts | None:
        if isinstance(mlp, ComputedInC):
            return mlp.in_c(dtype)
        if self._mlp is None or self._mlp[0] is not mlp:
            self._mlp = mlp, Watch(mlp), mlp_in_c(mlp)
        return self._mlp[2]

    def extra_repr(self) -> str:
        return "one native call" if self._layer is not None else ""
