"""What a module is, recognized by its structure, so that `match: {trait: ...}` survives renamed classes."""

import inspect
import re
from collections.abc import Callable

from torch import Tensor, nn


def _is_experts(module: nn.Module) -> bool:
    """Stacked 3-D expert weights, the one form that transformers 5 gives every MoE family."""
    stacks = {name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    ungated = "up_proj" in stacks and "gate_proj" not in stacks  # with both they are shared experts, never routed
    return "down_proj" in stacks and ("gate_up_proj" in stacks or ungated)


def is_transposed(experts: nn.Module) -> bool:
    """Whether an experts module multiplies from the left: gate_up_proj [E, H, 2I] and down_proj [E, I, H]."""
    first = getattr(experts, "gate_up_proj", None)
    down = getattr(experts, "down_proj", None)
    if not (isinstance(first, Tensor) and isinstance(down, Tensor) and first.dim() == down.dim() == 3):
        return getattr(experts, "is_transposed", False) is True
    return first.shape[1:] == (down.shape[2], 2 * down.shape[1])


def identity_experts(experts: nn.Module) -> int:
    """How many experts pass their input on as it is; they come last, and nothing of theirs is ever multiplied."""
    return len(experts.gate_up_proj) - len(experts.down_proj) if hasattr(experts, "gate_up_proj") else 0


def is_interleaved(experts: nn.Module) -> bool:
    """Whether gate and up take turns in the rows of `gate_up_proj`, instead of gate first."""
    return getattr(experts, "is_concatenated", True) is False


def _is_moe(module: nn.Module) -> bool:
    return any(_is_experts(child) for child in module.children())


def _is_moe_block(module: nn.Module) -> bool:
    """Router and experts, with shared experts or without, that need nothing but hidden states: no decoder layer."""
    if not _is_moe(module):
        return False
    _, *arguments = inspect.signature(type(module).forward).parameters.values()
    wanted = [a for a in arguments if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]
    return len(wanted) == 1 and not any(_is_attention(child) for child in module.children())


def _is_router(module: nn.Module) -> bool:
    name = type(module).__name__
    return name.endswith(("Router", "Gate", "MoEGate")) and not name.endswith("ForgetGate")  # of linear attention


def _is_mla(module: nn.Module) -> bool:
    return hasattr(module, "kv_a_proj_with_mqa") and hasattr(module, "kv_b_proj")


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "o_proj") and (hasattr(module, "k_proj") or _is_mla(module))


def _is_delta_net(module: nn.Module) -> bool:
    """A gated delta net with one convolution; state space models (Mamba-2) have another input projection."""
    named = all(hasattr(module, name) for name in ("conv1d", "A_log", "dt_bias", "norm", "out_proj"))
    return named and (hasattr(module, "in_proj_qkvz") or hasattr(module, "in_proj_qkv"))


def _is_layer(module: nn.Module) -> bool:
    """One layer of a decoder."""
    named = type(module).__name__.endswith("DecoderLayer")
    return named or not isinstance(module, nn.ModuleList) and any(_is_attention(child) for child in module.children())


def is_linear(module: nn.Module) -> bool:
    """A linear layer and no more: a router may subclass it (Llama-4), and so may grouped projections (DeepSeek-V4)."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_decoder(module: nn.Module) -> bool:
    """The stack itself: an embedding and a list of layers in order."""
    layers = getattr(module, "layers", None)
    return isinstance(layers, nn.ModuleList) and any(isinstance(child, nn.Embedding) for child in module.children())


TRAITS: dict[str, Callable[[nn.Module], bool]] = {
    "experts": _is_experts,
    "moe": _is_moe,
    "moe_block": _is_moe_block,
    "router": _is_router,
    "mla": _is_mla,
    "attention": _is_attention,
    "self_attention": lambda module: _is_attention(module) or type(module).__name__.endswith("Attention"),
    "delta_net": _is_delta_net,
    "linear": is_linear,
    "layer": _is_layer,
    "decoder": _is_decoder,
    "rotary": lambda module: "RotaryEmbedding" in type(module).__name__,
    "norm": lambda module: type(module).__name__.endswith("Norm"),
    "embedding": lambda module: isinstance(module, nn.Embedding),
}
"""Trait name -> predicate on a module of the original model."""


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The decoder's list of layers and its name; None without any.

    Of several lists it is the one that holds most parameters, among those of decoders where there is a decoder: what
    sees or hears has layers too.
    """
    decoders = [(name, module) for name, module in model.named_modules() if _is_decoder(module)]
    lists = [(f"{name}.layers".lstrip("."), module.layers) for name, module in decoders] or _outermost_lists(model)
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()), default=None)


def _outermost_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]


_SENSES = re.compile(r"visual|vision|audio|image|speech|projector|resampler|talker|code2wav|timestamp")
"""In names of what a model has besides its language model."""


def is_beside_text(name: str) -> bool:
    """Whether module or tensor `name` is of a part that text alone does not pass, such as ``model.visual.blocks.3``."""
    return _SENSES.search(name) is not None


def layer_of(key: str) -> int | None:
    """The number of the decoder's layer that module `key` is in, or None: 3 for ``model.layers.3.mlp.experts``."""
    parts = key.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if at is None or is_beside_text(".".join(parts[:at])) else int(parts[at])
