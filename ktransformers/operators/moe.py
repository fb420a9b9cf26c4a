"""Blocks of routed and shared experts: route, compute, combine. One class per family, for what differs.

A block keeps the family's own router, shared experts and routed experts, each of which another rule may
replace; it says only in which order they run and how their results add up. Rule files name these classes as
``ktransformers.operators.experts.*``. Where all parts are recognized and on the CPU (combining.py), a block is one call
to C.
Letters: B batch, S sequence, T = B*S tokens, H hidden, K experts per token.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransformers import native
from ktransformers.loaders import WeightSource
from ktransformers.models.traits import TRAITS
from ktransformers.operators.base_operator import BaseInjectedModule, FamilyOperator, forward_arguments
from ktransformers.operators.combining import BlockInC, Combined, is_observed
from ktransformers.operators.routing import may_use_c


class ComputedInC:
    """A block that is one C call where it can be: mixed into operators that compute it otherwise, too."""

    block_in_c: BlockInC | None = None

    def in_one_call(self, hidden: Tensor, given: Mapping[str, Any]) -> Any:
        """What the family returns for `hidden` [.., H], or None where the parts have to compute it one by one:
        gradients, other devices, parts that C does not compute, or someone who looks at them.
        `given`: other arguments."""
        made = self._made(hidden.dtype) if may_use_c(self, hidden) else None
        if made is None or not given.keys() <= made[0].ignores or is_observed(self, made[0].children):
            return None
        rows, (found, block) = hidden.reshape(-1, hidden.shape[-1]), made
        if found.gives_weights is None:
            return block.forward(rows).view(hidden.shape)
        out, weights = block.with_weights(rows)
        return out.view(hidden.shape), weights.to(found.gives_weights)

    def in_c(self, dtype: torch.dtype) -> native.Block | None:
        """The block as a step of a larger call, where nobody looks at its parts; None where it is none in C."""
        made = self._made(dtype)
        return None if made is None or is_observed(self, made[0].children) else made[1]

    def _made(self, dtype: torch.dtype) -> tuple[Combined, native.Block] | None:
        if self.block_in_c is None:
            self.block_in_c = BlockInC()
        return self.block_in_c.of(self, dtype)

    def unmade(self) -> dict[str, Any]:
        return {"block_in_c": None}

    def how(self) -> str:
        """For printed models: whether the last call was one to C, as far as there was one."""
        return "one C call" if self.block_in_c and self.block_in_c.is_made else ""


class KMoEBlock(ComputedInC, FamilyOperator):
    """Any family's block: hidden [B, S, H] -> [B, S, H], as the family computes it.

    Router, experts, shared experts and their sum are one C call on the CPU where combining.py proves that this gives
    the same, and the family's own forward elsewhere.
    """

    replaces = "a block of router and experts that needs hidden states alone"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return TRAITS["moe_block"](module)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = None if args else self.in_one_call(hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs) if out is None else out

    def unload(self) -> None:
        super().unload()
        self.block_in_c = None

    def extra_repr(self) -> str:
        return self.how()


class SparseMoEBlock(ComputedInC, BaseInjectedModule):
    """hidden [B, S, H] -> [B, S, H]: ``experts(hidden, *gate(hidden)) + shared(hidden)``."""

    children_expected: ClassVar[frozenset[str]] = frozenset({"gate", "experts"})
    """Exactly the children that the forward below uses: others would lose their part of the result."""

    @classmethod
    def check(
        cls, key: str, orig_module: nn.Module, kwargs: Mapping[str, Any], weights: WeightSource | None = None
    ) -> list[str]:
        found = frozenset(name for name, _ in orig_module.named_children())
        own = [*orig_module._parameters, *orig_module._buffers]
        arguments = forward_arguments(orig_module)
        if found == cls.children_expected and not own and len(arguments) == 1:
            return []
        expected = f"a block of {', '.join(sorted(cls.children_expected))}"
        has = ", ".join([*sorted(found), *own]) or "no children"
        if len(arguments) != 1:
            has += f", and a forward of {', '.join(arguments)}"
        return [f"{cls.__name__} replaces {expected}; found {type(orig_module).__name__} with {has}"]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if (out := self.in_one_call(hidden_states, {})) is not None:
            return out
        shape = hidden_states.shape
        tokens = self.prepared(hidden_states).reshape(-1, shape[-1])  # [T, H]
        _, weights, ids = self.gate(tokens)  # [T, K] each
        result = self._start(tokens, ids, weights)
        shared = self.shared(tokens)  # on a GPU beside the experts, where these are the CPU's
        out = result()
        return (out if shared is None else out + shared).view(shape)

    def _start(self, tokens: Tensor, ids: Tensor, weights: Tensor) -> Callable[[], Tensor]:
        """Begin the routed experts; the value gives their result."""
        if hasattr(self.experts, "start"):  # KTransformersExperts, whose file imports this one
            return self.experts.start(tokens, ids, weights)
        out = self.experts(tokens, ids, weights)
        return lambda: out

    def prepared(self, hidden_states: Tensor) -> Tensor:
        """What router and experts see of the input."""
        return hidden_states

    def shared(self, tokens: Tensor) -> Tensor | None:
        """The shared experts' part of the result [T, H], where the family has them."""
        return None


class KDeepseekV2MoE(SparseMoEBlock):
    """DeepSeek-V2: shared experts are added as they are."""

    children_expected = frozenset({"gate", "experts", "shared_experts"})

    def shared(self, tokens: Tensor) -> Tensor:
        return self.shared_experts(tokens)


class KDeepseekV3MoE(KDeepseekV2MoE):
    """DeepSeek-V3 and R1: as V2; what differs, the router, is the family's own."""


class KDeepseekV3MoEV2(KDeepseekV3MoE):
    """`KDeepseekV3MoE`, under the name of server rule files."""


class KGlm4MoeMoE(KDeepseekV3MoE):
    """GLM-4-MoE: as DeepSeek-V3."""


class KQwen2MoeSparseMoeBlock(SparseMoEBlock):
    """Qwen2-MoE: the shared expert is weighted by a sigmoid gate of its own."""

    children_expected = frozenset({"gate", "experts", "shared_expert", "shared_expert_gate"})

    def shared(self, tokens: Tensor) -> Tensor:
        return F.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)


class KQwen2MoeSparseMoeBlockV2(KQwen2MoeSparseMoeBlock):
    """`KQwen2MoeSparseMoeBlock`, under the name of server rule files."""


class KQwen3NextSparseMoeBlockV2(KQwen2MoeSparseMoeBlock):
    """Qwen3-Next: as Qwen2-MoE."""


class KQwen3MoeSparseMoeBlock(SparseMoEBlock):
    """Qwen3-MoE: no shared experts."""


class KQwen3MoeSparseMoeBlockV2(KQwen3MoeSparseMoeBlock):
    """`KQwen3MoeSparseMoeBlock`, under the name of server rule files."""


class KSmallthinkerMoeBlock(SparseMoEBlock):
    """SmallThinker, under the name of its rule files: no shared experts."""


class KMistralSparseMoEBlock(SparseMoEBlock):
    """Mixtral: no shared experts; in training the input may be jittered (`router_jitter_noise`)."""

    def prepared(self, hidden_states: Tensor) -> Tensor:
        noise = getattr(self.orig_module, "jitter_noise", 0) or 0
        if not self.training or noise <= 0:
            return hidden_states
        return hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - noise, 1.0 + noise)
