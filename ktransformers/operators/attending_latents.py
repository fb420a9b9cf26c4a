"""What a module of multi-head latent attention computes: factors, norms, rotary positions and gates around it.

Recognized as attending.py recognizes grouped queries: a small copy of the module, two heads of it, runs on a few
tokens, and `Latents.apply` must give the same numbers, for the cache as well: torch code and C share one.
A sparse index (DeepSeek-V3.2), which chooses the keys that each query sees, stays the family's own module: what it
chooses narrows the mask.
Letters: B batch, S tokens, T cached ones, H hidden, A heads, L latent rank, N and R sizes of the parts of a query
without and with a position, V value size, K keys that an index chooses.
"""

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ktransformers.models.traits import TRAITS, is_linear
from ktransformers.native import LatentAttention
from ktransformers.native.latent_attention import LatentShape
from ktransformers.operators.attending import (
    HIDDEN,
    TOKENS,
    Cache,
    all_same,
    epsilon,
    inputs,
    normed,
    own_factors,
    random_linear,
    random_norm,
    run_small,
    shrink_tensors,
    shrunk,
    turned,
)
from ktransformers.operators.attention_inputs import CHOSEN
from ktransformers.operators.linear import packed_dense, packed_of
from ktransformers.operators.paged_cache import PagedIndexedLayer, PagedLayer
from ktransformers.operators.twin import remembered
from ktransformers.quants.blocks import Packed

_QUERIES = ("q_proj", "q_b_proj", "q_gate_proj")
_OF_LATENTS = ("q_b_proj", "q_gate_proj", "kv_b_proj")
_LINEARS = (*_QUERIES, "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_KEY_NORM = "k_rope_only_layernorm"
_NORMS = ("q_a_layernorm", "kv_a_layernorm", _KEY_NORM)
_INDEX = "indexer"
_GATES = ("g_proj", "gate_proj")
_READ = ("F32", "F16", "BF16", "Q8_0")
"""Types of kv_b that C makes keys and values with."""
_FAR = 9973
"""Positions from one token of a trial to the next: what depends on more than angles shows."""


@dataclass(frozen=True)
class Latents:
    """One attention in numbers. `rotates`: it has positions at all. `q_factor`, `kv_factor`: what queries and latents
    are multiplied by. `queries`, `key_norm`, `gate` and `sinks` name the parts of the module that hold them.

    `narrow`: "index" where the module has an index of its own, "chosen" where it is given what another chose;
    `index_factor`: what the latents of queries are multiplied by for the index; `tells`: it gives back what was chosen.
    """

    shape: LatentShape
    rotates: bool = True
    q_factor: float = 1.0
    kv_factor: float = 1.0
    gate: str | None = None
    sinks: str | None = None
    queries: str = "q_proj"
    key_norm: str | None = None
    narrow: str | None = None
    index_factor: float = 1.0
    tells: bool = False
    joined: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = frozenset({CHOSEN})

    @property
    def step_of(self) -> tuple[Any, ...]:
        return self.rotates, self.shape.angles

    @property
    def plain(self) -> bool:
        """Whether it takes and gives no more than positions, a mask and a cache."""
        return self.narrow is None and not self.tells

    def query_factor(self, held: PagedLayer, tokens: int, kwargs: Mapping[str, Any]) -> None:
        """None: no family's latents have any."""

    def apply(
        self, module: nn.Module, hidden: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, S, H], cos and sin [B, S, R or R/2] each, mask [1, 1, S, S] added to scores -> [B, S, H], and what
        is cached, [B, 1, S, L] and [B, 1, S, R]; in torch."""
        s = self.shape
        made, x = getattr(module, self.queries), hidden
        if getattr(module, "q_a_proj", None) is not None:
            raw = module.q_a_proj(hidden)
            x = normed(raw, module.q_a_layernorm.weight, s.q_eps)
            x = torch.cat((x, raw), -1) if made.in_features > x.shape[-1] else x
        q = (made(x) * self.q_factor).view(*hidden.shape[:2], s.heads, -1).transpose(1, 2)
        q, gate = q.split([s.plain + s.rotary, q.shape[-1] - s.plain - s.rotary], -1)
        latent, key = module.kv_a_proj_with_mqa(hidden).split([s.latent, s.rotary], -1)
        latent, key = normed(latent, module.kv_a_layernorm.weight, s.kv_eps) * self.kv_factor, key.unsqueeze(1)
        if self.key_norm is not None:
            key = normed(key, getattr(module, self.key_norm).weight, s.key_eps)
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
        if s.gate == "in_q":
            out = out * gate.transpose(1, 2).flatten(2).sigmoid()
        elif s.gate is not None:
            gate = getattr(module, self.gate)(hidden).sigmoid()
            out = out * (gate if s.gate == "elements" else gate.repeat_interleave(s.value_size, -1))
        return module.o_proj(out), latent.unsqueeze(1), key

    def native(self, operator: nn.Module) -> LatentAttention | None:
        children = operator._modules
        names = {"q": self.queries, "kv_a": "kv_a_proj_with_mqa", "o": "o_proj"}
        if children.get("q_a_proj") is not None:
            names["q_a"] = "q_a_proj"
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
        if self.key_norm is not None:
            norms["key"] = children[self.key_norm].weight
        return LatentAttention(
            weights, replace(self.shape, scale=self.shape.scale * self.q_factor),
            {part: bias for part, (_, bias) in linears.items()}, norms,
            None if self.sinks is None else operator._parameters[self.sinks], operator.key,
        )  # fmt: skip

    @property
    def kept(self) -> tuple[int, int, int]:
        return 1, self.shape.latent, self.shape.rotary

    def chosen(self, operator: nn.Module, held: PagedLayer, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Numbers of the keys that the queries of `hidden` [B, S, H] see, [B, S, K]; None where no index says so."""
        if self.narrow is None:
            return None
        if self.narrow == "chosen":
            return kwargs[CHOSEN]
        if isinstance(held, PagedIndexedLayer):
            held.align()
        latents = operator.q_a_layernorm(operator.q_a_proj(hidden)) * self.index_factor
        return operator.indexer(
            hidden, latents, kwargs["position_embeddings"], kwargs["attention_mask"][:, 0], kwargs.get("position_ids"),
            past_key_values=kwargs.get("past_key_values"),
        )  # fmt: skip


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
    linears = [parts[name] for name in (_queries_of(module), "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    plain, norm = getattr(module, "qk_nope_head_dim", None), parts["kv_a_layernorm"]
    if not isinstance(plain, int) or norm is None or any(not hasattr(one, "out_features") for one in linears):
        return None
    q, kv_a, kv_b, o = linears
    latent = norm.weight.numel()
    rotary = kv_a.out_features - latent
    gated = getattr(module, "v_head_dim", 0) if _queries_of(module) == "q_gate_proj" else 0
    heads, left = divmod(q.out_features, plain + rotary + gated) if rotary >= 0 else (0, 1)
    if left or heads < 1 or latent % 16 or rotary % 2 or kv_b.in_features != latent or kv_b.out_features % heads:
        return None
    value = kv_b.out_features // heads - plain
    if value < 1 or o.in_features != heads * value:
        return None
    return LatentShape(heads, latent, plain, rotary, value, scale=1.0)


def _queries_of(module: nn.Module) -> str:
    """The name of what makes queries."""
    return next((name for name in _QUERIES if getattr(module, name, None) is not None), _QUERIES[0])


class _Chooses(nn.Module):
    """In the place of an index: chooses a few keys, the query's own among them, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: tuple[Any, ...] = ()
        own = torch.arange(TOKENS, device="cpu")
        self.keys = torch.stack((own, own // 2, (own + 3) % TOKENS), -1)[None].to(torch.int32)

    def forward(
        self, hidden_states: Tensor, q_resid: Tensor, position_embeddings: Any, attention_mask: Tensor,
        position_ids: Any, past_key_values: Any = None,
    ) -> Tensor:  # fmt: skip
        self.given = (hidden_states, q_resid, position_embeddings, attention_mask, past_key_values)
        return self.keys

    def mask(self) -> Tensor:
        """[1, 1, S, S], added to scores."""
        mask = torch.full((1, 1, TOKENS, TOKENS), float("-inf"), device="cpu")
        return mask.scatter(-1, self.keys[None].long(), 0.0)


def _narrowing(small: nn.Module, chooses: _Chooses, out: Any, *given: Any) -> dict[str, Any] | None:
    """How an index narrows the mask, as fields of `Latents`; None where it is used otherwise than in `Latents.chosen`.
    `out`: what the small module gave; `given`: hidden, positions, mask and cache that it was given."""
    tells = isinstance(out, tuple) and len(out) == 3 and out[2] is chooses.keys
    if small._modules.get(_INDEX) is None:
        takes = CHOSEN in inspect.signature(type(small).forward).parameters
        return {"narrow": "chosen", "tells": tells} if takes else {}
    hidden, positions, mask, cache = given
    if len(chooses.given) != 5 or chooses.given[2] is not positions or chooses.given[4] is not cache:
        return None
    latents = normed(small.q_a_proj(hidden), small.q_a_layernorm.weight, epsilon(small.q_a_layernorm))
    for factor in own_factors(small):
        if all_same((hidden, latents * factor, mask[:, 0]), (*chooses.given[:2], chooses.given[3])):
            return {"narrow": "index", "index_factor": factor, "tells": tells}
    return None


@remembered
def _recognize(module: nn.Module, shape: LatentShape) -> Latents | None:
    small = _small_copy(module, shape)
    if small is None:
        return None
    hidden, (cos, sin), mask = inputs(shape.rotary)
    once = cos[..., : shape.rotary // 2], sin[..., : shape.rotary // 2]
    with torch.random.fork_rng(devices=[]):
        for given, positions, angles in (((cos, sin), (cos, sin), "twice"), (torch.complex(*once), once, "once")):
            cache, chooses = Cache(), _Chooses()
            if small._modules.get(_INDEX) is not None:
                small._modules[_INDEX] = chooses
            try:
                with torch.device("cpu"):
                    out = run_small(small, hidden, given, mask, cache, _FAR, {CHOSEN: chooses.keys}, whole=True)
            except Exception:  # positions of another form, or a cache
                continue
            narrowing = _narrowing(small, chooses, out, hidden, given, mask, cache)
            if narrowing is None:
                continue
            seen = mask + chooses.mask() if narrowing else mask
            expected = (out[0] if isinstance(out, tuple) else out, *cache.kept)
            for candidate in _candidates(small, shape, angles):
                if all_same(candidate.apply(small, hidden, positions, seen), expected):
                    return replace(candidate, **narrowing)
    return None


def _candidates(small: nn.Module, shape: LatentShape, angles: str) -> Iterator[Latents]:
    sinks = next((n for n in ("sinks", "sink") if isinstance(getattr(small, n, None), Tensor)), None)
    gate = next((n for n in _GATES if is_linear(getattr(small, n, None))), None)
    gates = ("in_q",) if _queries_of(small) == "q_gate_proj" else (None,)
    if gate is not None:
        gates = ("heads",) if getattr(small, gate).out_features == _HEADS else ("elements",)
    scales = dict.fromkeys((float(getattr(small, "scaling", 0) or 0), (shape.plain + shape.rotary) ** -0.5))
    scales.pop(0.0, None)
    factors = own_factors(small)
    q_norm = getattr(small, "q_a_layernorm", None)
    key_norm = getattr(small, _KEY_NORM, None)
    eps = {"q_eps": epsilon(q_norm) if q_norm is not None else 0.0, "kv_eps": epsilon(small.kv_a_layernorm),
           "key_eps": epsilon(key_norm) if key_norm is not None else 0.0}  # fmt: skip
    names = {"queries": _queries_of(small), "key_norm": None if key_norm is None else _KEY_NORM}
    turns = [(True, kind) for kind in ("halves", "neighbours", "parted")] + [(False, "halves")]
    for (rotates, kind), scale, how, q, kv in itertools.product(turns, scales, gates, factors, factors):
        numbers = replace(shape, heads=_HEADS, scale=scale, pairs=kind, angles=angles, gate=how, **eps)
        yield Latents(numbers, rotates and shape.rotary > 0, q, kv, gate, sinks, **names)


_HEADS = 2


def _small_copy(module: nn.Module, shape: LatentShape) -> nn.Module | None:
    """The module's own code on random weights of two heads. None where it has parts whose small form nobody knows."""
    names = ("num_heads", "num_attention_heads", "num_key_value_heads")
    small, random = shrunk(module, dict.fromkeys(names, _HEADS))
    small.num_key_value_groups = 1
    for name, child in module.named_children():
        if (name in _LINEARS or name in _GATES) and hasattr(child, "out_features"):
            if name in _OF_LATENTS and getattr(child, "bias", None) is not None:  # nobody has one
                return None
            small._modules[name] = random_linear(child, *_small_size(name, child, shape), random)
        elif name in _NORMS and list(child._parameters) == ["weight"]:
            small._modules[name] = random_norm(child, child.weight.numel(), random)
        elif name != _INDEX:
            return None
    return small if shrink_tensors(small, shape.heads, _HEADS, random) else None


def _small_size(name: str, linear: nn.Module, shape: LatentShape) -> tuple[int, int]:
    """Rows and columns of a matrix that has hidden sizes or heads among them."""
    out, into = linear.out_features, linear.in_features
    if name in ("q_a_proj", "kv_a_proj_with_mqa"):
        return out, HIDDEN
    if name == "o_proj":
        return HIDDEN, into // shape.heads * _HEADS
    return out // shape.heads * _HEADS, into if name in _OF_LATENTS else HIDDEN
