"""Blocks of router, routed and shared experts: how a family's block adds up, recognized by its results, and the block
in one C call.

As in routing.py, the family's code runs on a twin with small random tensors; here experts are stand-ins that remember
what they were given. What comes out must be a sum of what they gave, with constant factors, or the block stays the
family's own. Letters: T tokens, H hidden.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers import native
from ktransformers.models.traits import TRAITS, is_linear
from ktransformers.operators.experts_in_c import experts_in_c, mlp_in_c
from ktransformers.operators.routing import RouterInC, packed_weight
from ktransformers.operators.twin import close, noise, original, remembered, tensors_of, twin
from ktransformers.operators.watching import Numbers

try:
    from transformers.utils import output_capturing
except ImportError:  # another release: then any hook counts
    output_capturing = None


@dataclass(frozen=True)
class Combined:
    """out = factor * experts(x, router(x)) + shared_factor * sigmoid(gate(x)) * shared(x): names of the children."""

    router: str
    experts: str
    shared: str | None
    gate: str | None
    factor: float
    shared_factor: float
    argument: str | None
    """The block's own tensor that its router takes beside x."""
    ignores: frozenset[str]
    """Arguments of the forward that change nothing."""
    gives_weights: torch.dtype | None
    """Where it returns the router's weights beside the result, as gpt-oss does: their dtype."""

    @property
    def children(self) -> list[str]:
        return [name for name in (self.router, self.experts, self.shared, self.gate) if name]


@remembered
def combined(block: nn.Module, dtype: torch.dtype) -> Combined | None:
    """How `block` adds up for inputs of `dtype`, or None where it is no such sum."""
    return _combine(block, dtype)


class _StandIn(nn.Module):
    """Remembers what it was given, and gives random numbers; or what `inner` gives."""

    def __init__(self, inner: nn.Module | None = None, seed: int = 0):
        super().__init__()
        self.inner, self.seed, self.calls, self.gave = inner, seed, [], None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((hidden, *args, *kwargs.values()))
        made = noise(*hidden.shape, seed=self.seed).to(hidden.dtype)
        self.gave = made if self.inner is None else self.inner(hidden, *args, **kwargs)
        return self.gave

    def got(self, rows: Tensor) -> bool:
        """Whether it was called once, with `rows` [T, H] in whatever shape."""
        return len(self.calls) == 1 and torch.equal(self.calls[0][0].reshape(rows.shape), rows)


def _roles(block: nn.Module) -> tuple[str, str, str | None, str | None]:
    """Names of router, experts, shared experts and their gate. Raises ValueError for more than that."""
    children = {name: original(c) for name, c in block._modules.items() if c is not None and tensors_of(c)}
    (experts,) = (name for name, c in children.items() if TRAITS["experts"](c))
    (router,) = children.keys() & {"gate", "router"}
    rest = children.keys() - {experts, router}
    gate = next((n for n in rest if is_linear(children[n]) and children[n].out_features == 1), None)
    shared = next((n for n in rest if "down_proj" in children[n]._modules), None)
    if rest - {gate, shared}:
        raise ValueError("a block with more than router, experts and shared experts")
    return router, experts, shared, gate


def _combine(block: nn.Module, dtype: torch.dtype) -> Combined | None:
    names = _roles(block)
    hidden = max(t.shape[-1] for t in tensors_of(block._modules[names[0]]).values() if t.dim() == 2)
    x = noise(1, 12, hidden, seed=11)  # not those of a stand-in
    found = _sum_of_parts(block, names, x)
    if found is None:
        return None
    out, weights = _result(twin(block, None, _stand_ins(block, names, None))(x.to(dtype)))
    gives = None if weights is None else weights.dtype
    return replace(found, gives_weights=gives) if out.dtype == dtype else None


def _result(out: Any) -> tuple[Tensor, Tensor | None]:
    """What a block returned: its result, and perhaps weights."""
    return out if isinstance(out, tuple) and len(out) == 2 else (out, None)


def _stand_ins(block: nn.Module, names: tuple, dtype: torch.dtype | None) -> dict[str, _StandIn]:
    router, experts, shared, _ = names
    made = {router: _StandIn(twin(block._modules[router], dtype)), experts: _StandIn(seed=1)}
    return made if shared is None else made | {shared: _StandIn(seed=2)}


def _sum_of_parts(block: nn.Module, names: tuple, x: Tensor) -> Combined | None:
    router, experts, shared, gate = names
    parts = _stand_ins(block, names, torch.float32)
    made = twin(block, torch.float32, parts)
    out, shown = _result(made(x))
    rows = x.flatten(0, 1)
    _, weights, ids = parts[router].gave
    given = parts[experts].calls[0]
    as_routed = len(given) == 3 and torch.equal(given[1], ids) and torch.equal(given[2], weights)
    as_routed = as_routed and (shown is None or torch.equal(shown, weights))
    if out.shape != x.shape or not as_routed or not all(part.got(rows) for part in parts.values()):
        return None
    columns = [parts[experts].gave.flatten()]
    if shared is not None:
        scale = torch.sigmoid(rows @ made._modules[gate].weight.T) if gate else 1.0
        columns.append((scale * parts[shared].gave.reshape(rows.shape)).flatten())
    columns = torch.stack(columns, -1).double()
    factors = torch.linalg.lstsq(columns, out.flatten().double()).solution
    if not close(columns @ factors, out.flatten().double()):
        return None
    factor, shared_factor = (*(round(f, 5) for f in factors.tolist()), 1.0)[:2]
    argument = _argument(made, parts[router].calls[0])
    return Combined(router, experts, shared, gate, factor, shared_factor, argument, _ignored(made, x, out), None)


def _argument(made: nn.Module, call: tuple) -> str | None:
    """The name of the block's own tensor among what its router was given."""
    _, *more = call
    own = {**made._parameters, **made._buffers}
    names = [next(name for name, tensor in own.items() if tensor is value) for value in more if value is not None]
    return names[0] if names else None


def _ignored(made: nn.Module, x: Tensor, out: Tensor) -> frozenset[str]:
    """Arguments that may be given and change nothing: DeepSeek-V4 gives ids of tokens to all its layers."""
    try:
        same = torch.equal(_result(made(x, input_ids=torch.arange(x.shape[1]).view(1, -1)))[0], out)
    except TypeError:
        return frozenset()
    return frozenset({"input_ids"} if same else ())


# --- a family's block in C ----------------------------------------------------------------------------------


class BlockInC:
    """The C block of a family's module, made when it is first wanted and again when a part of it changed."""

    def __init__(self) -> None:
        self._router = RouterInC()
        self._made: dict[torch.dtype, tuple[Any, Combined | None, native.Block | None]] = {}
        self._numbers: Numbers | None = None

    def forget(self) -> None:
        self._router.forget()
        self._made.clear()
        self._numbers = None

    @property
    def is_made(self) -> bool:
        """Whether there is one for some dtype."""
        return any(block is not None for _, _, block in self._made.values())

    def of(self, block: nn.Module, dtype: torch.dtype) -> tuple[Combined, native.Block] | None:
        """`combined(block)` and the block in C; None where there is none, or a part of it is not computed in C."""
        if self._numbers is None or not self._numbers.unchanged():
            self._made.clear()
            self._numbers = Numbers([block, *block._modules.values()])
        made = self._made.get(dtype)
        if made is None or made[0] != self._state(block, made[1], dtype):
            found = combined(block, dtype) if native.available() else None
            self._made[dtype] = made = (
                self._state(block, found, dtype),
                found,
                found and self._make(block, found, dtype),
            )
        return None if made[2] is None else made[1:]

    def _state(self, block: nn.Module, found: Combined | None, dtype: torch.dtype) -> Any:
        """What the C block was made from, to be compared: handles of the parts, or their places."""
        if found is None:
            return None
        children = block._modules
        routed = self._router.of(children[found.router], dtype, self._argument(block, found))
        parts = [routed and routed[1], experts_in_c(children[found.experts])]
        for name in (found.shared, found.gate):
            if name is not None:
                part = children[name]
                parts += [part, *(_handle(child) for child in (*part._modules.values(), part))]
        return [id(part) for part in parts]

    @staticmethod
    def _argument(block: nn.Module, found: Combined) -> Tensor | None:
        return None if found.argument is None else getattr(block, found.argument)

    def _make(self, block: nn.Module, found: Combined, dtype: torch.dtype) -> native.Block | None:
        children = block._modules
        routed = self._router.of(children[found.router], dtype, self._argument(block, found))
        experts = experts_in_c(children[found.experts])
        shared = gate = None
        if found.shared is not None and (shared := mlp_in_c(children[found.shared])) is None:
            return None
        if found.gate is not None:
            gate = packed_weight(children[found.gate])
            if gate is None or getattr(children[found.gate], "bias", None) is not None:
                return None
        if routed is None or experts is None or routed[1].count != experts.count:
            return None
        name = getattr(block, "key", type(block).__name__)
        return native.Block(routed[1], experts, shared, gate, found.factor, found.shared_factor, name)


def _handle(module: nn.Module | None) -> Any:
    """What tells that a linear layer's weight is another now."""
    inner = getattr(module, "active", None)
    inner = module if inner is None else inner
    return getattr(inner, "linear", None) or getattr(inner, "weight", None)


def is_observed(block: nn.Module, names: list[str]) -> bool:
    """Whether someone wants to see what the children give: transformers, asked for router logits, or any other hook."""
    return any(has_hooks(block._modules[name]) for name in names)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` would run more than its class's forward: hooks, past those that transformers leaves in
    place and does not ask for now, or a forward of its own, such as accelerate gives it."""
    if "forward" in vars(module):
        return True
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return bool(hooks) and (
        is_collecting() or any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks)
    )


def is_collecting() -> bool:
    """Whether transformers collects outputs of modules in the call under way."""
    return output_capturing is None or bool(output_capturing._active_collector.get())
