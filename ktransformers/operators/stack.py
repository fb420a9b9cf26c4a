"""A decoder's whole forward: embedding, angles, and all layers with the norm after them in one native call.

The family's code makes masks and walks over its layers. Where nothing but that happens (decoding.py), every layer is
native (layer.py) and nobody looks between them, the decoder computes here; else its family's code does, and calls the
layers one by one. What was looked up to know so is watched: a step only asks whether any of it has changed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers import native
from ktransformers.native import torch_ops
from ktransformers.operators.angles import Angles, is_fixed
from ktransformers.operators.combining import has_hooks, is_collecting
from ktransformers.operators.decoding import Decoding, decoding_of, head_of, rotaries_of
from ktransformers.operators.delta_net import KeptStates, KGatedDeltaNet
from ktransformers.operators.embedding import table_of
from ktransformers.operators.linear import packed_of
from ktransformers.operators.paged_attention import Recognized
from ktransformers.operators.paged_cache import PagedCache, PagedLayer
from ktransformers.operators.routing import FLOATS
from ktransformers.operators.twin import original
from ktransformers.operators.watching import Watch
from ktransformers.quants.blocks import Packed

_SHOWN = ("output_attentions", "output_hidden_states", "output_router_logits")
"""What may be asked to be shown from in between."""
_PLAIN = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
                    "cache_position", "return_dict", "logits_to_keep", *_SHOWN})  # fmt: skip
"""Arguments of a decoder's forward that bring nothing in between its layers."""


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
        given, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if (given is None) == (embeds is None):  # the family's code says what is wrong
            return None
        given = embeds if given is None else given
        if type(given) is not Tensor or given.device.type != "cpu" or self.decoder.training:
            return None
        if torch_ops.is_traced(given) or given.requires_grad or not _has_form(given):
            return None
        made = self._of(given)
        return None if made is None else made.forward(kwargs, given, cache)

    def ready(self) -> "_Made | None":
        """The native call on ids of tokens, where the decoder computes by it just now."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        return None if self.decoder.training or is_collecting() else self._of(ids)

    def _of(self, given: Tensor) -> "_Made | None":
        """The native call for inputs such as `given`, made when first wanted and again when anything changed."""
        kept = self._made.get(given.dtype)
        if kept is None or not kept[0].unchanged(given.shape[1]):
            made = self._make(given)
            moving = [each for each in rotaries_of(self.decoder).values() if not is_fixed(original(each))]
            kept = Watch(self.decoder, moving), made  # after: a layer makes itself ready at first
            self._made[given.dtype] = kept
        return kept[1]

    def _make(self, given: Tensor) -> "_Made | None":
        decoder = self.decoder
        found = decoding_of(decoder.orig_module)
        if found is None or has_hooks(decoder._modules[found.norm]) or any(has_hooks(x) for x in decoder.layers):
            return None
        dtype = given.dtype
        if not dtype.is_floating_point:
            dtype = decoder._modules[found.embedding].forward(given[:1, :1]).dtype  # no call: hooks would see it
        like = torch.zeros(1, 1, decoder._modules[found.norm].weight.shape[-1], dtype=dtype, device="cpu")
        with torch.no_grad():
            for layer in decoder.layers:
                layer.renew(given.shape[1])
            layers = [layer.native_layer(like) for layer in decoder.layers]
        if any(layer is None for layer in layers):
            return None
        attentions = [layer.mixer for layer in decoder.layers if not isinstance(layer.mixer, KGatedDeltaNet)]
        if not attentions or not all(attention.attending.plain for attention in attentions):
            return None
        return _Made(decoder, found, [layer.layers[0] for layer in layers])


class _Made:
    """The call, and what goes into it."""

    def __init__(self, decoder: nn.Module, found: Decoding, layers: Sequence[native.Layer]) -> None:
        self.decoder, self.found = decoder, found
        self._mixers = [layer.mixer for layer in decoder.layers]
        self._attending = [None if isinstance(mixer, KGatedDeltaNet) else mixer.attending for mixer in self._mixers]
        self._first = next(i for i, attending in enumerate(self._attending) if attending is not None)
        # Layers of a kind share angles and factors: of one call of a rotary module, or none at all.
        kinds = [(-1, None) if attending is None else (found.kinds[i] if attending.rotates else -1, attending.step_of)
                 for i, attending in enumerate(self._attending)]  # fmt: skip
        each = list(dict.fromkeys(kinds))
        self._of_kind = [(kind[0], kinds.index(kind)) for kind in each]
        self._angles = {i: Angles(decoder.get_submodule(name), *more) for i, (name, *more) in enumerate(found.rotaries)}
        norm = None if found.norm_as is None else found.norm_as.native(decoder._modules[found.norm])
        self._layers = native.Layers(layers, [each.index(kind) for kind in kinds], norm)

    def forward(self, kwargs: Mapping[str, Any], given: Tensor, cache: PagedCache) -> Any:
        batch, tokens = given.shape[:2]
        held = self.held(cache, batch) if tokens == 1 or None not in self._attending else None
        if held is None:
            return None
        first = held[self._first]
        past, where = first.get_seq_length(), kwargs.get("position_ids")
        pads = padding(kwargs.get("attention_mask"), batch, past + tokens)
        if pads is None or pads and None in self._attending:  # the family's code says what delta nets are told of it
            return None
        if where is not None and not _are_positions(where, batch, tokens):
            return None
        if first.pages is not None and first.pages.ragged:
            lengths = torch.tensor(first.pages.lengths, device="cpu")[:, None]
            if pads or where is None or not torch.equal(where, lengths + torch.arange(tokens, device="cpu")):
                return None
        if given.dim() == 3 and self.found.factor != 1.0:  # was it multiplied already? the family's code knows
            return None
        hidden = given if given.dim() == 3 else self.embedded(given)
        out = self.run(hidden * self.found.factor if self.found.factor != 1.0 else hidden, held, where, pads or None)
        return self.found.output(last_hidden_state=out, past_key_values=cache)

    def held(self, cache: PagedCache, batch: int) -> list[PagedLayer | KeptStates] | None:
        """The parts of the cache that the layers compute on; None where they are of another kind."""
        held = []
        for mixer, attending in zip(self._mixers, self._attending, strict=True):
            number, part = mixer.layer_idx, None
            if attending is None:
                part = mixer.kept(cache, batch)
            elif number < len(cache.layers) and isinstance(cache.layers[number], PagedLayer):
                part = cache.layers[number] if cache.layers[number].joined == attending.joined else None
            if part is None:
                return None
            held.append(part)
        return held

    def _paged(self, held: Sequence[PagedLayer | KeptStates]) -> list[tuple[PagedLayer, Recognized]]:
        """Of the layers with attention: its part of the cache, and what it computes."""
        pairs = zip(held, self._attending, strict=True)
        return [(part, attending) for part, attending in pairs if attending is not None]

    def _factor(self, i: int, held: Sequence[PagedLayer | KeptStates], tokens: int) -> Tensor | None:
        """What layer i multiplies its queries by."""
        return None if self._attending[i] is None else self._attending[i].query_factor(held[i], tokens, {})

    def decode(self, cache: PagedCache, head: tuple[Packed, Tensor | None] | None) -> native.Decode | None:
        """The calls of a step recorded; None where part of it is not native, or depends on more than the position."""
        held, table = self.held(cache, 1), table_of(self.decoder._modules[self.found.embedding])
        if held is None or head is None or table is None:
            return None
        paged = self._paged(held)
        if any(part.pages is None for part, _ in paged) or len(held[self._first].pages.tables) != 1:
            return None
        if self._layers.norm is None:
            return None
        angles = [None if rotary < 0 else self._angles[rotary] for rotary, _ in self._of_kind]
        factors = [self._factor(i, held, 1) for _, i in self._of_kind]
        if any(factor is not None for factor in factors) or not all(each is None or each.fixed for each in angles):
            return None
        embedding, dtype = table
        like = torch.empty(1, 1, embedding.hidden, dtype=dtype, device="cpu")

        def tables(rows: int) -> list[tuple[Tensor, Tensor] | None]:
            for part, _ in paged:
                part.advanced()
            return [None if each is None else each.table(like, rows) for each in angles]

        layers = native.Layers(self._layers.layers, self._layers.kinds, self._layers.norm)
        for part, attending in paged:
            part.prepare(*attending.kept, dtype)
        kept = [part.pages if isinstance(part, PagedLayer) else part for part in held]
        return native.Decode(embedding, layers, native.Linear(*head), kept, tables, dtype, self.found.factor)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.decoder._modules[self.found.embedding](ids)

    def run(
        self,
        hidden: Tensor,
        held: Sequence[PagedLayer | KeptStates],
        where: Tensor | None,
        pads: tuple[int, ...] | None,
    ) -> Tensor:
        """hidden [B, S, H], what the first layer is given -> [B, S, H], normed; `where`: positions, `pads`: padding."""
        for part, attending in self._paged(held):
            part.prepare(*attending.kept, hidden.dtype)
        past, positions, factors = held[self._first].get_seq_length(), [], []
        for rotary, i in self._of_kind:
            positions.append(None if rotary < 0 else self._angles[rotary].of(hidden, past, where))
            factors.append(self._factor(i, held, hidden.shape[1]))
        pages = [part.pages if isinstance(part, PagedLayer) else part for part in held]
        out = self._layers.forward(hidden, pages, positions, pads=pads, q_factors=factors)
        for part, _ in self._paged(held):
            part.advanced()
        return out if self._layers.norm is not None else self.decoder._modules[self.found.norm](out)


def decode_of(model: nn.Module, cache: Any) -> native.Decode | None:
    """What computes the next tokens of the one sequence in `cache`, past the family's code; None where that has to.

    Whether the model is as it was is looked up here, not at every token.
    """
    decoder = next((child for child in model.children() if isinstance(getattr(child, "stack", None), Stack)), None)
    if decoder is None or type(cache) is not PagedCache or torch.is_grad_enabled() or has_hooks(model):
        return None
    made, head = decoder.stack.ready(), head_of(model, decoder)
    if made is None or head is None or has_hooks(decoder) or has_hooks(head):
        return None
    return made.decode(cache, packed_of(head))


def takes_ragged(model: nn.Module, cache: Any) -> bool:
    """Whether sequences such as that of `cache`, of any lengths, can be decoded as one batch (`PagedCache.together`),
    with their positions and no mask."""
    decoder = next((child for child in model.children() if isinstance(getattr(child, "stack", None), Stack)), None)
    if decoder is None or type(cache) is not PagedCache or torch.is_grad_enabled():
        return False
    made = decoder.stack.ready()
    held = None if made is None else made.held(cache, 1)
    return held is not None and all(isinstance(part, PagedLayer) and part.pages is not None for part in held)


def _is_plain(kwargs: Mapping[str, Any], config: Any) -> bool:
    """Whether only the last hidden state is wanted, of nothing but tokens."""
    shown = any(kwargs.get(name, getattr(config, name, False)) for name in _SHOWN)
    if shown or kwargs.get("return_dict", True) is False or kwargs.get("use_cache", True) is False:
        return False
    return all(value is None or name in _PLAIN for name, value in kwargs.items())


def _has_form(given: Tensor) -> bool:
    """Whether these are ids [B, S] or hidden states [B, S, H], at least one of them."""
    known = given.dim() == 3 and given.dtype in FLOATS if given.is_floating_point() else given.dim() == 2
    return known and given.numel() > 0


def _are_positions(where: Any, batch: int, tokens: int) -> bool:
    if not isinstance(where, Tensor) or where.device.type != "cpu" or where.dtype not in (torch.int64, torch.int32):
        return False
    return where.dim() == 2 and where.shape[0] in (1, batch) and where.shape[1] == tokens


def padding(mask: Any, batch: int, length: int) -> tuple[int, ...] | None:
    """How many tokens on the left are padding, of each sequence, by a mask [batch, length] of ones and zeros; () for no
    mask, None for a mask of another form."""
    if mask is None:
        return ()
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, length) or mask.device.type != "cpu":
        return None
    seen = mask != 0
    counts = seen.sum(1)
    if not bool((seen[:, 1:] >= seen[:, :-1]).all()):
        return None
    return tuple((length - counts).tolist())
