"""A layer's experts in two parts: some on a GPU, all others where their rule puts them.

Here are the words for which experts (`gpu_experts` of a rule, `expert_ids`, `ranges`), how their weights become dense
one by one, and how two parts make one result. What either part computes is said in experts.py; which experts are worth
a place on the GPU, in ktransformers.planner.
Letters: T tokens, H hidden, I intermediate, E experts of the layer, n of them in a part, K experts per token.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.devices import device_problem
from ktransformers.errors import RuleError, is_whole, parse_ranges, ranges
from ktransformers.loaders import WeightSource
from ktransformers.loaders.sources import ExpertWeights, Matrices
from ktransformers.models.traits import is_interleaved, layer_of

GpuExperts = int | str | list | dict | None
"""What a rule may give as `gpu_experts`; see `expert_ids`."""

FORMS = "expected a number, a list of ids, ranges such as '0-15,40', or a mapping from layer numbers to any of these"


# --- which experts ----------------------------------------------------------------------------------------------------


def expert_ids(spec: GpuExperts, layer: int | None, n_experts: int) -> list[int]:
    """The experts of `layer` that `spec` names, ascending.

    `spec`: a number N (the first N), ids, ranges as text, or a mapping from layer numbers to these; a layer that a
    mapping does not name has none, nor has any layer with None.

    Raises RuleError for ids outside 0..n_experts-1, ids named twice, and whatever is of no such form.
    """
    if isinstance(spec, Mapping):
        spec = _by_layer(spec).get(layer)
        if isinstance(spec, Mapping):
            raise RuleError(f"gpu_experts: layer {layer} has a mapping of its own; {FORMS}")
    if spec is None:
        return []
    if isinstance(spec, str):
        ids = [n for first, last in _spans(spec, n_experts) for n in range(first, last + 1)]
    elif is_whole(spec):
        if not 0 <= spec <= n_experts:
            raise RuleError(f"gpu_experts: found {spec}, expected 0 to {n_experts}, the layer's experts")
        return list(range(spec))
    elif isinstance(spec, Sequence) and all(map(is_whole, spec)):
        ids = list(spec)
    else:
        raise RuleError(f"gpu_experts: found {str(spec)[:80]!r}; {FORMS}")
    if wrong := [n for n in ids if not 0 <= n < n_experts]:
        raise RuleError(f"gpu_experts: no expert {wrong[0]} here; expected ids from 0 to {n_experts - 1}")
    if twice := [n for n, after in pairwise(sorted(ids)) if n == after]:
        raise RuleError(f"gpu_experts: expert {twice[0]} is named twice; name each once")
    return sorted(ids)


def _spans(text: str, n_experts: int) -> list[tuple[int, int]]:
    """First and last of each range in `text`, bounded before anyone counts from one to the other."""
    spans, wrong = parse_ranges(text)
    if wrong is None:
        wrong = next((f"{first}-" for first, last in spans if last is None), None)
    if wrong is not None:
        raise RuleError(f"gpu_experts: {wrong.strip()[:40]!r} is no id and no range; {FORMS}")
    if beyond := [last for _, last in spans if last >= n_experts]:
        raise RuleError(f"gpu_experts: no expert {beyond[0]} here; expected ids from 0 to {n_experts - 1}")
    return spans


def _by_layer(spec: Mapping[Any, Any]) -> dict[int, Any]:
    """A mapping with its keys as numbers, which JSON can only spell as text."""
    named: dict[int, Any] = {}
    for key, value in spec.items():
        text = str(key)
        if isinstance(key, bool) or not re.fullmatch(r"\d{1,9}", text, re.ASCII):
            raise RuleError(f"gpu_experts: {text[:40]!r} is no layer number; {FORMS}")
        if int(text) in named:
            raise RuleError(f"gpu_experts: layer {int(text)} is named twice; name it once")
        named[int(text)] = value
    return named


def gpu_device(kwargs: Mapping[str, Any]) -> str:
    """Where a rule's `gpu_experts` live: `gpu_device`, else `out_device`, else "cuda"."""
    return kwargs.get("gpu_device") or kwargs.get("out_device") or "cuda"


def ids_of(key: str, experts: nn.Module, kwargs: Mapping[str, Any]) -> list[int]:
    """`expert_ids` of a rule's kwargs for the module `key`."""
    return expert_ids(kwargs.get("gpu_experts"), layer_of(key), len(experts.down_proj))


def problems(key: str, experts: nn.Module, kwargs: Mapping[str, Any], weights: WeightSource | None) -> list[str]:
    """Say what is wrong with a rule's `gpu_experts` for the module `key`. `weights` may be None."""
    spec = kwargs.get("gpu_experts")
    try:
        ids = ids_of(key, experts, kwargs)
        named = list(_by_layer(spec)) if isinstance(spec, Mapping) else []
    except RuleError as error:
        return [str(error)]
    found = [problem] if (problem := _absent_layers(named, key, experts, weights)) else []
    if not ids:
        return found
    given = kwargs.get("gpu_device") or kwargs.get("out_device")
    if given is None and device_problem("cuda"):
        found.append("gpu_device: not given, nor is out_device, and 'cuda', which that means, does not exist; name one")
    if weights is not None and weights.has_experts(key) and (problem := weights.experts_problem(key)):
        found.append(f"gpu_experts: {problem}, and experts cannot be read one by one; leave gpu_experts out")
    return found


def _absent_layers(named: list[int], key: str, experts: nn.Module, weights: WeightSource | None) -> str:
    """Say which layers of a mapping have no experts: told by the weights, else by how many layers the config has."""
    count = getattr(getattr(experts, "config", None), "num_hidden_layers", None)
    if weights is not None:
        end = f".{key.rpartition('.')[2]}.down_proj"
        known = {layer_of(name) for name in weights.names() if name.endswith(end)} - {None}
    elif isinstance(count, int):
        known = set(range(count))
    else:
        return ""
    if not (absent := set(named) - known):
        return ""
    what = "experts are in" if weights is not None else "the model has"
    return f"gpu_experts: no experts in layers {ranges(absent)}; {what} layers {ranges(known)}"


# --- weights ----------------------------------------------------------------------------------------------------------


def dense(
    packed: ExpertWeights, ids: Sequence[int], experts: nn.Module, device: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The experts `ids` of a layer as dense tensors on `device`, in the dtype of the family's module `experts`.

    Returns gate and up [n, 2I, H] with rows as the family orders them ([n, I, H] without a gate), down [n, H, I], and
    their biases [n, 2I] and [n, H] or None. Peak memory: the result and one expert, and where the file stores experts
    by columns a copy of the layer, which `packed` holds already.
    """
    dtype, interleaved = experts.down_proj.dtype, is_interleaved(experts)
    first = [packed.up] if packed.gate is None else [packed.gate, packed.up]
    gate_up, down = _stack(first, ids, interleaved, dtype, device), _stack([packed.down], ids, False, dtype, device)
    biases = [packed.up_bias] if packed.gate is None else [packed.gate_bias, packed.up_bias]
    bias = down_bias = None
    if biases[-1] is not None:
        joined = torch.stack(biases, -1).flatten(1) if interleaved and len(biases) == 2 else torch.cat(biases, 1)
        bias = joined[list(ids)].to(device, dtype)
    if packed.down_bias is not None:
        down_bias = packed.down_bias[list(ids)].to(device, dtype)
    return gate_up, down, bias, down_bias


def _stack(parts: list[Matrices], ids: Sequence[int], interleaved: bool, dtype: torch.dtype, device: Any) -> Tensor:
    """The matrices `ids` of each part below one another, or row by row in turn: [n, rows, columns]."""
    rows, columns = parts[0][0].shape
    out = torch.empty(len(ids), rows * len(parts), columns, dtype=dtype, device=device)
    for slot, e in enumerate(ids):
        for number, part in enumerate(parts):
            if interleaved:
                out[slot, number :: len(parts)].copy_(part[e].dequantize(dtype, device))
            else:
                part[e].dequantize_into(out[slot, number * rows : (number + 1) * rows])
    return out


def without(packed: ExpertWeights, ids: Sequence[int]) -> ExpertWeights:
    """The same with only `ids` (at least one) of its experts: in the place of any other stands the first of them.

    So no page of another expert is touched, and what is a copy is given back. Pages that were read to fill a GPU are
    clean pages of the file: the system takes them when it needs memory, and nothing here asks it to.
    """
    kept = set(ids)

    def only(matrices: Matrices | None) -> Matrices | None:
        return matrices and [matrix if e in kept else matrices[ids[0]] for e, matrix in enumerate(matrices)]

    return replace(packed, gate=only(packed.gate), up=only(packed.up), down=only(packed.down))


# --- two parts, one result --------------------------------------------------------------------------------------------

HOT, REST, NOWHERE = range(3)


def some(mask: Tensor) -> bool:
    """Whether `mask` is true anywhere. One function, so that a simulation without values can say yes."""
    return bool(mask.any())


class Split:
    """Sends each pair of token and expert to the part that has the expert, and adds up what comes back.

    `hot` is an inner operator (see experts.KExpertsBase) that has the experts `hot.ids`.
    """

    def __init__(self, hot: Any, n_experts: int):
        self.hot, self.n_experts, self.loaded = hot, n_experts, False
        self.rest_ids = sorted(set(range(n_experts)) - set(hot.ids))
        self._places = torch.full((n_experts + 1,), REST, device="cpu")
        self._places[n_experts] = NOWHERE
        self._places[list(hot.ids)] = HOT
        self._there = {self._places.device: self._places}  # by device: a captured graph copies none

    def unload(self) -> None:
        self.hot.unload()
        self.loaded = False

    def start(self, rest: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Callable[[], Tensor] | None:
        """Begin both parts side by side; the value gives the result, where `hidden` is. None where one of them has to
        wait for the GPU: for dense weights, whose experts are counted, or on a CPU that runs beside nothing."""
        beside = getattr(rest, "runs_beside", None)
        if not self.rest_ids or not getattr(self.hot, "on_gpu", False) or beside is None or not beside(hidden, weights):
            return None
        end = rest.start(hidden, ids.where(self._of(ids) == REST, -1), weights)
        hot = self._hot(hidden, ids, weights)
        return lambda: hot + end()

    def _of(self, ids: Tensor) -> Tensor:
        """Which part has the expert of each id."""
        if ids.device not in self._there:
            self._there[ids.device] = self._places.to(ids.device)
        return self._there[ids.device][ids.where((ids >= 0) & (ids < self.n_experts), self.n_experts)]

    def forward(
        self, rest: Any, hidden: Tensor, ids: Tensor, weights: Tensor, out_device: Any = None, *adapters: Any
    ) -> Tensor:
        """The contract of experts.py, with `rest` for all other experts. The result is on `out_device`, or where
        `hidden` is, in its dtype. `adapters`: none, or those of the layer, for both parts."""
        target = hidden.device if out_device is None else out_device
        if not self.rest_ids:
            return self._hot(hidden, ids, weights, *adapters).to(target)
        if not adapters and (end := self.start(rest, hidden, ids, weights)) is not None:
            return end().to(target)
        # What the other part needs comes first: once the GPU has work, a copy from it waits for that work.
        near = ids.to(rest.device)
        places = self._of(near)
        to_rest = some(places == REST)
        x, w = (hidden.to(rest.device), weights.to(rest.device)) if to_rest else (None, None)
        hot = some(places == HOT)
        parts = [self._hot(hidden, ids, weights, *adapters)] if hot else []  # goes on while the next part computes
        if to_rest:
            parts.append(rest.forward(x, near.where(places == REST, -1), w, *adapters))
        if not parts:
            return hidden.new_zeros(hidden.shape, device=target)
        parts = [part.to(target) for part in parts]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _hot(self, hidden: Tensor, ids: Tensor, weights: Tensor, *adapters: Any) -> Tensor:
        device = self.hot.device
        return self.hot.forward(hidden.to(device), ids.to(device), weights.to(device), *adapters)
