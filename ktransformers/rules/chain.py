"""The chain of layers under a plan: where each layer's input is, and what in the layer is somewhere else.

Told from the plan and the modules alone: no forward, no weights, no fake tensors. It knows the operators of this
package; what an operator of the user's does with devices only a simulated forward shows: nothing below one is judged.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from ktransformers.devices import DEVICE_KWARGS, canonical
from ktransformers.errors import ranges
from ktransformers.models.traits import TRAITS
from ktransformers.operators.attention import KDeepseekV2Attention
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.operators.inner_ops import final_name, given, is_cpu
from ktransformers.operators.linear import KTransformersLinear
from ktransformers.operators.models import DecoderModel
from ktransformers.rules.layers import BEFORE
from ktransformers.rules.plan import Replacement, rule_label

Plan = Mapping[str, Replacement]


@dataclass(frozen=True)
class ChainProblem:
    """What is wrong with a plan.

    `module` is the module's name, `rule` what placed it ("3 (x.yaml:12)", "" where no rule did), `devices` those that
    do not meet, `operation` what failed in a forward ("" where none ran). With `warning` it runs all the same.
    """

    module: str
    rule: str
    text: str
    devices: tuple[str, ...] = ()
    operation: str = ""
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.module}: {self.text}" if self.module else self.text


def placed_by(name: str, plan: Plan) -> Replacement | None:
    """What the plan says of a module, or of the nearest module above it that the plan knows."""
    while name and name not in plan:
        name = name.rpartition(".")[0]
    return plan.get(name)


def chain_problems(model: nn.Module, plan: Plan) -> list[ChainProblem]:
    """Compare the devices along the chain: embedding, layers, norm, head.

    Args:
        model: before operators are in it, on the meta device.
        plan: what `ktransformers.rules.plan` returns for it.

    Returns:
        The problems in the order of the chain; none for a model without a list of layers, or whose decoder a rule
        replaces by an operator that is no `DecoderModel`.
    """
    found = _decoder(model)
    if found is None:
        return []
    name, decoder = found
    taken = plan.get(name)
    if taken is not None and taken.operator is not None and not issubclass(taken.operator, DecoderModel):
        return []
    return _Chain(model, plan, name, decoder).problems()


def _decoder(model: nn.Module) -> tuple[str, nn.Module] | None:
    for name, module in model.named_modules():
        if TRAITS["decoder"](module):
            return name, module
    return None


@dataclass(frozen=True)
class _Part:
    """A module that has to be where its input is; or, with `key` "out_device", where a module's result goes."""

    name: str
    device: str
    placed: Replacement | None
    key: str = ""


@dataclass
class _Layer:
    """One layer: where its input is, and its parts. `moved` says what brings the input there, for a message."""

    number: int
    name: str
    parts: list[_Part]
    input: str = ""
    moved: str = ""
    mapped: bool = False

    def strangers(self) -> list[_Part]:
        return [part for part in self.parts if part.device != self.input]

    def own_device(self) -> str | None:
        """The one device of all that computes in the layer, or None when there are several, or nothing computes."""
        devices = {part.device for part in self.parts if not part.key}
        return devices.pop() if len(devices) == 1 else None


@dataclass
class _Chain:
    model: nn.Module
    plan: Plan
    name: str
    decoder: nn.Module
    layers: list[_Layer] = field(default_factory=list)

    def problems(self) -> list[ChainProblem]:
        self.mover = self.plan.get(self.name) if self._moves() else None
        self.layers = [
            _Layer(number, name := f"{self.name}.layers.{number}".lstrip("."), list(self._parts(name, layer)))
            for number, layer in enumerate(self.decoder.layers)
        ]
        end, found = self._follow()
        found += self._forgotten({problem.module for problem in found})
        return found + self._detours() + self._end(end)

    def _moves(self) -> bool:
        taken = self.plan.get(self.name)
        return taken is not None and taken.operator is not None and issubclass(taken.operator, DecoderModel)

    # --- what a layer is made of ---

    def _device(self, name: str) -> str:
        placed = placed_by(name, self.plan)
        return canonical(placed.device if placed is not None else "cpu")

    def _parts(self, name: str, module: nn.Module) -> Iterator[_Part]:
        placed = placed_by(name, self.plan)
        operator = self.plan[name].operator if name in self.plan else None
        if operator is not None and not operator.__module__.startswith("ktransformers."):
            return
        if operator is not None and issubclass(operator, (KTransformersLinear, KTransformersExperts)):
            if (target := placed.kwargs.get("out_device")) is not None:
                yield _Part(name, canonical(target), placed, "out_device")
            return
        if operator is not None and not getattr(operator, "adopts", True) or TRAITS["rotary"](module):
            return
        if _owns(module) or self._holds_kv_b(name, operator):
            yield _Part(name, self._device(name), placed)
        for child_name, child in module.named_children():
            yield from self._parts(f"{name}.{child_name}", child)

    def _holds_kv_b(self, name: str, operator: type | None) -> bool:
        """Whether it is the MLA operator, and ``kv_b_proj`` is packed, so that it has a dense copy of its own."""
        if operator is None or not issubclass(operator, KDeepseekV2Attention):
            return False
        kv_b = self.plan.get(f"{name}.kv_b_proj")
        return kv_b is not None and kv_b.operator is not None and not _is_dense_linear(kv_b)

    def _first_weight(self, layer: _Layer) -> str | None:
        """Where `DecoderModel` moves a layer's input without a transfer_map: to the layer's first parameter."""
        for name, module in self.model.get_submodule(layer.name).named_modules(prefix=layer.name):
            placed = placed_by(name, self.plan)
            operator = placed.operator if placed is not None and placed.key == name else None
            if next(module.parameters(recurse=False), None) is None or self._below_an_operator(name):
                continue
            if operator is None or getattr(operator, "adopts", True) or _is_dense_linear(placed):
                return self._device(name)
        return None

    def _below_an_operator(self, name: str) -> bool:
        """Whether an operator above the module keeps none of its children."""
        parent = name.rpartition(".")[0]
        while parent:
            operator = self.plan[parent].operator if parent in self.plan else None
            if operator is not None and not getattr(operator, "adopts", True):
                return True
            parent = parent.rpartition(".")[0]
        return False

    # --- the chain ---

    def _follow(self) -> tuple[tuple[str, str], list[ChainProblem]]:
        """Walk the layers. Returns (where the last one's output is, why it is there) and the problems."""
        at = self._device(self._embedding())
        why, mapped, found = "where the embedding is", False, []
        transfers = self._transfers()
        for layer in self.layers:
            if self.mover is None:
                layer.input, layer.moved = at, why
                own = layer.own_device()
                if own is not None and own != at:
                    found.append(self._unmoved(layer, own))
                    at, why = own, f"where layer {layer.number} works"
                    layer.input = own
            elif layer.number in transfers or mapped:
                mapped = True
                if layer.number in transfers:
                    at = transfers[layer.number]
                    why = f"for the transfer_map of rule {rule_label(self.mover)} says so from layer {layer.number} on"
                layer.input, layer.moved, layer.mapped = at, why, True
            else:
                layer.input = at = self._first_weight(layer) or at
                layer.moved = why = "where its first weight is"
        return (at, why), found + self._strangers()

    def _embedding(self) -> str:
        """The name of the first embedding: `DecoderModel` moves what each of them is given and gives."""
        children = self.decoder.named_children()
        first = next((name for name, child in children if isinstance(child, nn.Embedding)), "")
        return f"{self.name}.{first}".strip(".")

    def _transfers(self) -> dict[int, str]:
        given = (self.mover.kwargs.get("transfer_map") if self.mover is not None else None) or {}
        return {int(layer): canonical(device) for layer, device in given.items()}

    def _unmoved(self, layer: _Layer, own: str) -> ChainProblem:
        part = next(part for part in layer.parts if not part.key)
        text = (
            f"{_by(part)} put layer {layer.number} on {own}, but its input is on {layer.input}, {layer.moved}, and "
            f"nothing moves it; add a rule that replaces {self.name!r} by ktransformers.operators.models.DecoderModel"
        )
        return ChainProblem(part.name, rule_label(part.placed), text, (own, layer.input))

    def _strangers(self) -> list[ChainProblem]:
        """Parts that are not where their layer's input is: whole layers first, then single modules."""
        found: dict[tuple, list[tuple[_Layer, _Part]]] = {}
        for layer in self.layers:
            own = layer.own_device()
            whole = own is not None and own != layer.input
            # In a layer that is elsewhere as a whole, an out_device that agrees with it is no mistake of its own.
            for part in [part for part in layer.strangers() if not part.key][:1] if whole else layer.strangers():
                rule = part.placed.rule.number if part.placed and part.placed.rule else 0
                key = (whole, part.key, rule, part.device, layer.input)
                found.setdefault(key, []).append((layer, part))
        return [self._whole_layers(group) if key[0] else self._single(group) for key, group in found.items()]

    def _whole_layers(self, group: list[tuple[_Layer, _Part]]) -> ChainProblem:
        layer, part = group[0]
        numbers, after = _ranges([layer.number for layer, _ in group]), group[-1][0].number + 1
        advice = f"place the layer on {layer.input}"
        if not _has_rule(part):
            advice = f"name {numbers} in a rule, for {layer.input}"
        elif layer.mapped and layer.number in self._transfers() and after < len(self.layers):
            advice = f"move that entry to layer {after}, or {advice}"
        elif layer.mapped:
            advice = f"give the transfer_map {layer.number}: {part.device}, or {advice}"
        text = f"{_by(part)} put {numbers} on {part.device}, but the input is on {layer.input}, {layer.moved}; {advice}"
        return ChainProblem(part.name, rule_label(part.placed), text, (part.device, layer.input))

    def _single(self, group: list[tuple[_Layer, _Part]]) -> ChainProblem:
        layer, part = group[0]
        more = f" (and so for {len(group) - 1} more modules)" if len(group) > 1 else ""
        if part.key:
            text = (
                f"{_by(part)} has out_device {part.device}, but its layer works on {layer.input}, {layer.moved}{more}; "
                f"write out_device: {layer.input}, or leave it out"
            )
        else:
            text = (
                f"{_by(part)} put it on {part.device}, but its layer's input is on {layer.input}, {layer.moved}{more}; "
                f"place it on {layer.input}"
            )
        return ChainProblem(part.name, rule_label(part.placed), text, (part.device, layer.input))

    def _forgotten(self, named: set[str]) -> list[ChainProblem]:
        """Layers that no rule names though rules name most others."""
        bare = [layer for layer in self.layers if layer.parts and not any(_has_rule(part) for part in layer.parts)]
        full = [layer for layer in self.layers if layer.parts and all(_has_rule(part) for part in layer.parts)]
        if not bare or len(full) <= len(self.layers) // 2:
            return []
        bare = [x for x in bare if not named & {part.name for part in x.parts} and self._is_alone(x)]
        if not bare:
            return []
        part = bare[0].parts[0]
        text = (
            f"no rule names {_ranges([layer.number for layer in bare])}, though rules name the same modules of other "
            f"layers; it is on the default device, {part.device}. Widen a rule's range"
        )
        return [ChainProblem(part.name, "", text, (part.device,))]

    def _is_alone(self, layer: _Layer) -> bool:
        """Whether no layer next to it is on its device."""
        neighbours = self.layers[max(layer.number - 1, 0) : layer.number + 2]
        return all(other.input != layer.input for other in neighbours if other is not layer)

    def _detours(self) -> list[ChainProblem]:
        """Layers whose input goes back to a device that the chain has left."""
        found, left, before = [], set(), None
        for layer in self.layers:
            if before is not None and layer.input != before.input:
                left.add(before.input)
                if layer.input in left and not layer.strangers():
                    part = layer.parts[0] if layer.parts else _Part(layer.name, layer.input, None)
                    text = (
                        f"layer {layer.number} goes back from {before.input} to {layer.input}: it works, with more "
                        "copies than layers in one run for each device would need"
                    )
                    found.append(
                        ChainProblem(
                            part.name, rule_label(part.placed), text, (before.input, layer.input), warning=True
                        )
                    )
            before = layer
        return found

    def _end(self, end: tuple[str, str]) -> list[ChainProblem]:
        """What comes after the last layer: the decoder's own (a norm), then the head."""
        (at, why), found, after = end, [], False
        for child_name, child in self.decoder.named_children():
            name = f"{self.name}.{child_name}".lstrip(".")
            last = after and not isinstance(child, nn.Embedding) and not child_name.startswith(BEFORE)
            for part in self._parts(name, child) if last else ():
                if self.mover is not None and part.name == name:
                    at, why = part.device, f"where {name} is"
                elif part.device != at and not part.key:
                    found.append(_at_end(part, at, why))
            after = after or child is self.decoder.layers
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        name = next((name for name, module in self.model.named_modules() if module is head), "")
        for part in self._parts(name, head) if head is not None and name else ():
            if not part.key and part.device != at:
                found.append(_at_end(part, at, why))
        return found


def _at_end(part: _Part, at: str, why: str) -> ChainProblem:
    text = (
        f"{_by(part)} put it on {part.device}, but the hidden state that reaches it is on {at}, {why}; place it on "
        f"{at}, or for a linear layer name ktransformers.operators.linear.KTransformersLinear, which moves its input"
    )
    return ChainProblem(part.name, rule_label(part.placed), text, (part.device, at))


def _has_rule(part: _Part) -> bool:
    return part.placed is not None and part.placed.rule is not None


def _by(part: _Part) -> str:
    """Who placed a part, as the beginning of a sentence in the past."""
    if not _has_rule(part):
        return "no rule names it, so the default"
    names_none = not any(key in part.placed.rule.kwargs for key in DEVICE_KWARGS)
    return f"rule {rule_label(part.placed)}" + (" names no device, so the default" if names_none else "")


def _owns(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None for tensor in tensors)


def _is_dense_linear(placed: Replacement | None) -> bool:
    """Whether a replaced linear layer keeps a parameter: packed ones have none. Unnamed on a GPU it is taken to."""
    if placed is None or placed.operator is None or not issubclass(placed.operator, KTransformersLinear):
        return False
    final = final_name(given(placed.kwargs.get("generate_op")), placed.device)
    return final == "KLinearTorch" or final is None and not is_cpu(placed.device)


def _ranges(numbers: list[int]) -> str:
    """``[3, 4, 5, 8]`` -> ``layers 3-5, 8``."""
    return f"layer{'s' if len(numbers) > 1 else ''} {ranges(numbers).replace(',', ', ')}"
