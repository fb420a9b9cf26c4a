"""What an attention module of grouped queries computes: norms, rotary positions, sinks and gates around softmax(q k) v.

A family says so in code, not in data. Here that code is recognized by its results, as gating.py recognizes gates: a
small copy of the module, one head of keys with the queries that share it, runs on a few tokens, and `Attending.apply`
must give the same numbers. So a renamed class is still known, and one whose code changed is not mistaken.
Letters: B batch, S tokens, H hidden, A heads of queries on C heads of keys and values, D and V sizes of these.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ktransformers.models.traits import is_linear
from ktransformers.native import Attention
from ktransformers.native.self_attention import Shape
from ktransformers.operators.linear import packed_of
from ktransformers.operators.twin import generator, original, remembered

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))
_GATES = ("gate_proj", "g_proj")
HIDDEN, TOKENS = 16, 6


@dataclass(frozen=True)
class Attending:
    """One attention in numbers. `norm_plus_one`: the norms scale by 1 + weight. `rotates`: it has positions at all.

    `norms`, `sinks` and `gate` name the parts of the module that hold them.
    """

    shape: Shape
    rotates: bool = True
    norms: tuple[str, str] | None = None
    norm_plus_one: bool = False
    sinks: str | None = None
    gate: str | None = None
    joined: ClassVar[bool] = False

    def apply(self, module: nn.Module, hidden: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """hidden [B, S, H], cos and sin [B, S, R] each, mask [1, 1, S, S] added to scores -> [B, S, H]; in torch."""
        s = self.shape
        q, k, v = (getattr(module, name)(hidden) for name in PROJECTIONS[:3])
        gate = None
        if s.gate == "in_q":
            q, gate = q.view(*q.shape[:2], s.heads, 2 * s.size).chunk(2, -1)
            q, gate = q.flatten(2), gate.flatten(2)
        elif s.gate is not None:
            gate = getattr(module, self.gate)(hidden)
            gate = gate if s.gate == "elements" else gate.repeat_interleave(s.value_size, -1)
        q, k = self._placed(module, q, positions, 0), self._placed(module, k, positions, 1)
        v = self._clipped(v).view(*v.shape[:2], -1, s.value_size).transpose(1, 2)
        shared = s.heads // s.kv_heads
        scores = q @ k.repeat_interleave(shared, 1).transpose(2, 3) * s.scale + mask
        if self.sinks is not None:
            sinks = getattr(module, self.sinks).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            probs = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            probs = scores.softmax(-1)
        out = (probs @ v.repeat_interleave(shared, 1)).transpose(1, 2).flatten(2)
        return module.o_proj(out if gate is None else out * gate.sigmoid())

    def _placed(self, module: nn.Module, x: Tensor, positions: tuple[Tensor, Tensor], which: int) -> Tensor:
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
        return normed(x, self.norm_weight(norm), self.shape.eps)

    def native(self, operator: nn.Module) -> Attention | None:
        parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
        if self.gate is not None:
            parts["g"] = self.gate
        linears = {part: packed_of(operator._modules[name]) for part, name in parts.items()}
        if any(linear is None for linear in linears.values()):
            return None
        norms = {}
        if self.norms is not None:
            norms = {p: self.norm_weight(operator._modules[n]) for p, n in zip("qk", self.norms, strict=True)}
        sinks = None if self.sinks is None else operator._parameters[self.sinks]
        shape = self.shape if self.rotates else replace(self.shape, pairs="none")
        return Attention(
            {part: weight for part, (weight, _) in linears.items()}, shape,
            {part: bias for part, (_, bias) in linears.items()}, norms, sinks, operator.key,
        )  # fmt: skip

    @property
    def kept(self) -> tuple[int, int, int]:
        return self.shape.kv_heads, self.shape.size, self.shape.value_size

    def norm_weight(self, norm: nn.Module) -> Tensor:
        """What the norm multiplies by, in fp32."""
        return norm.weight.float() + (1.0 if self.norm_plus_one else 0.0)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., N] by its root mean square, times weight [N]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, positions: tuple[Tensor, Tensor], shape: Shape) -> Tensor:
    """The first values of x [B, heads, S, D] turned by cos and sin [B, S, R], or [B, S, R/2] with angles "once"."""
    cos, sin = (p.unsqueeze(1) for p in positions)
    half = cos.shape[-1] if shape.angles == "once" else cos.shape[-1] // 2
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
    linears = [getattr(module, name, None) for name in PROJECTIONS]
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


@remembered
def _recognize(module: nn.Module, sizes: _Sizes) -> Attending | None:
    group = sizes.heads // sizes.kv_heads
    small = _small_copy(module, sizes, group)
    if small is None:
        return None
    with torch.random.fork_rng(devices=[]):
        for width in (sizes.size, sizes.size // 2):
            hidden, positions, mask = inputs(width)
            try:
                with torch.device("cpu"):
                    expected = run_small(small, hidden, positions, mask)
            except Exception:  # this width is none that the family's code takes
                continue
            for candidate in _candidates(small, sizes, group, width):
                if _agrees(candidate, expected, small, hidden, positions, mask):
                    return candidate
    return None


def _agrees(candidate: Attending, expected: Tensor, small: nn.Module, *given: Any) -> bool:
    try:
        return same(candidate.apply(small, *given), expected)
    except RuntimeError:  # shapes of another candidate
        return False


def same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _candidates(small: nn.Module, sizes: _Sizes, group: int, width: int) -> Iterator[Attending]:
    norms = next((pair for pair in _NORMS if all(getattr(small, n, None) is not None for n in pair)), None)
    sinks = next((n for n in ("sinks", "sink") if isinstance(getattr(small, n, None), Tensor)), None)
    gate = next((n for n in _GATES if is_linear(getattr(small, n, None))), None)
    gates = ["in_q"] if sizes.gated else ["elements", "heads"] if gate else [None]
    eps = epsilon(getattr(small, norms[0])) if norms else 0.0
    whole = norms is not None and sizes.norm_whole
    clip = float(getattr(small.config, "clip_qkv", None) or 0.0)
    scales = dict.fromkeys((float(getattr(small, "scaling", 0) or 0), sizes.size**-0.5, 1.0))
    scales.pop(0.0, None)
    pairs = ("halves", "neighbours", "parted")
    after, plus = ((False, True), (False, True)) if norms else ((False,), (False,))
    angles = ("twice", "once") if width < sizes.size else ("twice",)
    for rotates, kind, once, last, one, gating, scale in itertools.product(
        (True, False), pairs, angles, after, plus, gates, scales
    ):
        if last and whole or not rotates and kind != "halves":
            continue
        shape = Shape(
            group, 1, sizes.size, sizes.value_size, scale, eps, norm_whole=whole, norm_last=last, pairs=kind,
            angles=once, gate=gating, clip=clip,
        )  # fmt: skip
        yield Attending(shape, rotates, norms, one, sinks, gate)


def epsilon(norm: nn.Module) -> float:
    return float(next((getattr(norm, n) for n in ("variance_epsilon", "eps", "norm_eps") if hasattr(norm, n)), 0.0))


def _small_copy(module: nn.Module, sizes: _Sizes, group: int) -> nn.Module | None:
    """The module's own code on small random weights: one head of keys, the queries that share it. None where it has
    parts whose small form nobody knows."""
    small, random = shrunk(module, {"num_heads": group, "num_attention_heads": group, "num_key_value_heads": 1})
    rows = {"q_proj": group * sizes.size * (2 if sizes.gated else 1), "k_proj": sizes.size, "v_proj": sizes.value_size}
    for name, child in module.named_children():
        if name in PROJECTIONS or name in _GATES:
            out = rows.get(name, HIDDEN if name == "o_proj" else child.out_features // sizes.kv_heads)
            into = group * sizes.value_size if name == "o_proj" else HIDDEN
            small._modules[name] = random_linear(child, out, into, random)
        elif any(name in pair for pair in _NORMS) and list(child._parameters) == ["weight"]:
            heads = (group if name.startswith("q") else 1) if child.weight.numel() != sizes.size else 1
            small._modules[name] = random_norm(child, sizes.size * heads, random)
        else:
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


def inputs(width: int) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    hidden = torch.randn(1, TOKENS, HIDDEN, generator=generator, device="cpu", dtype=torch.float32)
    angles = torch.rand(1, TOKENS, width // 2, generator=generator, device="cpu", dtype=torch.float32) * 6
    angles = torch.cat((angles, angles), -1)
    mask = torch.full((1, 1, TOKENS, TOKENS), float("-inf"), device="cpu", dtype=torch.float32).triu(1)
    return hidden, (angles.cos(), angles.sin()), mask


def run_small(
    small: nn.Module, hidden: Tensor, positions: Any, mask: Tensor, cache: Any = None, stride: int = 1
) -> Tensor:
    """The family's own forward, with what it asks for by name. Tokens are `stride` positions apart."""
    given: Mapping[str, Any] = {
        "position_embeddings": positions, "attention_mask": mask, "past_key_values": cache,
        "position_ids": torch.arange(TOKENS, device="cpu")[None] * stride,
    }  # fmt: skip
    names = inspect.signature(type(small).forward).parameters
    out = type(small).forward(small, hidden, **{name: value for name, value in given.items() if name in names})
    return out[0] if isinstance(out, tuple) else out
