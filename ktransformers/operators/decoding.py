"""Decoders: what a family's code does around its layers, recognized by what happens to stand-ins.

The code runs as it is with listeners in the place of embedding, layers, rotary embeddings and norm. Where each is given
just what the one before gave, and masks are causal or such with the cache's windows, nothing else is in it.
"""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ktransformers.models.traits import TRAITS
from ktransformers.operators.delta_net import LinearAttentionLayer
from ktransformers.operators.norms import Normed, normed_as
from ktransformers.operators.twin import Listener, close, noise, original, twin

TOKENS, WINDOW = 6, 3


@dataclass(frozen=True)
class Decoding:
    """out = norm(layers(factor * embedding(ids), angles)): names of the children."""

    embedding: str
    factor: float
    norm: str
    norm_as: Normed | None
    """What the norm computes. None: anything else."""
    rotaries: tuple[tuple[str, tuple, int], ...]
    """Name of a rotary module, a child or one of a list of them; its arguments beside hidden states and positions:
    (positional, by name); of how many numbers a position is, as `Angles` takes it."""
    kinds: tuple[int, ...]
    """Of each layer: the number of its rotary call, or -1."""
    output: type
    """What the results are returned in."""


def rotaries_of(decoder: nn.Module) -> dict[str, nn.Module]:
    """The rotary modules among the children of a decoder and in lists of them; operators or not."""
    within = {name: child for name, child in decoder._modules.items() if child is not None}
    within |= {f"{name}.{i}": each for name, child in within.items() if isinstance(child, nn.ModuleList)
               for i, each in child._modules.items()}  # fmt: skip
    return {name: child for name, child in within.items() if TRAITS["rotary"](original(child))}


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The part of a causal LM that has an embedding and layers."""
    return next((module for module in model.modules() if TRAITS["decoder"](original(module))), None)


def decoding_of(decoder: nn.Module) -> Decoding | None:
    """What the family's `decoder` does, or None where it is anything else."""
    try:
        with torch.no_grad():
            return _recognize(original(decoder))
    except Exception:  # the family's code may want anything: other arguments, other parts, a device
        return None


def head_of(model: nn.Module, decoder: nn.Module) -> nn.Module | None:
    """The child of a causal LM that makes logits of what its `decoder` gives, where that is all the model does."""
    try:
        with torch.no_grad():
            return _head(model, decoder)
    except Exception:  # as above
        return None


def _head(model: nn.Module, decoder: nn.Module) -> nn.Module | None:
    (name,) = (n for n, child in model._modules.items() if child is decoder)
    (head,) = (n for n, child in model._modules.items() if child is not None and child is not decoder)
    found = decoding_of(decoder)
    x = noise(1, TOKENS, original(model._modules[head]).in_features, seed=6)
    given = found.output(last_hidden_state=x)
    parts = {name: Listener(lambda **kwargs: given, decoder)}
    parts[head] = Listener(lambda x: x[..., :5] * 2, model._modules[head])
    made = twin(model, torch.float32, parts)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="cpu")
    out = made(input_ids=ids, use_cache=True, logits_to_keep=1)
    args, _, logits = parts[head].once
    return model._modules[head] if torch.equal(args[0], x[:, -1:]) and out.logits is logits else None


def _recognize(decoder: nn.Module) -> Decoding | None:
    children = {name: original(child) for name, child in decoder._modules.items() if child is not None}
    (embedding,) = (name for name, child in children.items() if TRAITS["embedding"](child))
    (norm,) = (name for name, child in children.items() if TRAITS["norm"](child))
    rotaries = {name: Listener(original(child), child) for name, child in rotaries_of(decoder).items()}
    x = noise(1, TOKENS, children[norm].weight.shape[-1], seed=5)
    last = twin(children[norm], torch.float32)
    parts = {embedding: Listener(lambda ids: x, children[embedding]), norm: Listener(last, last)}
    parts |= {name: child for name, child in rotaries.items() if name in children}
    parts |= {name: nn.ModuleList(rotaries[f"{name}.{i}"] for i in child._modules)
              for name, child in children.items() if f"{name}.0" in rotaries}  # fmt: skip
    layers = [Listener(lambda x, *args, _i=i, **kwargs: torch.tanh(x.roll(1, -1) * (1 + _i / 7)), layer)
              for i, layer in enumerate(children["layers"])]  # fmt: skip
    made = twin(decoder, torch.float32, {**parts, "layers": nn.ModuleList(layers)})
    made.config = _small(decoder.config)
    out = made(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64, device="cpu"), use_cache=False)
    given = [layer.once for layer in layers]
    factor = _factor(x, given[0][0][0])
    chained = all(after[0][0] is before[2] for before, after in itertools.pairwise(given))
    args, _, result = parts[norm].once
    ends = args[0] is given[-1][2] and out.last_hidden_state is result and _nothing_else(out)
    if factor is None or not chained or not ends or not _masks_are_known(made.config, [call[1] for call in given]):
        return None
    turning = [(name, *heard) for name, rotary in rotaries.items() for heard in rotary.heard]
    kinds = tuple(_kind(call[1].get("position_embeddings"), turning) for call in given)
    return Decoding(
        embedding, factor, norm, normed_as(last, args[0], result),
        tuple((name, (args[2:], tuple((k, v) for k, v in kwargs.items() if k != "position_ids")), _axes(args, kwargs))
              for name, args, kwargs, _ in turning),
        kinds, type(out),
    )  # fmt: skip


def _small(config: Any) -> Any:
    """The config with windows that a few tokens fill, and masks that are always made."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    for name in ("sliding_window", "attention_chunk_size"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, WINDOW)
    return config


def _factor(x: Tensor, given: Tensor) -> float | None:
    """given = factor * x."""
    factor = round(float((given * x).sum() / x.square().sum()), 6)
    return (1.0 if given is x else factor) if given.shape == x.shape and close(given, x * factor) else None


def _nothing_else(out: Any) -> bool:
    return all(value is None for name, value in out.items() if name not in ("last_hidden_state", "past_key_values"))


def _masks_are_known(config: Any, given: list[dict[str, Any]]) -> bool:
    """Whether each layer sees what its layer of a cache lets it see; without padding, which delta nets are told of."""
    behind = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None]
    cached = DynamicCache(config=config.get_text_config(decoder=True)).layers
    for number, kwargs in enumerate(given):
        mask = kwargs.get("attention_mask")
        layer = cached[number] if number < len(cached) else None
        if type(layer) is LinearAttentionLayer and mask is None:
            continue
        if not isinstance(mask, Tensor):
            return False
        window = WINDOW if getattr(layer, "is_sliding", False) else TOKENS
        if not torch.equal(
            mask[0, 0].bool() if mask.dtype == torch.bool else mask[0, 0] == 0, (behind >= 0) & (behind < window)
        ):
            return False
    return True


def _axes(args: tuple, kwargs: dict) -> int:
    """0 where a rotary module was called with hidden states and the numbers of all tokens, [1, S]; N for them N times,
    [N, 1, S]. Raises ValueError for anything else."""
    where = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    if where.dim() not in (2, 3) or not torch.equal(where.cpu(), torch.arange(TOKENS).expand(where.shape)):
        raise ValueError("positions that are not the numbers of the tokens")
    return where.shape[0] if where.dim() == 3 else 0


def _kind(positions: Any, turning: list[tuple]) -> int:
    """Which rotary call gave `positions`. Raises ValueError for none of them."""
    if positions is None:
        return -1
    for number, (*_, gave) in enumerate(turning):
        same = gave is positions
        if not same and isinstance(gave, tuple) and isinstance(positions, tuple):
            same = all(a is b for a, b in zip(gave, positions, strict=True))
        if same:
            return number
    raise ValueError("angles from elsewhere")
