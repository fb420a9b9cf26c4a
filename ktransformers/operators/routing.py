"""Which experts a token goes to: one formula with parameters, and how a family's router is recognized as one of it.

A family's router says how it scores, chooses and weighs in code, not in data. Here that code is recognized by its
results on random weights of the same shapes, so that the C library can be told its parameters; `Routing.apply` is the
formula that C is held to. Letters: T tokens, H hidden, E experts, K experts per token.
"""

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransformers import native
from ktransformers.operators.base_operator import BaseInjectedModule, FamilyOperator
from ktransformers.operators.linear import KTransformersLinear, packed_of
from ktransformers.operators.twin import close, noise, original, remembered, tensors_of, twin
from ktransformers.operators.watching import Numbers, Values
from ktransformers.quants.blocks import QUANT_TYPES, Packed


@dataclass(frozen=True, eq=False)
class Routing:
    """`choice` and the tensors it works with: `weight` [E, H], and where there are such `bias` (of the product),
    `choice_bias` and `factors` [E], `norm` [H]."""

    choice: native.Choice
    weight: Tensor
    bias: Tensor | None = None
    choice_bias: Tensor | None = None
    factors: Tensor | None = None
    norm: Tensor | None = None

    def apply(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, H] -> (logits [T, E] float32, weights [T, K] float32, ids int64 [T, K])."""
        logits = self.logits(hidden)
        ids = _largest(self.keys(logits), self.choice.top_k)
        return logits, self.weights(logits, ids), ids

    def logits(self, hidden: Tensor) -> Tensor:
        c, x = self.choice, hidden.float()
        rounded = (lambda t: t.to(hidden.dtype).float()) if c.round else (lambda t: t)
        if self.norm is not None:
            x = rounded(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c.norm_eps))
            x = rounded(rounded(x * self.norm.float()) * c.norm_factor)
        logits = rounded(F.linear(x, self.weight.float(), None if self.bias is None else self.bias.float()))
        return c.cap * torch.tanh(logits / c.cap) if c.cap else logits

    def keys(self, logits: Tensor) -> Tensor:
        """What experts are compared by, [T, E]."""
        c = self.choice
        key = logits if c.bias_on == "logit" else _score(c.score, logits)
        if c.bias_on != "none":
            key = key + self.choice_bias.float()
        if c.groups:
            parts = key.view(len(key), c.groups, -1)
            best = parts.amax(-1) if c.group_by == "max" else parts.topk(2, -1).values.sum(-1)
            kept = _largest(best, c.groups_kept)
            outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
            key = parts.masked_fill(outside.unsqueeze(-1), c.masked).flatten(1)
        return key

    def weights(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Of the chosen `ids` [T, K]."""
        c = self.choice
        chosen = logits.gather(1, ids)
        if c.weigh == "score":
            weights = _score(c.score, logits).gather(1, ids)
        else:
            weights = chosen.softmax(-1) if c.weigh == "softmax" else chosen.sigmoid()
        if c.divide != "none":
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total.clamp(min=c.divide_by) if c.divide == "clamp" else total + c.divide_by)
        weights = weights * c.factor
        return weights if self.factors is None else weights * self.factors.float()[ids]

    def in_c(self, name: str) -> native.Router:
        """The same by the C library, on the memory of `weight`."""
        parts = {"bias": self.bias, "choice_bias": self.choice_bias, "factors": self.factors, "norm": self.norm}
        return native.Router(packed(self.weight), self.choice, **parts, name=name)


def _score(kind: str, logits: Tensor) -> Tensor:
    if kind == "none":
        return logits
    if kind == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return logits.softmax(-1) if kind == "softmax" else logits.sigmoid()


def _largest(key: Tensor, k: int) -> Tensor:
    """Ids of the k largest of [T, E], the lowest first among equals."""
    return key.sort(dim=-1, descending=True, stable=True).indices[:, :k]


# --- recognition ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recognized:
    """A family's router as a `Routing`: where its tensors are, and what it returns beside the ids."""

    choice: native.Choice
    roles: dict[str, str]
    """Role in `Routing` -> dotted name of the tensor in the module, or ARGUMENT."""
    first: str
    """What it returns first: "logits", or their score by this name."""
    dtypes: tuple[torch.dtype, torch.dtype]
    """Of what it returns first, and of the weights."""
    flattens: bool
    """Whether it takes [B, S, H] as it does [B*S, H]."""

    def returned(self, ids: Tensor, weights: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the family returns, from what `native.Router` does."""
        first = logits if self.first == "logits" else _score(self.first, logits)
        return first.to(self.dtypes[0]), weights.to(self.dtypes[1]), ids


ARGUMENT = "(argument)"
"""In `Recognized.roles`: the tensor [E] that the router's forward takes beside its input."""


@remembered
def recognized(router: nn.Module, dtype: torch.dtype) -> Recognized | None:
    """`router` as a `Routing` for inputs of `dtype`, or None where it is none. Looks at no weight's values."""
    return _recognize(router, dtype)


class _Probe:
    """A twin of a router, what it returns for some tokens, and the tensors that may play a part."""

    def __init__(
        self, router: nn.Module, dtype: torch.dtype | None, x: Tensor, plain: bool = False, shift: float = 0.0
    ):
        """`plain`: the first E values of x are the products. `shift` is added to vectors of E."""
        self.module, self.x = twin(router, dtype), x
        self.tensors = tensors_of(self.module)
        hidden = x.shape[-1]
        matrices = [n for n, t in self.tensors.items() if t.dim() == 2 and t.shape[1] == hidden and t.shape[0] > 1]
        (self.matrix,) = matrices
        weight = self.tensors[self.matrix]
        self.experts = len(weight)
        if plain:
            weight.copy_(torch.eye(*weight.shape))
        extra = _bias_argument(router)
        if extra:
            self.tensors[ARGUMENT] = noise(self.experts, seed=7) * 0.3
        self.arguments = [self.tensors[ARGUMENT]] if extra else []
        for name in self.vectors(self.experts) if shift else ():
            self.tensors[name] += shift
        self.flattens, found = self._run()
        self.first, self.weights, self.ids = found
        if self.first.shape != (len(x), self.experts) or self.ids.dtype != torch.int64 or self.ids.dim() != 2:
            raise ValueError("not a router of transformers' contract")

    def _run(self) -> tuple[bool, tuple[Tensor, ...]]:
        """Whether [B, S, H] gives the same as [B*S, H], and what the latter gives."""
        deep = flat = None
        try:
            deep = self.module(self.x.unsqueeze(0), *self.arguments)
        except Exception:  # it wants rows
            pass
        try:
            flat = self.module(self.x, *self.arguments)
        except Exception:  # it wants a batch
            flat = deep
        flattens = deep is not None and all(a.shape == b.shape for a, b in zip(deep, flat, strict=True))
        return flattens, flat

    def vectors(self, size: int) -> list[str]:
        return [n for n, t in self.tensors.items() if t.numel() == size and n != self.matrix and t.is_floating_point()]

    def routing(self, choice: native.Choice, roles: Mapping[str, str]) -> Routing:
        return Routing(choice, self.tensors[self.matrix], **{r: self.tensors[n].flatten() for r, n in roles.items()})


def _bias_argument(router: nn.Module) -> bool:
    """Whether the forward takes a bias beside its input. Raises ValueError where it wants anything else."""
    _, _, *more = inspect.signature(type(router).forward).parameters.values()
    if any("bias" in p.name for p in more[:1]):
        more = more[1:]
        wanted = True
    else:
        wanted = False
    if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in more):
        raise ValueError("a router with more inputs")
    return wanted


def _recognize(router: nn.Module, dtype: torch.dtype) -> Recognized | None:
    hidden = max(t.shape[-1] for t in tensors_of(router).values() if t.dim() == 2)
    random = _Probe(router, torch.float32, noise(64, hidden, seed=1))
    probes = [random]
    if random.experts <= hidden:
        x = noise(12, hidden, seed=2) * 0.5
        x[:4] -= 8.0  # where an epsilon of 1e-6 shows
        x[4:8] -= 60.0  # and one of 1e-20
        probes.append(_Probe(router, torch.float32, x, plain=True))
        probes.append(_Probe(router, torch.float32, x, plain=True, shift=-1.0))  # where 0 beats a key
    settings = _settings(router)
    for choice, roles, first in _candidates(probes, settings):
        return _typed(router, dtype, choice, roles, first, random)
    return None


def _settings(module: nn.Module) -> dict[str, float]:
    """Numbers among the attributes of a module and those below it."""
    found = {k: v for k, v in vars(module).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    for child in module._modules.values():
        if child is not None:
            found = _settings(original(child)) | found
    return found


def _candidates(probes: list[_Probe], settings: Mapping[str, float]) -> Iterator[tuple[native.Choice, dict, str]]:
    """Choices that give what the family gave, for all tokens of all probes; the simplest first."""
    for base, roles, first in _products(probes, settings):
        logits = [p.routing(base, roles).logits(p.x) for p in probes]
        free = [v for v in probes[0].vectors(probes[0].experts) if v not in roles.values()]
        for choice, more in _choices(probes, settings, base, roles, logits, free):
            spare = [v for v in free if v not in more.values()]
            for weighed, factors in _weighings(probes, settings, choice, roles | more, logits, spare):
                yield weighed, roles | more | factors, first


def _products(probes: list[_Probe], settings: Mapping[str, float]) -> Iterator[tuple[native.Choice, dict, str]]:
    p = probes[0]
    hidden = p.x.shape[-1]
    biases = [None, *p.vectors(p.experts)]
    norms = [None, *(p.vectors(hidden) if hidden != p.experts else [])]
    caps = [0.0, *(v for name, v in settings.items() if "cap" in name and v > 0)]
    small = [v for v in settings.values() if 0 < v < 1e-2] or [0.0]
    for bias, norm, cap in itertools.product(biases, norms, caps):
        roles = {r: n for r, n in (("bias", bias), ("norm", norm)) if n is not None}
        scales = itertools.product(small, (1.0, hidden**-0.5)) if norm else [(0.0, 1.0)]
        for eps, scale in scales:
            base = native.Choice(p.ids.shape[1], cap=cap, norm_eps=eps, norm_factor=scale)
            logits = p.routing(base, roles).logits(p.x)
            for first in ("logits", "softmax", "sigmoid", "sqrtsoftplus"):
                if close(p.first, logits if first == "logits" else _score(first, logits)):
                    yield base, roles, first


def _choices(probes, settings, base, roles, logits, free) -> Iterator[tuple[native.Choice, dict]]:
    """What gives the same ids."""
    groups = [settings[n] for n in ("num_group", "n_group") if n in settings]
    kept = settings.get("topk_group")
    grouped = [{}]
    if groups and kept:
        how = itertools.product(("best2", "max"), (-math.inf, 0.0))
        grouped += [dict(groups=groups[0], groups_kept=kept, group_by=by, masked=masked) for by, masked in how]
    on = [("none", None), *itertools.product(("score", "logit"), free)]
    for more, score, (bias_on, vector) in itertools.product(grouped, native.router.SCORES, on):
        choice = replace(base, score=score, bias_on=bias_on, **more)
        added = {} if vector is None else {"choice_bias": vector}
        if all(_same_choice(p, p.routing(choice, roles | added), lo) for p, lo in zip(probes, logits, strict=True)):
            yield choice, added


def _same_choice(p: _Probe, routing: Routing, logits: Tensor) -> bool:
    """Whether the family's ids are the largest keys; which of equals, torch does not say."""
    try:
        keys = routing.keys(logits)
    except RuntimeError:  # groups that do not divide the experts
        return False
    return close(keys.gather(1, p.ids).sort(-1, descending=True).values, keys.topk(p.ids.shape[1]).values, 1e-6)


def _weighings(probes, settings, choice, roles, logits, spare) -> Iterator[tuple[native.Choice, dict]]:
    """What gives the same weights too. The factor is what is left when all else is as the family has it."""
    divides = [("none", 0.0), ("sum", 0.0), ("sum", 1e-20), ("sum", 1e-6)]
    divides += [("clamp", v) for v in settings.values() if 0 < v < 1]
    for weigh, (divide, by), factors in itertools.product(native.router.WEIGH, divides, [None, *spare]):
        more = {} if factors is None else {"factors": factors}
        tried = replace(choice, weigh=weigh, divide=divide, divide_by=by)
        found = [p.routing(tried, roles | more).weights(lo, p.ids) for p, lo in zip(probes, logits, strict=True)]
        ratio = (probes[0].weights / found[0]).flatten().median().item()
        near = [v for v in (1.0, *settings.values()) if math.isclose(v, ratio, rel_tol=1e-4)]
        if near and all(close(p.weights, near[0] * w, 0.0) for p, w in zip(probes, found, strict=True)):
            yield replace(tried, factor=float(near[0])), more


def _typed(router, dtype, choice, roles, first, probe: _Probe) -> Recognized | None:
    """With the dtypes of the module's own tensors: whether it rounds logits, and what it returns."""
    real = _Probe(router, None, noise(256, probe.x.shape[-1], seed=3).to(dtype))
    errors = {}
    for rounds in (False, True) if dtype != torch.float32 else (False,):
        routing = real.routing(replace(choice, round=rounds), roles)
        logits, _, ids = routing.apply(real.x)
        same = (ids.sort(-1).values == real.ids.sort(-1).values).all(-1)
        if same.float().mean() < (0.9 if dtype != torch.float32 else 1.0):
            continue  # equal logits are rare, and leave the choice to a sort
        returned = logits if first == "logits" else _score(first, logits)
        off = (routing.weights(logits, real.ids) - real.weights.float())[same].abs().mean()
        errors[rounds] = ((returned - real.first.float()).abs().mean() + off).item()
    if not errors or min(errors.values()) > 0.02:
        return None
    choice = replace(choice, round=min(errors, key=errors.__getitem__))
    where = {"weight": probe.matrix, **roles}
    return Recognized(choice, where, first, (real.first.dtype, real.weights.dtype), real.flattens)


# --- a family's router in C -------------------------------------------------------------------------------


def may_use_c(module: nn.Module, hidden: Tensor) -> bool:
    """Whether a call on `hidden` may go to C past the family's code: values on the CPU, and no gradients."""
    if type(hidden) is not Tensor or hidden.device.type != "cpu" or hidden.dtype not in FLOATS:
        return False
    if torch.compiler.is_compiling() or module.training:
        return False
    return not (torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in module.parameters())))


class RouterInC:
    """The C router of a family's module, made when it is first wanted and again when one of its tensors or numbers
    changed."""

    def __init__(self) -> None:
        self._made: dict[torch.dtype, tuple | None] = {}

    def forget(self) -> None:
        self._made.clear()

    @property
    def is_made(self) -> bool:
        """Whether there is one for some dtype."""
        return any(made is not None for made in self._made.values())

    def of(
        self, router: nn.Module, dtype: torch.dtype, argument: Tensor | None = None
    ) -> tuple[Recognized, native.Router] | None:
        """`recognized(router)` and the router in C; None where there is none, or its weights are not on the CPU."""
        made = self._made.get(dtype)
        same = made is not None and made[3] is argument and made[4] is router and all(x.unchanged() for x in made[5])
        if not same or not all(_at(place) == pointer for place, pointer in made[2]):
            self._made[dtype] = made = self._make(router, dtype, argument)
        return None if made is None else made[:2]

    @staticmethod
    def _make(router: nn.Module, dtype: torch.dtype, argument: Tensor | None) -> Any:
        found = recognized(router, dtype) if native.available() else None
        if found is None or (ARGUMENT in found.roles.values() and argument is None):
            return None
        parts, places = {}, []
        for role, name in found.roles.items():
            part, place = (argument, None) if name == ARGUMENT else _locate(router, name)
            if part is None:
                return None
            parts[role] = part if role == "weight" else part.flatten()
            places += [] if place is None else [place]
        weight, vectors = parts.pop("weight"), list(parts.values())
        weight = packed(weight) if isinstance(weight, Tensor) else weight
        made = native.Router(weight, found.choice, **parts, name=getattr(router, "key", type(router).__name__))
        watched = Numbers([router, *router._modules.values()]), Values(vectors)
        return found, made, [(place, _at(place)) for place in places], argument, router, watched


def _locate(module: nn.Module, name: str) -> tuple[Any, tuple | None]:
    """A tensor of a module by its dotted name, or the packed weight of a linear operator; and where to look whether it
    is still there. (None, None) where it is neither, or not on the CPU."""
    *path, last = name.split(".")
    for step in path:
        module = module._modules[step]
    if last == "weight" and isinstance(module, KTransformersLinear):
        weight = packed_weight(module)
        return weight, (module.__dict__, "_inner")
    if isinstance(module, BaseInjectedModule) and not isinstance(module, FamilyOperator):
        return None, None
    for table in (module._parameters, module._buffers):
        tensor = table.get(last)
        if tensor is not None and tensor.device.type == "cpu" and tensor.dtype in FLOATS:
            return tensor, (table, last)
    return None, None


def _at(place: tuple) -> Any:
    found = place[0].get(place[1])
    return found.data_ptr() if isinstance(found, Tensor) else id(found)


FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Dtypes that the C library reads -> the name of their weight type."""


def packed(weight: Tensor) -> Packed:
    """A dense matrix [N, K] on the CPU as the C library reads it: its own memory where that is in order."""
    weight = weight.detach().contiguous()
    return Packed(weight.view(torch.uint8).view(-1), QUANT_TYPES[FLOATS[weight.dtype]], tuple(weight.shape))


def packed_weight(linear: nn.Module) -> Packed | None:
    """The weight of a linear layer, operator or not, as the C library reads it; None where it does not."""
    found = packed_of(linear)
    return None if found is None else found[0]
