"""The decoder stack as an operator: moves what flows between layers to the device of the next layer.

Embedding, layers, masks and caches are the family's own code, or all one call where they are native (stack.py); nothing
here computes. Layer-wise prefill (loading one layer at a time to a GPU for long prompts) is not built.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.devices import canonical
from ktransformers.errors import UnsupportedError, is_whole
from ktransformers.loaders import WeightSource
from ktransformers.models.traits import TRAITS
from ktransformers.native import torch_ops
from ktransformers.operators.base_operator import FamilyOperator, to_device
from ktransformers.operators.layer import KDecoderLayer
from ktransformers.operators.paged_cache import paged_cache
from ktransformers.operators.stack import Stack


class DecoderModel(FamilyOperator):
    """Base of the model operators.

    Args:
        transfer_map: {layer number: device}: from that layer on, hidden states, position ids, masks and
            position embeddings are moved to that device. Layers before the first entry work where their
            weights are.
        per_layer_prefill_intput_threshold: prompt length from which layer-wise prefill starts; only 0, off,
            is built. Upstream's spelling.
        device: accepted from older rule files, where it named the device of the first layers; here the
            weights tell.
    """

    def __init__(
        self,
        key: str,
        gguf_loader: WeightSource,
        config: Any,
        orig_module: nn.Module | None = None,
        prefill_device: str = "cuda",
        generate_device: str | None = None,
        per_layer_prefill_intput_threshold: int = 0,
        transfer_map: dict | None = None,
        device: str | None = None,
    ):
        super().__init__(key, gguf_loader, config, orig_module, prefill_device, generate_device)
        self.per_layer_prefill_intput_threshold = per_layer_prefill_intput_threshold
        self.transfer_map = {int(layer): device for layer, device in (transfer_map or {}).items()}
        self._hooks: list[Any] = []
        self.stack: Stack | None = None
        self._moved: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the embedding is, as for any transformers model: there callers put their token ids."""
        table = next((child for child in self.children() if TRAITS["embedding"](child)), None)
        return next(self.parameters()).device if table is None else table.weight.device

    @classmethod
    def check(
        cls, key: str, orig_module: nn.Module, kwargs: Mapping[str, Any], weights: WeightSource | None = None
    ) -> list[str]:
        layers = getattr(orig_module, "layers", None)
        if not TRAITS["decoder"](orig_module):
            found = type(orig_module).__name__
            return [f"{cls.__name__} replaces a decoder model (an embedding and layers), found {found}"]
        problems = []
        if threshold := kwargs.get("per_layer_prefill_intput_threshold"):
            expected = f"found {threshold}, expected 0"
            problems.append(f"per_layer_prefill_intput_threshold: layer-wise prefill is not built; {expected}")
        last = len(layers) - 1
        for layer in kwargs.get("transfer_map") or {}:
            number = _whole_number(layer)
            if number is None:
                problems.append(f"transfer_map: {layer!r} is no layer number; expected one such as 30")
            elif not 0 <= number <= last:
                problems.append(f"transfer_map: layer {number} does not exist; the model has layers 0 to {last}")
        return problems

    def load(self) -> None:
        super().load()
        self.watch_layers()
        native_layers = all(isinstance(layer, KDecoderLayer) for layer in self.layers)
        self.stack = Stack(self) if native_layers else None

    def unload(self) -> None:
        super().unload()
        self.stack = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def unmade(self) -> dict[str, Any]:
        return {} if self.stack is None else {"stack": Stack(self)}

    def watch_layers(self) -> None:
        """(Re)install the hooks that move inputs, on the modules that are in place now."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        places = {canonical(place) for place in (*self.transfer_map.values(), *(p.device for p in self.parameters()))}
        if places == {"cpu"}:
            return  # nothing moves
        device, after = None, False
        for child in self.children():
            if isinstance(child, nn.Embedding):
                # It may stay on the CPU; what is made of its output (masks, positions) is for the layers.
                out = lambda _, args, out: to_device(out, self.entry_device)  # noqa: E731
                out.only_moves = True
                self._hooks += [self._watch(child, None), child.register_forward_hook(out)]
            elif after and not TRAITS["rotary"](child):
                self._hooks.append(self._watch(child, None))
            after = after or child is self.layers
        for number, layer in enumerate(self.layers):
            device = self.transfer_map.get(number, device)
            self._hooks.append(self._watch(layer, device))

    @property
    def entry_device(self) -> Any:
        """Where the first layer works."""
        return self.transfer_map.get(0, _weights_device(self.layers[0]) or self.device)

    def _watch(self, module: nn.Module, device: Any) -> Any:
        """Have the inputs of `module` moved to `device`; None is the device of its own weights."""

        def move(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            target = device if device is not None else _weights_device(module)
            return (args, kwargs) if target is None else (to_device(args, target), self._shared(kwargs, target))

        move.only_moves = True
        return module.register_forward_pre_hook(move, with_kwargs=True)

    def _shared(self, value: Any, device: Any) -> Any:
        """As `to_device`, but what all layers are given alike (masks, positions) crosses once per forward."""
        if torch.compiler.is_compiling():
            return to_device(value, device)  # ids are of no use in a graph
        if isinstance(value, Tensor):
            key = (id(value), str(device))
            if key not in self._moved:
                moved = value.to(device)
                if moved is value:
                    return value
                self._moved[key] = (value, moved)  # the original too, so that its id stays taken
            return self._moved[key][1]
        if type(value) in (tuple, list):
            return type(value)(self._shared(item, device) for item in value)
        if type(value) is dict:
            return {name: self._shared(item, device) for name, item in value.items()}
        return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cache") is not None and len({canonical(place) for place in self.transfer_map.values()}) > 1:
            raise UnsupportedError(
                f"{type(self).__name__}: found a {type(kwargs['cache']).__name__} of paged attention, which is on one "
                f"device, and layers on several ({', '.join(dict.fromkeys(map(str, self.transfer_map.values())))}). "
                "Use model.generate instead of generate_batch."
            )
        if not args and kwargs.get("past_key_values", self) is None and self._keeps_cache(kwargs):
            kwargs["past_key_values"] = paged_cache(self)
        if self.stack is not None and not args and not torch.compiler.is_compiling():
            out = self.stack.forward(kwargs)
            if out is not None:
                return out
        try:
            return super().forward(*to_device(args, self.entry_device), **to_device(kwargs, self.entry_device))
        finally:
            self._moved.clear()

    def _keeps_cache(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the family's forward would make a cache that operators can compute on: no gradient passes pages, and
        no tracer follows them."""
        given = kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None or torch_ops.is_traced(given):
            return False
        if torch.is_grad_enabled() and (given.requires_grad or any(p.requires_grad for p in self.parameters())):
            return False
        use_cache = kwargs.get("use_cache")
        return bool(getattr(self.orig_module.config, "use_cache", False) if use_cache is None else use_cache)


def _weights_device(module: nn.Module) -> torch.device | None:
    return next((p.device for p in module.parameters()), None)


def _whole_number(value: Any) -> int | None:
    """`value` as a layer number, given as a number or as its digits; None when it is neither."""
    if is_whole(value):
        return value
    return int(value) if isinstance(value, str) and value.strip().lstrip("-").isdecimal() else None


class KDeepseekV2Model(DecoderModel):
    """DeepSeek-V2 and V3."""


class KQwen2MoeModel(DecoderModel):
    """Qwen2-MoE and, in published rule files, Mixtral."""


class KQwen3MoeModel(DecoderModel):
    """Qwen3-MoE."""


class KQwen3NextModel(DecoderModel):
    """Qwen3-Next."""


class KGlm4MoeModel(DecoderModel):
    """GLM-4-MoE."""


class KSmallThinkerModel(DecoderModel):
    """SmallThinker."""


class KMixtralModel(DecoderModel):
    """Mixtral."""


class KLlamaModel(DecoderModel):
    """Llama and dense models built like it."""
