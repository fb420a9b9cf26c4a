"""A routing profile: how often each expert of each layer is chosen, counted while a model runs.

It counts and keeps the counts in a file; which experts to put where is masks.py's, and what to run the command's
(`kt profile`). It changes no result and holds none of the model's tensors.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.errors import KTransformersError, is_whole, ranges
from ktransformers.models.traits import TRAITS, layer_of
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.paths import existing_path, write_whole

FORMAT, VERSION = "ktransformers routing profile", 1
MAX_BYTES, MAX_EXPERTS, MAX_COUNT = 64 << 20, 1 << 20, 1 << 62
"""Of a profile's file, of a layer, of an expert: beyond any model, so that a hostile file is refused soon."""


@dataclass
class RoutingProfile:
    """How often each expert was chosen: `layers` is layer number -> one count per expert, by the family's numbers.

    `tokens`: how many tokens were routed in the layer that saw most, prompt and generated ones alike.
    """

    model_type: str
    layers: dict[int, list[int]] = field(default_factory=dict)
    tokens: int = 0

    @property
    def hits(self) -> int:
        """All choices of all layers."""
        return sum(map(sum, self.layers.values()))

    def hit_rate(self, masks: Mapping[int, Iterable[int]]) -> float:
        """The share of all choices that fall on the experts of `masks` (layer -> ids), 0.0 to 1.0."""
        chosen = sum(self.layers[layer][e] for layer, ids in masks.items() if layer in self.layers for e in set(ids))
        return chosen / self.hits if self.hits else 0.0

    def top_share(self, share: float = 0.1, layers: Iterable[int] | None = None) -> float:
        """The skew: which part of the choices falls on the most used `share` of the experts; even use gives `share`.

        `layers`: only theirs, None for all; experts of all of them compete. Of an expert that is only partly within
        the share, that part counts.
        """
        layers = self.layers if layers is None else layers
        counts = sorted((n for layer in layers for n in self.layers[layer]), reverse=True)
        whole, part = divmod(share * len(counts), 1)
        top = sum(counts[: int(whole)]) + part * sum(counts[int(whole) : int(whole) + 1])
        return top / sum(counts) if any(counts) else 0.0

    def require(self, layers: Iterable[int], n_experts: int, model_type: str | None = None) -> None:
        """Raise KTransformersError unless this is a profile of a model with `n_experts` in each of `layers`.

        `model_type` None: of any family.
        """
        wanted = sorted(layers)
        if model_type is not None and model_type != self.model_type:
            found, expected = f"model type {self.model_type}", model_type
        elif sorted(self.layers) != wanted:
            found, expected = f"layers {ranges(self.layers) or 'none'}", ranges(wanted)
        elif odd := {len(counts) for counts in self.layers.values()} - {n_experts}:
            found, expected = f"{min(odd)} experts per layer", str(n_experts)
        elif not self.hits:
            found, expected = "no choice at all", "counts of a run"
        else:
            return
        raise KTransformersError(
            f"routing profile: found {found}, expected {expected}. Make one of this model with `kt profile`."
        )

    def write(self, path: str | Path) -> None:
        """Write the profile as JSON. The file appears whole or not at all. Raises KTransformersError."""
        layers = {str(layer): counts for layer, counts in sorted(self.layers.items())}
        data = {"format": FORMAT, "version": VERSION, "model_type": self.model_type, "tokens": self.tokens}
        text = json.dumps({**data, "layers": layers}) + "\n"
        try:
            write_whole(Path(path).expanduser().resolve(), text)
        except (OSError, RuntimeError, ValueError) as error:  # the last two: links in a circle, a zero byte in the name
            reason = getattr(error, "strerror", None) or error
            raise KTransformersError(
                f"{path}: the routing profile cannot be written: {reason}. Free the way, or name another path."
            ) from error

    @classmethod
    def read(cls, path: str | Path) -> "RoutingProfile":
        """Read what `write` wrote; nothing in the file is believed before it is checked. Raises KTransformersError."""
        file = existing_path(path, "routing profile") or Path(path)
        try:
            size = file.stat().st_size
            if not file.is_file() or size > MAX_BYTES:
                raise _refuse(path, "no ordinary file" if size <= MAX_BYTES else f"{size} bytes, more than any has")
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise KTransformersError(
                f"{path}: the routing profile cannot be read: {error.strerror or error}. Check the path."
            ) from error
        except (ValueError, RuntimeError) as error:  # nested too deep, the home of nobody
            raise _refuse(path, f"no JSON ({str(error)[:80]})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise _refuse(path, "something else")
        if data.get("version") != VERSION:
            raise _refuse(path, f"version {str(data.get('version'))[:40]!r}, this release reads {VERSION}")
        if problem := _problem(data):
            raise _refuse(path, problem)
        layers = {int(layer): counts for layer, counts in data["layers"].items()}
        return cls(data["model_type"], layers, data["tokens"])


def _refuse(path: str | Path, found: str) -> KTransformersError:
    return KTransformersError(
        f"{path}: found {found}, expected a routing profile. Make one with `kt profile MODEL --prompts FILE`."
    )


def _problem(data: dict[str, Any]) -> str:
    """Say what in a profile's file is none of a profile, or return ``""``."""
    if not isinstance(data.get("model_type"), str):
        return "no model_type"
    if not _is_count(data.get("tokens")):
        return f"tokens {str(data.get('tokens'))[:40]!r}"
    layers = data.get("layers")
    if not isinstance(layers, dict) or not layers:
        return "no layers"
    for layer, counts in layers.items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,5}", layer):
            return f"a layer named {layer[:40]!r}"
        if not isinstance(counts, list) or not 0 < len(counts) <= MAX_EXPERTS:
            return f"layer {layer} without a list of counts"
        if wrong := [n for n in counts if not _is_count(n)]:
            return f"a count of {str(wrong[0])[:40]!r} in layer {layer}"
        if sum(counts) > data["tokens"] * len(counts):
            return f"{sum(counts)} choices of {len(counts)} experts for {data['tokens']} tokens in layer {layer}"
    return ""


def _is_count(value: Any) -> bool:
    return is_whole(value, 0, MAX_COUNT - 1)


# --- counting ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[RoutingProfile]:
    """Count, inside the block, which experts `model` chooses; yields the profile that grows as the model runs.

    Works on operators and on transformers' own experts alike, and on a batch: padding counts as it is routed.
    Raises KTransformersError for a model without routed experts, or with several modules of them in a layer.
    """
    profile = RoutingProfile(getattr(model.config, "model_type", None) or type(model).__name__)
    handles = []
    try:
        for name, module in model.named_modules():
            if (count := _experts_in(module)) is not None:
                layer = _layer(name, profile)
                profile.layers[layer] = [0] * count
                handles.append(module.register_forward_pre_hook(_Counter(profile, layer), with_kwargs=True))
        if not handles:
            raise KTransformersError(
                f"{type(model).__name__} has no routed experts, so there is nothing to profile. Use another model."
            )
        yield profile
    finally:
        for handle in handles:
            handle.remove()


def _experts_in(module: nn.Module) -> int | None:
    """How many routed experts `module` has, or None when it is no module of experts."""
    if isinstance(module, KTransformersExperts):
        return module.n_experts
    return len(module.down_proj) if TRAITS["experts"](module) else None


def _layer(name: str, profile: RoutingProfile) -> int:
    layer = layer_of(name)
    if layer is None or layer in profile.layers:
        found = "no layer number" if layer is None else f"a second module of experts in layer {layer}"
        raise KTransformersError(f"{name}: found {found}, expected one in each layer. Report this model.")
    return layer


class _Counter:
    """A forward pre-hook that adds one call's choices to the counts of a layer."""

    def __init__(self, profile: RoutingProfile, layer: int):
        self.profile, self.counts, self.tokens = profile, profile.layers[layer], 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[1] if len(args) > 1 else kwargs.get("top_k_index")
        hidden = args[0] if args else kwargs["hidden_states"]
        found, tokens = self._by_rows(hidden) if ids is None else self._by_ids(ids)
        for e, n in enumerate(found):
            self.counts[e] += n
        self.tokens += tokens
        self.profile.tokens = max(self.profile.tokens, self.tokens)

    def _by_ids(self, ids: Tensor) -> tuple[list[int], int]:
        """Choices as the contract gives them, [T, K]; an id of no real expert is nobody's."""
        flat = ids.detach().reshape(-1).to("cpu", torch.int64)
        flat = flat[(flat >= 0) & (flat < len(self.counts))]
        return flat.bincount(minlength=len(self.counts)).tolist(), ids.shape[:-1].numel()

    def _by_rows(self, hidden: Tensor) -> tuple[list[int], int]:
        """Llama-4's block gives [E*T, H]: T rows for each expert, zeros where it was not chosen."""
        chosen = hidden.detach().view(len(self.counts), -1, hidden.shape[-1]).any(-1)
        return chosen.sum(1).tolist(), chosen.shape[1]
