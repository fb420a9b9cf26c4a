"""A decoder's whole forward: embedding, angles, and all layers with the norm after them in one native call.

The family's code makes masks and walks over its layers. Where nothing but that happens (decoding.py), every layer is
native (layer.py) and nobody looks between them, the decoder computes here; else its family's code does, and calls the
layers one by one. What was looked up to know so is watched: a step only asks whether any of it has changed.
"""

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers import native
from ktransformers.native import torch_ops
from ktransformers.operators.angles import Angles
from ktransformers.operators.combining import has_hooks, is_collecting
from ktransformers.operators.decoding import Decoding, decoding_of
from ktransformers.operators.paged_cache import PagedCache, PagedLayer

_SHOWN = ("output_attentions", "output_hidden_states", "output_router_logits")
"""What may be asked to be shown from in between."""
_PLAIN = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
                    "cache_position", "return_dict", "logits_to_keep", *_SHOWN})  # fmt: skip
"""Arguments of a decoder's forward that bring nothing in between its layers."""

_VALUES, _MODE = operator.methodcaller("values"), operator.itemgetter("training")
_LOADS, _VERSION = operator.itemgetter("loads"), operator.attrgetter("_version")


class Watch:
    """Children, hooks and tensors of some modules as they are now. Asked at every step: each line of `unchanged` is one
    pass in C over lists made beforehand."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        below = list({id(m): m for module in modules for m in module.modules()}.values())
        self._tables = [t for m in below for t in (m._modules, m._parameters, m._buffers) if t]
        self._held = self._values()
        self._hooks = [t for m in below for t in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooked = sum(map(len, self._hooks))
        self._settings = [vars(m) for m in below]
        self._modes = list(map(_MODE, self._settings))
        self._operators = [values for values in self._settings if "loads" in values]
        self._loads = list(map(_LOADS, self._operators))
        self._tensors = [value for value in self._held if isinstance(value, Tensor)]
        self._places = list(map(Tensor.data_ptr, self._tensors))
        self._written = [tensor for tensor in self._tensors if not tensor.is_inference()]  # others do not say
        self._versions = list(map(_VERSION, self._written))

    def _values(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(_VALUES, self._tables)))

    def unchanged(self) -> bool:
        now = self._values()
        return (
            len(now) == len(self._held)
            and all(map(operator.is_, now, self._held))
            and sum(map(len, self._hooks)) == self._hooked
            and list(map(_MODE, self._settings)) == self._modes
            and list(map(_LOADS, self._operators)) == self._loads
            and list(map(Tensor.data_ptr, self._tensors)) == self._places
            and list(map(_VERSION, self._written)) == self._versions
        )


class Stack:
    """The forward of `decoder`, an operator whose layers are all `KDecoderLayer`."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self._made: dict[torch.dtype, tuple[Watch, _Made | None]] = {}

    def forward(self, kwargs: Mapping[str, Any]) -> Any:
        """What the decoder returns for these arguments; None where its family's code has to compute."""
        cache, config = kwargs.get("past_key_values"), self.decoder.orig_module.config
        if type(cache) is not PagedCache or torch.is_grad_enabled() or is_collecting():
            return None
        if not _is_plain(kwargs, config) or getattr(config, "num_hidden_layers", 0) != len(self.decoder.layers):
            return None
        given = kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        if (
            type(given) is not Tensor
            or given.device.type != "cpu"
            or torch_ops.is_traced(given)
            or self.decoder.training
        ):
            return None
        made = self._of(kwargs, given, cache)
        return None if made is None else made.forward(kwargs, given, cache)

    def _of(self, kwargs: Mapping[str, Any], given: Tensor, cache: PagedCache) -> "_Made | None":
        """The native call for inputs such as `given`, made when first wanted and again when anything changed."""
        kept = self._made.get(given.dtype)
        if kept is None or not kept[0].unchanged():
            made = self._make(given, cache)
            kept = self._made[given.dtype] = Watch([self.decoder]), made  # after: a layer makes itself ready at first
        return kept[1]

    def _make(self, given: Tensor, cache: PagedCache) -> "_Made | None":
        decoder = self.decoder
        found = decoding_of(decoder.orig_module)
        if found is None or has_hooks(decoder._modules[found.norm]) or any(has_hooks(x) for x in decoder.layers):
            return None
        dtype = given.dtype
        if not dtype.is_floating_point:
            dtype = decoder._modules[found.embedding](given[:1, :1]).dtype
        like = torch.zeros(1, 1, decoder._modules[found.norm].weight.shape[-1], dtype=dtype, device="cpu")
        with torch.no_grad():
            steps = [layer.native_step(like, {"past_key_values": cache}) for layer in decoder.layers]
        if any(s is None for s in steps) or not all(layer.attention.attending.plain for layer in decoder.layers):
            return None
        return _Made(decoder, found, [step[0].layers[0] for step in steps])


class _Made:
    """The call, and what goes into it."""

    def __init__(self, decoder: nn.Module, found: Decoding, layers: Sequence[native.Layer]) -> None:
        self.decoder, self.found = decoder, found
        attentions = [layer.attention for layer in decoder.layers]
        self._numbers = [attention.layer_idx for attention in attentions]
        self._attending = [attention.attending for attention in attentions]
        # Layers of a kind share angles and factors: of one call of a rotary module, or none at all.
        kinds = [(found.kinds[i] if attending.rotates else -1, attending.step_of)
                 for i, attending in enumerate(self._attending)]  # fmt: skip
        each = list(dict.fromkeys(kinds))
        self._of_kind = [(kind[0], kinds.index(kind)) for kind in each]
        self._angles = {i: Angles(decoder._modules[name], given) for i, (name, given) in enumerate(found.rotaries)}
        norm = None
        if found.rms is not None:
            eps, shift = found.rms
            norm = decoder._modules[found.norm].weight.detach().float() + shift, eps
        self._layers = native.Layers(layers, [each.index(kind) for kind in kinds], norm)

    def forward(self, kwargs: Mapping[str, Any], given: Tensor, cache: PagedCache) -> Any:
        held = [cache.layers[number] if number < len(cache.layers) else None for number in self._numbers]
        for part, attending in zip(held, self._attending, strict=True):
            if not isinstance(part, PagedLayer) or part.joined != attending.joined:
                return None
        past, tokens = held[0].get_seq_length(), given.shape[1]
        pads = padding(kwargs.get("attention_mask"), past + tokens)
        where = kwargs.get("position_ids")
        if pads is None or where is not None and (where.dim() != 2 or where.shape[1] != tokens):
            return None
        if held[0].pages is not None and held[0].pages.ragged and (where is None or pads):
            return None
        hidden = given if given.dim() == 3 else self.decoder._modules[self.found.embedding](given)
        hidden = hidden if self.found.factor == 1.0 else hidden * self.found.factor
        for part, attending in zip(held, self._attending, strict=True):
            if part.pages is None:
                attending.prepare(part, hidden.dtype)
        positions, factors = [], []
        for rotary, i in self._of_kind:
            positions.append(None if rotary < 0 else self._angles[rotary].of(hidden, past, where))
            factors.append(self._attending[i].query_factor(held[i], tokens, kwargs))
        pages = [part.pages for part in held]
        out = self._layers.forward(hidden, pages, positions, pads=pads or None, q_factors=factors)
        for part in held:
            part.advanced()
        if self.found.rms is None:
            out = self.decoder._modules[self.found.norm](out)
        return self.found.output(last_hidden_state=out, past_key_values=cache)


def _is_plain(kwargs: Mapping[str, Any], config: Any) -> bool:
    """Whether only the last hidden state is wanted, of nothing but tokens."""
    shown = any(kwargs.get(name, getattr(config, name, False)) for name in _SHOWN)
    if shown or kwargs.get("return_dict", True) is False or kwargs.get("use_cache", True) is False:
        return False
    return all(value is None or name in _PLAIN for name, value in kwargs.items())


def padding(mask: Any, length: int) -> tuple[int, ...] | None:
    """How many tokens on the left are padding, of each sequence, by a mask [B, length] of ones and zeros; () for no
    mask, None for a mask of another form."""
    if mask is None:
        return ()
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != length or mask.device.type != "cpu":
        return None
    seen = mask != 0
    counts = seen.sum(1)
    if not bool((seen[:, 1:] >= seen[:, :-1]).all()):
        return None
    return tuple((length - counts).tolist())
