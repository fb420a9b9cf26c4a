"""Gated delta nets: on the CPU the step of one new token a sequence is one native call.

The rule is that of Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule". A family says in code
how projections, convolution, decay, norm and gate surround it. That code is recognized by its results, as attending.py
does it: a small copy of the module takes one step, and `Delta.apply` must give the same numbers, in what is kept, too.
States stay in transformers' own cache, where C changes them, so any step may be transformers' code instead: prompts
are, and whatever `forward` here does not know. Letters: B sequences, H hidden, G key heads of size K, A value heads of
size V, W width of the convolution, C = 2*G*K + A*V its channels.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ktransformers.errors import UnsupportedError
from ktransformers.models.traits import TRAITS
from ktransformers.native import DeltaNet, torch_ops
from ktransformers.native.checks import DTYPES
from ktransformers.native.delta_net import ORDERS, Shape
from ktransformers.operators.attending import HIDDEN, epsilon, normed, random_linear, random_norm, same
from ktransformers.operators.attention_inputs import CHANGE_NOTHING
from ktransformers.operators.linear import packed_of
from ktransformers.operators.native_operator import NativeOperator
from ktransformers.operators.twin import generator, original, remembered

try:
    from transformers.cache_utils import LinearAttentionLayer
except ImportError:  # another release: then its own code computes
    LinearAttentionLayer = None

_INPUTS = {order: tuple(f"in_proj_{part}" for part in parts) for order, parts in ORDERS.items()}
_OTHERS = ("conv1d", "norm", "out_proj")
_L2_EPS = 1e-6
"""A constant in the families' code."""


@dataclass(frozen=True)
class Delta:
    """One delta net in numbers. `norm_plus_one`: the norm scales by 1 + weight."""

    shape: Shape
    norm_plus_one: bool = False

    def apply(self, module: nn.Module, hidden: Tensor, conv: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, 1, H], conv [B, C, W], states [B, A, K, V] -> [B, 1, H], and these two after it; in torch."""
        s = self.shape
        mixed, z, b, a = self._projected(module, hidden[:, 0])
        conv = torch.cat((conv[..., 1:], mixed.unsqueeze(-1)), -1)
        mixed = (conv * module.conv1d.weight.squeeze(1)).sum(-1)
        if module.conv1d.bias is not None:
            mixed = mixed + module.conv1d.bias
        mixed = nn.functional.silu(mixed)
        keys = s.key_heads * s.key_size
        q, k = (self._keys(x) for x in mixed[:, : 2 * keys].chunk(2, -1))
        q = q * s.key_size**-0.5
        v = mixed[:, 2 * keys :].unflatten(-1, (-1, s.value_size))
        decay = torch.exp(-module.A_log.exp() * nn.functional.softplus(a + module.dt_bias))
        states = states * decay[..., None, None]
        change = (v - (states * k.unsqueeze(-1)).sum(-2)) * b.sigmoid().unsqueeze(-1)
        states = states + k.unsqueeze(-1) * change.unsqueeze(-2)
        out = normed((states * q.unsqueeze(-1)).sum(-2), self.norm(module), s.norm_eps)
        out = out * nn.functional.silu(z.unflatten(-1, (-1, s.value_size)))
        return module.out_proj(out.flatten(1)).unsqueeze(1), conv, states

    def _keys(self, x: Tensor) -> Tensor:
        """Queries or keys [B, G*K], each of length one, for each value head: [B, A, K]."""
        x = x.unflatten(-1, (-1, self.shape.key_size))
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.shape.l2_eps)
        return x.repeat_interleave(self.shape.value_heads // self.shape.key_heads, 1)

    def _projected(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the convolution is given [B, C], z [B, A*V], b and a [B, A] of x [B, H]."""
        s, parts = self.shape, [getattr(module, name)(x) for name in _INPUTS[self.shape.order]]
        if s.order == "split":
            return tuple(parts)
        shared = s.value_heads // s.key_heads
        widths = [s.key_size, s.key_size, shared * s.value_size, shared * s.value_size]
        q, k, v, z = (part.flatten(1) for part in parts[0].unflatten(-1, (s.key_heads, -1)).split(widths, -1))
        b, a = (part.flatten(1) for part in parts[1].unflatten(-1, (s.key_heads, -1)).chunk(2, -1))
        return torch.cat((q, k, v), -1), z, b, a

    def norm(self, module: nn.Module) -> Tensor:
        """What the norm multiplies by, [V]."""
        return module.norm.weight.float() + (1.0 if self.norm_plus_one else 0.0)

    def native(self, operator: nn.Module) -> DeltaNet | None:
        """The native call on the operator's loaded weights; None where a matrix is not memory that C reads."""
        names = dict(zip((*ORDERS[self.shape.order], "out"), (*_INPUTS[self.shape.order], "out_proj"), strict=True))
        linears = {part: packed_of(operator._modules[name]) for part, name in names.items()}
        if any(linear is None for linear in linears.values()):
            return None
        conv = operator.conv1d
        tensors = {"conv": conv.weight.squeeze(1), "conv_bias": conv.bias, "rate": operator.A_log.float().exp(),
                   "dt_bias": operator.dt_bias, "norm": self.norm(operator)}  # fmt: skip
        return DeltaNet(
            {part: weight for part, (weight, _) in linears.items()}, self.shape, tensors,
            {part: bias for part, (_, bias) in linears.items()}, operator.key,
        )  # fmt: skip


# --- recognition ----------------------------------------------------------------------------------------

def delta_of(module: nn.Module) -> Delta | None:
    """What `module` computes in a step; None where it is none of the above."""
    shape = None if LinearAttentionLayer is None else _shape(original(module))
    found = None if shape is None else _recognize(module, shape)
    return None if found is None else replace(found, shape=shape)


def _shape(module: nn.Module) -> Shape | None:
    """Told from the parts; None where they do not fit together."""
    order = next((order for order, names in _INPUTS.items() if set(module._modules) == {*names, *_OTHERS}), None)
    sizes = [getattr(module, n, None) for n in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")]
    if order is None or not TRAITS["delta_net"](module) or not all(isinstance(n, int) and n > 0 for n in sizes):
        return None
    shape = Shape(*sizes, module.conv1d.kernel_size[0], epsilon(module.norm), _L2_EPS, order)
    fits = tuple(module.conv1d.weight.shape) == (shape.channels, 1, shape.width)
    return shape if fits and not shape.value_heads % shape.key_heads else None


@remembered
def _recognize(module: nn.Module, shape: Shape) -> Delta | None:
    heads = min(shape.key_heads, 2)
    few = replace(shape, key_heads=heads, value_heads=heads * shape.value_heads // shape.key_heads)
    small = _small_copy(module, few)
    given = _inputs(few)
    cache = DynamicCache()
    cache.layers = [LinearAttentionLayer()]
    cache.update_conv_state(given[1].clone(), 0)
    cache.update_recurrent_state(given[2].clone(), 0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        out = type(small).forward(small, given[0], cache_params=cache)
    expected = (out, cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0])
    return next((delta for delta in _candidates(few) if all(map(same, delta.apply(small, *given), expected))), None)


def _candidates(shape: Shape) -> Iterator[Delta]:
    for plus_one in (False, True):
        yield Delta(shape, plus_one)


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and what is kept, of two sequences."""
    random = generator(1)
    sizes = ((2, 1, HIDDEN), *shape.kept(2))
    return tuple(torch.randn(size, generator=random, device="cpu", dtype=torch.float32) for size in sizes)


def _small_copy(module: nn.Module, shape: Shape) -> nn.Module:
    """The module's own code on small random weights of `shape`."""
    small, random = copy.copy(module), generator(0)
    for table in ("_parameters", "_buffers", "_modules"):
        small.__dict__[table] = dict(module.__dict__[table])
    values, keys = shape.value_heads * shape.value_size, shape.key_heads * shape.key_size
    told = {"num_k_heads": shape.key_heads, "num_v_heads": shape.value_heads, "key_dim": keys, "value_dim": values,
            "conv_dim": shape.channels, "hidden_size": HIDDEN, "layer_idx": 0}  # fmt: skip
    for name, value in told.items():
        setattr(small, name, value)
    rows = {"qkvz": shape.channels + values, "ba": 2 * shape.value_heads, "qkv": shape.channels, "z": values,
            "b": shape.value_heads, "a": shape.value_heads}  # fmt: skip
    for part, name in zip(ORDERS[shape.order], _INPUTS[shape.order], strict=True):
        small._modules[name] = random_linear(module._modules[name], rows[part], HIDDEN, random)
    small._modules["out_proj"] = random_linear(module.out_proj, HIDDEN, values, random)
    small._modules["norm"] = random_norm(module.norm, shape.value_size, random)
    small._modules["conv1d"] = _random_convolution(module.conv1d, shape, random)
    for name in small._parameters:
        small._parameters[name] = _random((shape.value_heads,), random)
    return small.eval()


def _random_convolution(like: nn.Module, shape: Shape, random: torch.Generator) -> nn.Module:
    conv = copy.copy(original(like))
    bias = None if like.bias is None else _random((shape.channels,), random)
    conv.__dict__["_parameters"] = {"weight": _random((shape.channels, 1, shape.width), random), "bias": bias}
    conv.in_channels = conv.out_channels = conv.groups = shape.channels
    return conv


def _random(size: tuple[int, ...], random: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, generator=random, device="cpu", dtype=torch.float32), requires_grad=False)


# --- the operator ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeptStates:
    """What a layer of transformers' cache keeps for a delta net, wherever that is now; it has seen tokens."""

    layer: Any

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Inputs of the convolution, and states. Raises UnsupportedError where a step may not change them."""
        if not self.layer.has_previous_state[0] or self.layer.record_past:
            raise UnsupportedError("cache: found one that is empty or that records its past, expected neither.")
        return self.layer.conv_states[0], self.layer.recurrent_states[0]


class KGatedDeltaNet(NativeOperator):
    """hidden [B, S, H] -> [B, S, H]: one new token a sequence natively where it can, all else by the family's code."""

    replaces = "a gated delta net (in_proj_qkvz or in_proj_qkv, conv1d, A_log and dt_bias)"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["delta_net"](module)

    def make_native(self) -> DeltaNet | None:
        if any(tensor.device.type != "cpu" for tensor in itertools.chain(self.parameters(), self.buffers())):
            return None
        found = delta_of(self.orig_module)
        return None if found is None else found.native(self)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept = None if args else self.step(hidden_states, kwargs)
        if kept is None:
            return super().forward(hidden_states, *args, **kwargs)
        return self.native.forward(hidden_states, *kept.tensors())

    def step(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> KeptStates | None:
        """What the cache keeps for this layer where a native step with these arguments may change it, else None."""
        if hidden.dim() != 3 or hidden.shape[1] != 1 or not self.computes(hidden, kwargs):
            return None
        return self.kept(kwargs.get("cache_params"), hidden.shape[0])

    def computes(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> bool:
        """Whether a native step with these arguments gives what the family's code does, on whatever cache."""
        if self.native is not None and not torch_ops.is_traced(hidden):
            self.renew(hidden.shape[1])
        return self.native is not None and self._is_plain(hidden, kwargs)

    def kept(self, cache: Any, batch: int) -> KeptStates | None:
        """What `cache` keeps for this layer, of `batch` sequences; None where C may not change it."""
        layers = getattr(cache, "layers", ())
        held = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if type(held) is not LinearAttentionLayer or getattr(cache, "offloading", False):
            return None
        if not held.has_previous_state[0] or held.record_past:
            return None
        conv, states = held.conv_states[0], held.recurrent_states[0]
        if conv is None or states is None or conv.requires_grad or states.requires_grad:
            return None
        return None if self.native.problem(batch, conv, states) else KeptStates(held)

    def _is_plain(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> bool:
        """Whether nothing is asked for that only the other code does."""
        if torch_ops.is_traced(hidden) or hidden.device.type != "cpu" or hidden.dtype not in DTYPES:
            return False
        if self.training or torch.is_grad_enabled() and self.wants_gradients(hidden) or not self.is_as_loaded():
            return False
        return all(name == "cache_params" or value is None or name in CHANGE_NOTHING for name, value in kwargs.items())
