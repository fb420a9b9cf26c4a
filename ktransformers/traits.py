"""What a module is, told from its structure, so that `match: {trait: ...}` survives renamed classes."""

from collections.abc import Callable

from torch import nn


def _is_experts(module: nn.Module) -> bool:
    """Stacked 3-D expert weights, the one form that transformers 5 gives every MoE family."""
    stacks = {name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    return "down_proj" in stacks and ("gate_up_proj" in stacks or "up_proj" in stacks)


def _is_moe(module: nn.Module) -> bool:
    return any(_is_experts(child) for child in module.children())


def _is_router(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("Router", "Gate", "MoEGate"))


def _is_mla(module: nn.Module) -> bool:
    return hasattr(module, "kv_a_proj_with_mqa") and hasattr(module, "kv_b_proj")


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "o_proj") and (hasattr(module, "k_proj") or _is_mla(module))


def is_linear(module: nn.Module) -> bool:
    """A linear layer and no more: a router may subclass it (Llama-4), and so may grouped projections (DeepSeek-V4)."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


TRAITS: dict[str, Callable[[nn.Module], bool]] = {
    "experts": _is_experts,
    "moe": _is_moe,
    "router": _is_router,
    "mla": _is_mla,
    "attention": _is_attention,
    "linear": is_linear,
    "rotary": lambda module: "RotaryEmbedding" in type(module).__name__,
    "norm": lambda module: type(module).__name__.endswith("Norm"),
    "embedding": lambda module: isinstance(module, nn.Embedding),
}
"""Trait name -> predicate on a module of the original model."""
