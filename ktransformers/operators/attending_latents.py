"""What a module of multi-head latent attention computes: factors, norms, rotary positions and gates around it.

Recognized as attending.py recognizes grouped queries: a small copy of the module, two heads of it, runs on a few
tokens, and `Latents.apply` must give the same numbers, for the cache as well: torch code and C share one.
Letters: B batch, S tokens, H hidden, A heads, L latent rank, N and R sizes of the parts of a query without and with a
position, V value size.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ktransformers.models.traits import TRAITS, is_linear
from ktransformers.native import LatentAttention
from ktransformers.native.latent_attention import LatentShape
from ktransformers.operators.attending import (
    HIDDEN,
    epsilon,
    inputs,
    normed,
    random_linear,
    random_norm,
    run_small,
    same,
    shrink_tensors,
    shrunk,
    turned,
)
from ktransformers.operators.linear import packed_dense, packed_of
from ktransformers.operators.twin import remembered
from ktransformers.quants.blocks import Packed

_LINEARS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_NORMS = ("q_a_layernorm", "kv_a_layernorm")
_GATES = ("g_proj", "gate_proj")
_READ = ("F32", "F16", "BF16", "Q8_0")
"""Types of kv_b that C makes keys and values with."""
_FAR = 9973
"""Positions from one token of a trial to the next: what depends on more than angles shows."""


@dataclass(frozen=True)
class Latents:
    """One attention in numbers. `rotates`: it has positions at all. `q_factor`, `kv_factor`: what queries and latents
    are multiplied by. `gate` and `sinks` name the parts of the module that hold them."""

    shape: LatentShape
    rotates: bool = True
    q_factor: float = 1.0
    kv_factor: float = 1.0
    gate: str | None = None
    sinks: str | None = None
    joined: ClassVar[bool] = True

    def apply(
        self, module: nn.Module, hidden: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, S, H], cos and sin [B, S, R or R/2] each, mask [1, 1, S, S] added to scores -> [B, S, H], and what
        is cached, [B, 1, S, L] and [B, 1, S, R]; in torch."""
        s = self.shape
        if getattr(module, "q_a_proj", None) is None:
            q = module.q_proj(hidden)
        else:
            q = module.q_b_proj(normed(module.q_a_proj(hidden), module.q_a_layernorm.weight, s.q_eps))
        q = (q * self.q_factor).view(*hidden.shape[:2], -1, s.plain + s.rotary).transpose(1, 2)
        latent, key = module.kv_a_proj_with_mqa(hidden).split([s.latent, s.rotary], -1)
        latent, key = normed(latent, module.kv_a_layernorm.weight, s.kv_eps) * self.kv_factor, key.unsqueeze(1)
        q, q_turned = q.split([s.plain, s.rotary], -1)
        if self.rotates:
            q_turned, key = turned(q_turned, positions, s), turned(key, positions, s)
        expanded = module.kv_b_proj(latent).view(*hidden.shape[:2], -1, s.plain + s.value_size).transpose(1, 2)
        keys, values = expanded.split([s.plain, s.value_size], -1)
        scores = (q @ keys.transpose(2, 3) + q_turned @ key.transpose(2, 3)) * s.scale + mask
        if self.sinks is not None:
            sinks = getattr(module, self.sinks).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            probs = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            probs = scores.softmax(-1)
        out = (probs @ values).transpose(1, 2).flatten(2)
        if s.gate is not None:
            gate = getattr(module, self.gate)(hidden).sigmoid()
            out = out * (gate if s.gate == "elements" else gate.repeat_interleave(s.value_size, -1))
        return module.o_proj(out), latent.unsqueeze(1), key

    def native(self, operator: nn.Module) -> LatentAttention | None:
        children = operator._modules
        names = {"q": "q_proj", "kv_a": "kv_a_proj_with_mqa", "o": "o_proj"}
        if children.get("q_a_proj") is not None:
            names |= {"q_a": "q_a_proj", "q": "q_b_proj"}
        if self.gate is not None:
            names["g"] = self.gate
        linears = {part: packed_of(children[name]) for part, name in names.items()}
        kv_b = _kv_b(operator)
        if kv_b is None or any(linear is None for linear in linears.values()):
            return None
        weights = {part: weight for part, (weight, _) in linears.items()} | {"kv_b": kv_b}
        norms = {"kv": children["kv_a_layernorm"].weight.detach().float() * self.kv_factor}
        if "q_a" in names:
            norms["q"] = children["q_a_layernorm"].weight
        return LatentAttention(
            weights, replace(self.shape, scale=self.shape.scale * self.q_factor),
            {part: bias for part, (_, bias) in linears.items()}, norms,
            None if self.sinks is None else operator._parameters[self.sinks], operator.key,
        )  # fmt: skip

    @property
    def kept(self) -> tuple[int, int, int]:
        return 1, self.shape.latent, self.shape.rotary


def _kv_b(operator: nn.Module) -> Packed | None:
    """`kv_b_proj` as C reads it for both forms: its own memory, or else the one dense copy that the operator has, or
    that is made here."""
    if (dense := getattr(operator, "_kv_b", None)) is not None:
        return packed_dense(dense)
    found = packed_of(operator._modules["kv_b_proj"])
    if found is None or found[1] is not None:
        return None
    packed = found[0]
    if not isinstance(packed, Packed) or packed.type.name not in _READ:
        dtype = operator._modules["kv_a_layernorm"].weight.dtype
        packed = packed_dense(packed.dequantize().to(dtype))
    return packed


# --- recognition ----------------------------------------------------------------------------------------

def attending_of(module: nn.Module) -> Latents | None:
    """What `module` computes, with its own number of heads; None where it is none of the above."""
    shape = _shape(module) if TRAITS["mla"](module) else None
    found = None if shape is None else _recognize(module, shape)
    return None if found is None else replace(found, shape=replace(found.shape, heads=shape.heads))


def _shape(module: nn.Module) -> LatentShape | None:
    """Sizes, told from the projections; None where they do not fit together."""
    parts = {name: getattr(module, name, None) for name in (*_LINEARS, *_NORMS)}
    q = parts["q_proj"] if parts["q_a_proj"] is None else parts["q_b_proj"]
    linears = [q, *(parts[name] for name in _LINEARS[3:])]
    plain, norm = getattr(module, "qk_nope_head_dim", None), parts["kv_a_layernorm"]
    if not isinstance(plain, int) or norm is None or any(not hasattr(one, "out_features") for one in linears):
        return None
    q, kv_a, kv_b, o = linears
    latent = norm.weight.numel()
    rotary = kv_a.out_features - latent
    heads, left = divmod(q.out_features, plain + rotary) if rotary >= 0 else (0, 1)
    if left or heads < 1 or latent % 16 or rotary % 2 or kv_b.in_features != latent or kv_b.out_features % heads:
        return None
    value = kv_b.out_features // heads - plain
    if value < 1 or o.in_features != heads * value:
        return None
    return LatentShape(heads, latent, plain, rotary, value, scale=1.0)


class _Cache:
    """Keeps what the family's code caches."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []

    def update(self, latent: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.kept.append((latent, key))
        return latent, key


@remembered
def _recognize(module: nn.Module, shape: LatentShape) -> Latents | None:
    small = _small_copy(module, shape)
    if small is None:
        return None
    hidden, (cos, sin), mask = inputs(shape.rotary)
    once = cos[..., : shape.rotary // 2], sin[..., : shape.rotary // 2]
    with torch.random.fork_rng(devices=[]):
        for given, positions, angles in (((cos, sin), (cos, sin), "twice"), (torch.complex(*once), once, "once")):
            cache = _Cache()
            try:
                with torch.device("cpu"):
                    out = run_small(small, hidden, given, mask, cache, _FAR)
                ((latent, key),) = cache.kept
            except Exception:  # positions of another form, or a cache
                continue
            for candidate in _candidates(small, shape, angles):
                if all(map(same, candidate.apply(small, hidden, positions, mask), (out, latent, key))):
                    return candidate
    return None


def _candidates(small: nn.Module, shape: LatentShape, angles: str) -> Iterator[Latents]:
    sinks = next((n for n in ("sinks", "sink") if isinstance(getattr(small, n, None), Tensor)), None)
    gate = next((n for n in _GATES if is_linear(getattr(small, n, None))), None)
    gates = (None,)
    if gate is not None:
        gates = ("heads",) if getattr(small, gate).out_features == _HEADS else ("elements",)
    scales = dict.fromkeys((float(getattr(small, "scaling", 0) or 0), (shape.plain + shape.rotary) ** -0.5))
    scales.pop(0.0, None)
    own = (v for n, v in vars(small).items() if isinstance(v, float) and n not in ("scaling", "attention_dropout"))
    factors = tuple(dict.fromkeys((1.0, *own)))
    q_norm = getattr(small, "q_a_layernorm", None)
    eps = {"q_eps": epsilon(q_norm) if q_norm is not None else 0.0, "kv_eps": epsilon(small.kv_a_layernorm)}
    turns = [(True, kind) for kind in ("halves", "neighbours", "parted")] + [(False, "halves")]
    for (rotates, kind), scale, how, q, kv in itertools.product(turns, scales, gates, factors, factors):
        numbers = replace(shape, heads=_HEADS, scale=scale, pairs=kind, angles=angles, gate=how, **eps)
        yield Latents(numbers, rotates and shape.rotary > 0, q, kv, gate, sinks)


_HEADS = 2


def _small_copy(module: nn.Module, shape: LatentShape) -> nn.Module | None:
    """The module's own code on random weights of two heads. None where it has parts whose small form nobody knows."""
    names = ("num_heads", "num_attention_heads", "num_key_value_heads")
    small, random = shrunk(module, dict.fromkeys(names, _HEADS))
    small.num_key_value_groups = 1
    for name, child in module.named_children():
        if (name in _LINEARS or name in _GATES) and hasattr(child, "out_features"):
            if name in ("q_b_proj", "kv_b_proj") and getattr(child, "bias", None) is not None:  # nobody has one
                return None
            small._modules[name] = random_linear(child, *_small_size(name, child, shape), random)
        elif name in _NORMS and list(child._parameters) == ["weight"]:
            small._modules[name] = random_norm(child, child.weight.numel(), random)
        else:
            return None
    return small if shrink_tensors(small, shape.heads, _HEADS, random) else None


def _small_size(name: str, linear: nn.Module, shape: LatentShape) -> tuple[int, int]:
    """Rows and columns of a matrix that has hidden sizes or heads among them."""
    out, into = linear.out_features, linear.in_features
    if name in ("q_a_proj", "kv_a_proj_with_mqa"):
        return out, HIDDEN
    if name == "o_proj":
        return HIDDEN, into // shape.heads * _HEADS
    return out // shape.heads * _HEADS, into if name in ("q_b_proj", "kv_b_proj") else HIDDEN
