"""What an attention module of grouped queries computes: norms, rotary positions, sinks and gates around softmax(q k) v.

A family says so in code, not in data. Here that code is recognized by its results, as gating.py recognizes gates: a
small copy of the module, one head of keys with the queries that share it, runs on a few tokens, and `Attending.apply`
must give the same numbers. So a renamed class is still known, and one whose code changed is not mistaken.
Letters: B batch, S tokens, H hidden, A heads of queries on C heads of keys and values, D and V sizes of these.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ktransformers.models.traits import is_linear
from ktransformers.native import Attention
from ktransformers.native.self_attention import Shape
from ktransformers.operators.linear import packed_of
from ktransformers.operators.paged_cache import PagedLayer
from ktransformers.operators.twin import generator, original, remembered

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_OUT = ("o_proj", "out_proj")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"),
          ("qk_norm", "qk_norm"))  # fmt: skip
_VALUE_NORM, _GATE_BIAS = "v_norm", "gate_bias"
_Q_FACTOR, _SHARED = "attention_scaling", "shared_kv_states"
"""Arguments of forward: what queries are multiplied by; keys and values that layers hand to others."""
_GATES = ("gate_proj", "g_proj")
HIDDEN, TOKENS = 16, 6
Positions = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Attending:
    """One attention in numbers. `norm_plus_one`: the norms scale by 1 + weight. `rotates`: it has positions at all.

    `out`, `norms`, `value_norm`, `sinks`, `gate` and `gate_bias`, of each head, name the parts of the module that hold
    them; `given_factor` names an argument of its forward, [B or 1, 1, S, 1], that queries are multiplied by. `growth`:
    how queries grow with the number of their token in the cache, of none where it is None. `cap`: scores become
    cap * tanh(score / cap), which C does not compute; 0 for not.
    """

    shape: Shape
    rotates: bool = True
    norms: tuple[str, str] | None = None
    norm_plus_one: bool = False
    sinks: str | None = None
    gate: str | None = None
    out: str = "o_proj"
    value_norm: str | None = None
    gate_bias: str | None = None
    given_factor: str | None = None
    growth: "Growth | None" = None
    cap: float = 0.0
    joined: ClassVar[bool] = False
    narrow: ClassVar[None] = None
    tells: ClassVar[bool] = False

    def apply(
        self, module: nn.Module, hidden: Tensor, positions: Positions, mask: Tensor, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, S, H], cos and sin [B, S, R] each, mask [1, 1, S, S] added to scores, factor [B or 1, S] of
        queries -> [B, S, H], and the keys and values that are cached, [B, C, S, D] and [B, C, S, V]; in torch."""
        s = self.shape
        q, k = module.q_proj(hidden), module.k_proj(hidden)
        v = k if module.v_proj is None else module.v_proj(hidden)
        gate = None
        if s.gate == "in_q":
            q, gate = q.view(*q.shape[:2], s.heads, 2 * s.size).chunk(2, -1)
            q, gate = q.flatten(2), gate.flatten(2)
        elif s.gate is not None:
            gate = getattr(module, self.gate)(hidden)
            gate = gate if s.gate == "elements" else gate.repeat_interleave(s.value_size, -1)
            if self.gate_bias is not None:
                gate = gate + getattr(module, self.gate_bias).repeat_interleave(s.value_size)
        v = self._clipped(v).view(*v.shape[:2], -1, s.value_size).transpose(1, 2)
        if self.value_norm is not None:
            v = normed(v, self._weight(getattr(module, self.value_norm), s.value_size), s.eps)
        v = v * (s.value_factor or 1.0)
        q, k = self._placed(module, q, positions, 0), self._placed(module, k, positions, 1)
        if factor is not None:
            q = q * factor[:, None, :, None]
        shared = s.heads // s.kv_heads
        scores = q @ k.repeat_interleave(shared, 1).transpose(2, 3) * s.scale
        scores = (self.cap * torch.tanh(scores / self.cap) if self.cap else scores) + mask
        if self.sinks is not None:
            sinks = getattr(module, self.sinks).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            probs = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            probs = scores.softmax(-1)
        out = (probs @ v.repeat_interleave(shared, 1)).transpose(1, 2).flatten(2)
        return getattr(module, self.out)(out if gate is None else out * GATES_BY[s.gate_by](gate)), k, v

    def _placed(self, module: nn.Module, x: Tensor, positions: Positions, which: int) -> Tensor:
        """Queries (0) or keys (1) [B, S, heads * D], normed and turned: [B, heads, S, D]."""
        s = self.shape
        norm = getattr(module, self.norms[which]) if self.norms else None
        if norm is not None and s.norm_whole:
            x = self._normed(x, norm)
        x = self._clipped(x).view(*x.shape[:2], -1, s.size).transpose(1, 2)
        if norm is not None and not s.norm_whole and not s.norm_last:
            x = self._normed(x, norm)
        if self.rotates:
            x = turned(x, positions, s)
        return self._normed(x, norm) if norm is not None and s.norm_last else x

    def _clipped(self, x: Tensor) -> Tensor:
        return x.clamp(-self.shape.clip, self.shape.clip) if self.shape.clip else x

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        return normed(x, self._weight(norm, self.shape.size), self.shape.eps)

    def native(self, operator: nn.Module) -> Attention | None:
        keys_again = operator.v_proj is None
        parts = {"q": "q_proj", "k": "k_proj", "v": "k_proj" if keys_again else "v_proj", "o": self.out}
        if self.gate is not None:
            parts["g"] = self.gate
        linears = {part: packed_of(operator._modules[name]) for part, name in parts.items()}
        if self.cap or any(linear is None for linear in linears.values()):
            return None
        biases = {part: bias for part, (_, bias) in linears.items()}
        if self.gate_bias is not None:
            biases["g"] = self._bias_of_gates(operator, biases["g"])
        s, norms = self.shape, {}
        if self.norms is not None:
            norms = {p: self._weight(operator._modules[n], s.size) for p, n in zip("qk", self.norms, strict=True)}
        if self.value_norm is not None:
            norms["v"] = self._weight(operator._modules[self.value_norm], s.value_size)
        sinks = None if self.sinks is None else operator._parameters[self.sinks]
        return Attention(
            {part: weight for part, (weight, _) in linears.items()}, s if self.rotates else replace(s, pairs="none"),
            biases, norms, sinks, operator.key,
        )  # fmt: skip

    def _bias_of_gates(self, operator: nn.Module, bias: Tensor | None) -> Tensor:
        heads = operator._parameters[self.gate_bias].detach().float()
        each = heads if self.shape.gate == "heads" else heads.repeat_interleave(self.shape.value_size)
        return each if bias is None else each + bias

    @property
    def kept(self) -> tuple[int, int, int]:
        return self.shape.kv_heads, self.shape.size, self.shape.value_size

    @property
    def step_of(self) -> tuple[Any, ...]:
        """What of a step is the module's own: modules alike in this may share one."""
        return self.rotates, self.shape.angles, self.given_factor, self.growth

    @property
    def takes(self) -> frozenset[str | None]:
        """Arguments of forward besides those that all take; of those shared by layers it neither reads nor adds any."""
        return frozenset({self.given_factor, _SHARED})

    @property
    def plain(self) -> bool:
        """Whether it takes and gives no more than positions, a mask and a cache."""
        return self.given_factor is None

    def chosen(self, *args: Any) -> None:
        """None: no family's grouped queries have an index that is understood here."""

    def query_factor(self, held: "PagedLayer | Cache", tokens: int, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What the queries of `tokens` more tokens are multiplied by, [B or 1, S]; None for nothing."""
        if self.growth is not None:
            pages = getattr(held, "pages", None)
            lengths = pages.lengths if pages is not None and pages.ragged else [held.get_seq_length()]
            return torch.stack([self.growth.at(length, tokens) for length in lengths])
        given = None if self.given_factor is None else kwargs.get(self.given_factor)
        return None if given is None else given[:, 0, :, 0]

    def _weight(self, norm: nn.Module, width: int) -> Tensor:
        """What the norm multiplies by, in fp32."""
        weight = getattr(norm, "weight", None)
        if weight is None:
            return torch.ones(width, dtype=torch.float32, device="cpu")
        return weight.float() + (1.0 if self.norm_plus_one else 0.0)


@dataclass(frozen=True)
class Growth:
    """1 + slope * log(1 + floor((1 + token) / step)): queries of the tokens of a long context (Llama-4)."""

    slope: float
    step: float

    def at(self, first: int, tokens: int) -> Tensor:
        """[S], of `tokens` tokens from number `first` on."""
        return self.of(torch.arange(first, first + tokens, device="cpu"))

    def of(self, places: Tensor) -> Tensor:
        """Of tokens of these numbers."""
        places = places.float()
        return torch.log1p(torch.floor((places + 1.0) / self.step)) * self.slope + 1.0


GATES_BY: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softplus": nn.functional.softplus}


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., N] by its root mean square, times weight [N]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, positions: Positions, shape: Shape) -> Tensor:
    """The first values of x [B, heads, S, D] turned by cos and sin [B, S, R], or [B, S, R/2] with angles "once"."""
    if shape.angles == "beside":
        positions = positions[0][..., ::2], positions[1][..., ::2]
    cos, sin = (p.unsqueeze(1) for p in positions)
    half = cos.shape[-1] // 2 if shape.angles == "twice" else cos.shape[-1]
    cos, sin = cos[..., :half], sin[..., :half]
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (part[..., :half], part[..., half:]) if shape.pairs == "halves" else (part[..., 0::2], part[..., 1::2])
    a, b = a * cos - b * sin, b * cos + a * sin
    part = torch.stack((a, b), -1).flatten(-2) if shape.pairs == "neighbours" else torch.cat((a, b), -1)
    return torch.cat((part, rest), -1)


# --- recognition ----------------------------------------------------------------------------------------

def attending_of(module: nn.Module) -> Attending | None:
    """What `module` computes, with its own numbers of heads; None where it is none of the above."""
    sizes = _sizes(module)
    found = None if sizes is None else _recognize(module, sizes)
    if found is None:
        return None
    return replace(found, shape=replace(found.shape, heads=sizes.heads, kv_heads=sizes.kv_heads))


@dataclass(frozen=True)
class _Sizes:
    heads: int
    kv_heads: int
    size: int
    value_size: int
    gated: bool
    norm_whole: bool


def _sizes(module: nn.Module) -> _Sizes | None:
    """Told from the projections and the head size; None where they do not fit together."""
    names = [*PROJECTIONS, _out_of(module)]
    if getattr(module, "v_proj", 0) is None:  # keys are the values
        names[2] = "k_proj"
    linears = [getattr(module, name, None) for name in names]
    if any(linear is None or not hasattr(linear, "in_features") for linear in linears):
        return None
    q, k, v, o = linears
    size = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if not isinstance(size, int) or size < 1 or k.out_features % size:
        return None
    kv_heads = k.out_features // size
    if v.out_features % kv_heads:
        return None
    value_size = v.out_features // kv_heads
    heads, left = divmod(o.in_features, value_size)
    gated = q.out_features == 2 * heads * size
    if left or heads % kv_heads or not gated and q.out_features != heads * size:
        return None
    norms = [getattr(module, name, None) for name, _ in _NORMS]
    wide = any(getattr(norm, "weight", None) is not None and norm.weight.numel() != size for norm in norms)
    return _Sizes(heads, kv_heads, size, value_size, gated, wide)


def _out_of(module: nn.Module) -> str:
    return next((name for name in _OUT if name in module._modules), _OUT[0])


@remembered
def _recognize(module: nn.Module, sizes: _Sizes) -> Attending | None:
    group = sizes.heads // sizes.kv_heads
    small = _small_copy(module, sizes, group)
    if small is None:
        return None
    growth = _growth_of(small)
    cached = int(3 * growth.step) - TOKENS // 2 if growth else 0  # the trial's tokens are on both sides of a step
    with torch.random.fork_rng(devices=[]):
        for width in (sizes.size, sizes.size // 2):
            hidden, positions, mask = inputs(width)
            for angles, given, read in _forms(positions):
                cache, more = Cache(cached), _more_of(small)
                try:
                    with torch.device("cpu"):
                        out = run_small(small, hidden, given, mask, cache, more=more)
                except Exception:  # neither this width nor this form is one that the family's code takes
                    continue
                if more.get(_SHARED):  # it hands its keys on to other layers
                    return None
                for candidate in _candidates(small, sizes, group, angles, width < sizes.size):
                    factor = candidate.query_factor(cache, TOKENS, more)
                    if _agrees(candidate, (out, *cache.kept), small, hidden, read, mask, factor):
                        return candidate
    return None


def _more_of(small: nn.Module) -> dict[str, Any]:
    """What a family's forward may ask for besides what all are given."""
    names = inspect.signature(type(small).forward).parameters
    more = {_SHARED: {}, _Q_FACTOR: torch.linspace(0.5, 2.0, TOKENS, device="cpu")[None, None, :, None]}
    return {name: value for name, value in more.items() if name in names}


def _forms(positions: Positions) -> Iterator[tuple[str, Any, Positions]]:
    """The forms in which families hand positions to attention: how angles lie, what is given, and as cos and sin."""
    half = positions[0].shape[-1] // 2
    cos, sin = (p[..., :half] for p in positions)
    yield "twice", positions, positions
    beside = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    yield "beside", beside, beside
    yield "once", torch.complex(cos, sin), (cos, sin)


class Cache:
    """Keeps what the family's code caches. `length`: of tokens before."""

    def __init__(self, length: int = 0) -> None:
        self.kept: tuple[Tensor, ...] = ()
        self.length = length

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Positions:
        self.kept = (*self.kept, keys, values)
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return self.length


def _growth_of(module: nn.Module) -> Growth | None:
    slope, step = getattr(module, "attn_scale", None), getattr(module, "floor_scale", None)
    return Growth(float(slope), float(step)) if slope and step else None


def _agrees(candidate: Attending, expected: tuple[Tensor, ...], small: nn.Module, *given: Any) -> bool:
    try:
        return all_same(candidate.apply(small, *given), expected)
    except RuntimeError:  # shapes of another candidate
        return False


def all_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return len(found) == len(expected) and all(map(same, found, expected))


def same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _candidates(small: nn.Module, sizes: _Sizes, group: int, angles: str, partly: bool) -> Iterator[Attending]:
    norms = next((pair for pair in _NORMS if all(getattr(small, n, None) is not None for n in pair)), None)
    value_norm = _VALUE_NORM if getattr(small, _VALUE_NORM, None) is not None else None
    sinks = next((n for n in ("sinks", "sink") if isinstance(getattr(small, n, None), Tensor)), None)
    gate = next((n for n in _GATES if is_linear(getattr(small, n, None))), None)
    gates = ["in_q"] if sizes.gated else ["elements", "heads"] if gate else [None]
    by = GATES_BY if gates != [None] else ("sigmoid",)
    with_norm = norms or (value_norm, value_norm)
    eps = epsilon(getattr(small, with_norm[0])) if with_norm[0] else 0.0
    whole = norms is not None and sizes.norm_whole
    clip = float(getattr(small.config, "clip_qkv", None) or 0.0)
    scales = dict.fromkeys((float(getattr(small, "scaling", 0) or 0), sizes.size**-0.5, 1.0))
    scales.pop(0.0, None)
    turns = [(True, kind) for kind in ("halves", "neighbours", "parted")] + [(False, "halves")]
    after, plus = ((False, True), (False, True)) if norms else ((False,), (False,))
    forms = (angles, "once") if partly and angles == "twice" else (angles,)
    growths = dict.fromkeys((None, _growth_of(small)))
    caps = dict.fromkeys((float(getattr(small, "attn_logit_softcapping", None) or 0.0), 0.0))
    for (rotates, kind), form, last, one, how, through, scale, factor, growth, cap in itertools.product(
        turns, forms, after, plus, gates, by, scales, own_factors(small), growths, caps
    ):
        if last and whole:
            continue
        shape = Shape(
            group, 1, sizes.size, sizes.value_size, scale, eps, norm_whole=whole, norm_last=last, pairs=kind,
            angles=form, gate=how, gate_by=through, clip=clip, value_factor=0.0 if factor == 1.0 else factor,
        )  # fmt: skip
        yield Attending(
            shape, rotates, norms, one, sinks, gate, _out_of(small), value_norm,
            _GATE_BIAS if isinstance(getattr(small, _GATE_BIAS, None), Tensor) else None,
            _Q_FACTOR if _Q_FACTOR in inspect.signature(type(small).forward).parameters else None, growth, cap,
        )  # fmt: skip


def own_factors(module: nn.Module) -> tuple[float, ...]:
    """1, and each number of the module's own that something may be multiplied by."""
    known = ("scaling", "attention_dropout", "attn_scale", "floor_scale")
    return tuple(dict.fromkeys((1.0, *(v for n, v in vars(module).items() if isinstance(v, float) and n not in known))))


def epsilon(norm: nn.Module) -> float:
    return float(next((getattr(norm, n) for n in ("variance_epsilon", "eps", "norm_eps") if hasattr(norm, n)), 0.0))


def _small_copy(module: nn.Module, sizes: _Sizes, group: int) -> nn.Module | None:
    """The module's own code on small random weights: one head of keys, the queries that share it. None where it has
    parts whose small form nobody knows."""
    small, random = shrunk(module, {"num_heads": group, "num_attention_heads": group, "num_key_value_heads": 1})
    rows = {"q_proj": group * sizes.size * (2 if sizes.gated else 1), "k_proj": sizes.size, "v_proj": sizes.value_size}
    for name, child in module.named_children():
        if name in PROJECTIONS or name in _GATES or name == _out_of(module):
            out = rows.get(name, HIDDEN if name in _OUT else child.out_features // sizes.kv_heads)
            into = group * sizes.value_size if name in _OUT else HIDDEN
            small._modules[name] = random_linear(child, out, into, random)
        elif not any(name in pair for pair in (*_NORMS, [_VALUE_NORM])):
            return None
        elif list(child._parameters) == ["weight"]:
            heads = (group if name.startswith("q") else 1) if child.weight.numel() != sizes.size else 1
            width = child.weight.numel() if name == _VALUE_NORM else sizes.size * heads
            small._modules[name] = random_norm(child, width, random)
        elif list(child._parameters):
            return None
    return small if shrink_tensors(small, sizes.heads, group, random) else None


def shrunk(module: nn.Module, heads: Mapping[str, int]) -> tuple[nn.Module, torch.Generator]:
    """A copy of a family's module to put small parts into, with `heads` and hidden size told to it and its config."""
    small = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        small.__dict__[table] = dict(module.__dict__[table])
    small.config = copy.deepcopy(module.config)
    small.config._attn_implementation = "eager"
    for target in (small, small.config):
        for name, value in {**heads, "hidden_size": HIDDEN}.items():
            if name in vars(target):
                setattr(target, name, value)
    return small, generator(0)


def _parameter(*shape: int, random: torch.Generator, scale: float = 1.0) -> nn.Parameter:
    numbers = torch.randn(shape, generator=random, device="cpu", dtype=torch.float32) * scale
    return nn.Parameter(numbers, requires_grad=False)


def random_linear(like: nn.Module, out: int, into: int, random: torch.Generator) -> nn.Linear:
    """A small linear layer, with a bias if `like` has one."""
    linear = nn.Linear(into, out, bias=getattr(like, "bias", None) is not None, device="meta")
    linear.weight = _parameter(out, into, random=random, scale=into**-0.5)
    if linear.bias is not None:
        linear.bias = _parameter(out, random=random)
    return linear


def random_norm(norm: nn.Module, width: int, random: torch.Generator) -> nn.Module:
    """The family's norm, of `width` random weights."""
    small = copy.copy(original(norm))
    small.__dict__["_parameters"] = {**small._parameters, "weight": _parameter(width, random=random)}
    return small


def shrink_tensors(small: nn.Module, heads: int, few: int, random: torch.Generator) -> bool:
    """Give the module's own parameters of a number a head `few` of them; False where it has tensors of other kinds."""
    for name, parameter in small._parameters.items():
        if parameter is not None and parameter.numel() != heads:
            return False
        small._parameters[name] = None if parameter is None else _parameter(few, random=random)
    small.eval()
    return all(buffer is None for buffer in small._buffers.values())


def inputs(width: int) -> tuple[Tensor, Positions, Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    hidden = torch.randn(1, TOKENS, HIDDEN, generator=generator, device="cpu", dtype=torch.float32)
    angles = torch.rand(1, TOKENS, width // 2, generator=generator, device="cpu", dtype=torch.float32) * 6
    angles = torch.cat((angles, angles), -1)
    mask = torch.full((1, 1, TOKENS, TOKENS), float("-inf"), device="cpu", dtype=torch.float32).triu(1)
    return hidden, (angles.cos() * 1.25, angles.sin() * 1.25), mask  # longer than one: yarn's are


def run_small(
    small: nn.Module, hidden: Tensor, positions: Any, mask: Tensor, cache: Any = None, stride: int = 1,
    more: Mapping[str, Any] | None = None, whole: bool = False,
) -> Any:  # fmt: skip
    """The family's own forward, with what it asks for by name. Tokens are `stride` positions apart. [1, S, H], or all
    that it gives, with `whole`."""
    given: Mapping[str, Any] = {
        **(more or {}),
        "position_embeddings": positions, "attention_mask": mask, "past_key_values": cache,
        "position_ids": torch.arange(TOKENS, device="cpu")[None] * stride,
    }  # fmt: skip
    names = inspect.signature(type(small).forward).parameters
    out = type(small).forward(small, hidden, **{name: value for name, value in given.items() if name in names})
    return out[0] if isinstance(out, tuple) and not whole else out
