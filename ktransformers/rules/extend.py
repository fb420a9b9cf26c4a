"""Rewrite a classic rule file in the extended form, where `devices:` says once where layers live; and prove it.

What the new file says is planned and compared with the old plan, module by module, so nothing here has to be trusted:
a step that would change the plan is left out, and where the result could not be equal there is an error. The proof
holds for one model. Equal are operators, kwargs and devices of all modules, but for containers that hold no tensor and
that no rule names: those are where their layer is, instead of on the old file's default device. Nothing here writes
files.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ktransformers.devices import DEVICE_KWARGS, canonical
from ktransformers.errors import RuleError, ranges
from ktransformers.rules import classes
from ktransformers.rules.explain import layer_devices
from ktransformers.rules.files import ANY
from ktransformers.rules.layers import AUTO, LAYER, REST, parse_devices, place
from ktransformers.rules.plan import Replacement, Rule, RuleFile, load_rules, module_pattern, plan

FILLED_IN = ("generate_device", "prefill_device")
MOST_PATTERNS = 8
"""Of modules that no rule names and that have to stay where they are; more become one rule for all names."""


def extend(model: nn.Module, rule: str | Path, gpus: int) -> str:
    """The text of the classic rule file `rule` in the extended form. Keeps the comments at its top, no others.

    Args:
        model: the model to prove it for, on the meta device.
        rule: path of the file.
        gpus: enough of them for every device that the file names; 0 when it names none. Then ``devices: auto`` is
            written, and proved without a GPU and with one.

    Raises:
        RuleError: no such file, mistakes in it, a file in the extended form already, or one that has no equal.
    """
    file, top, items = _read(rule)
    return top + _Rewriting(model, file, items, gpus).text()


def _read(rule: str | Path) -> tuple[RuleFile, str, list[dict[str, Any]]]:
    """The rules, the comments at the top of the file, and what YAML makes of it."""
    with _quiet():
        file = load_rules(rule)
    path = Path(rule).expanduser()
    text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    items = yaml.safe_load(text) if text else None
    if not isinstance(items, list):
        more = "" if file.devices else ", but has no `devices:`; add them by hand"
        raise RuleError(f"{file.label}: is in the extended form already{more}. There is nothing to rewrite.")
    top = []
    for line in text.splitlines():
        if line.strip() and not line.startswith(("#", "---")):
            break
        top += [] if line.startswith("---") else [line]
    return file, "\n".join(top).rstrip() + "\n" if any(top) else "", items


def _quiet() -> warnings.catch_warnings:
    return warnings.catch_warnings(action="ignore")


@dataclass(frozen=True)
class _Piece:
    """One rule of the old file. `slots`: kwarg -> the device it means; `follows`: those that are always the layer's.

    The slot "" is the device of an operator that takes none by name. `name` is the pattern with the layer numbers as
    ``\\d+``, and `key` says which rules differ in nothing but layers and devices; both are None without layer numbers.
    """

    item: Mapping[str, Any]
    slots: Mapping[str, str]
    follows: frozenset[str]
    filled_in: frozenset[str]
    pairs: bool
    """Whether prefill_device is generate_device unless given, as it is for "default"."""
    name: str | None = None
    key: str | None = None


class _Rewriting:
    """One file for one model: its old plan, where that puts layers, and its rules in pieces."""

    def __init__(self, model: nn.Module, file: RuleFile, items: list[dict[str, Any]], gpus: int):
        self.model, self.label, self.file = model, file.label, file
        self.counts = [gpus] if gpus else [1, 0]
        self.old = {count: self._plan(file, count) for count in self.counts}
        plan = self.old[self.counts[0]]
        self.homes = [_canonical(counts) for counts in layer_devices(model, plan)]
        self.devices = AUTO if not gpus else _devices_section(self._majorities(plan))
        self.placed, problems = place(parse_devices(self.devices)[0], model, self.counts[0])
        if problems:
            said = "; ".join(problem for _, problem in problems)
            raise RuleError(f"{self.label}: cannot be in the extended form: {said}.")
        won: dict[int, list[Replacement]] = {}
        for replacement in plan.values():
            if replacement.rule is not None:
                won.setdefault(replacement.rule.number, []).append(replacement)
        pairs = zip(file, items, strict=True)
        self.pieces = [self._piece(rule, item, won.get(rule.number, [])) for rule, item in pairs]

    def _plan(self, what: Any, gpus: int) -> dict[str, Replacement]:
        with _quiet():
            return plan(self.model, what, gpus=gpus)

    def _majorities(self, plan: Mapping[str, Replacement]) -> list[str]:
        """The device of most modules of each layer; of a layer without any, the device of the layer before."""
        found: list[str] = []
        for counts in self.homes:
            most = counts.most_common(1)
            default = found[-1] if found else next(iter(plan.values())).device
            found.append(most[0][0] if most else canonical(default))
        return found

    # --- one rule ---

    def _piece(self, rule: Rule, item: Mapping[str, Any], won: Sequence[Replacement]) -> _Piece:
        slots = self._slots(rule, won)
        span = self._layer_numbers(rule.name.pattern) if rule.name else None
        if won:
            homes = {canonical(self.placed.device(replacement.key)) for replacement in won}
        else:
            homes = {canonical(self.placed.devices[i]) for i in span[2]} if span else set()
        follows = frozenset(key for key, device in slots.items() if homes == {device})
        filled_in = frozenset([*self._filled_in(rule), ""])
        if span is None:
            return _Piece(item, slots, follows, filled_in, rule.operator is None)
        name = rule.name.pattern[: span[0]] + r"\d+" + rule.name.pattern[span[1] :]
        kwargs = {k: v for k, v in rule.kwargs.items() if k not in DEVICE_KWARGS}
        given = sorted(k for k in rule.kwargs if k in DEVICE_KWARGS)
        match = {k: v for k, v in item["match"].items() if k != "name"}
        parts = (name, match, item["replace"].get("class"), kwargs, given, rule.recursive, "expect" in item)
        return _Piece(item, slots, follows, filled_in, rule.operator is None, name, repr(parts))

    def _filled_in(self, rule: Rule) -> list[str]:
        """The device kwargs that the framework fills in when a rule gives none."""
        return classes.device_parameters(rule.operator) if rule.operator else list(FILLED_IN)

    def _slots(self, rule: Rule, won: Sequence[Replacement]) -> dict[str, str]:
        slots = {k: canonical(v) for k, v in rule.kwargs.items() if k in DEVICE_KWARGS and v is not None}
        filled_in = self._filled_in(rule)
        if rule.operator is None and "generate_device" in slots:
            filled_in = []  # prefill_device goes where generate_device does
        if won:
            slots |= {k: canonical(won[0].kwargs[k]) for k in filled_in if k not in slots}
        if won and not slots:
            slots[""] = canonical(won[0].device)
        return slots

    def _layer_numbers(self, pattern: str) -> tuple[int, int, list[int]] | None:
        """Where in a name pattern layers are chosen by number: start, end, and which layers. None where nowhere."""
        stack = self.placed.stack.rpartition(".")[2]
        for found in re.finditer(re.escape(stack) + r"\\?\.", pattern):
            start, end = found.end(), _end_of_part(pattern, found.end())
            try:
                part = re.compile(pattern[start:end])
            except re.error:
                continue
            layers = [i for i in range(len(self.placed.devices)) if part.fullmatch(str(i))]
            if layers and not part.fullmatch("x") and not part.fullmatch(""):
                return start, end, layers
        return None

    # --- the new file ---

    def text(self) -> str:
        """The new file, with as many rules merged as leaves the plan equal."""
        groups: dict[str, list[_Piece]] = {}
        for piece in self.pieces:
            if piece.key is not None:
                groups.setdefault(piece.key, []).append(piece)
        several = [key for key, group in groups.items() if len(group) > 1 and self._rule(group)]
        text, wrong = self._attempt(groups, several)
        if not wrong:
            return text
        text, wrong = self._attempt(groups, merged := [])
        if wrong:
            raise RuleError(f"{self.label}: cannot be in the extended form: {wrong}. Keep the file as it is.")
        for key in several:
            longer, wrong = self._attempt(groups, [*merged, key])
            if not wrong:
                text, merged = longer, [*merged, key]
        return text

    def _attempt(self, groups: Mapping[str, list[_Piece]], merged: Sequence[str]) -> tuple[str, str]:
        """The file with the groups in `merged` merged, and the first module that it changes ("" when none)."""
        written = []
        for piece in self.pieces:
            if piece.key not in merged:
                written.append(self._rule([piece]))
            elif piece is groups[piece.key][0]:
                written.append(self._rule(groups[piece.key]))
        text = self._dump(written)
        different, wrong = self._compare(text)
        before = [self.old[self.counts[0]].get(name) for name in different]  # None: hidden there
        if before and all(placed is not None and placed.rule is None for placed in before):
            text = self._dump([*written, self._stay(different)])
            _, wrong = self._compare(text)
        return text, wrong

    def _rule(self, group: Sequence[_Piece]) -> dict[str, Any] | None:
        """One rule that stands for all in `group`; None where no one rule can name their devices."""
        meant: dict[str, str] = {}
        for key in dict.fromkeys(key for piece in group for key in piece.slots):
            having = [piece for piece in group if key in piece.slots]
            if all(key in piece.follows for piece in having):
                meant[key] = LAYER
            elif len(devices := {piece.slots[key] for piece in having}) == 1:
                meant[key] = devices.pop()
            else:
                return None
        item = dict(group[0].item)
        if len(group) > 1:
            item["match"] = {**item["match"], "name": group[0].name}
            if "expect" in item:
                numbers = [piece.item["expect"] for piece in group]
                item["expect"] = ANY if ANY in numbers else sum(numbers)
        item["replace"] = self._replace(group[0], meant)
        return item

    def _replace(self, piece: _Piece, meant: Mapping[str, str]) -> dict[str, Any]:
        replace = dict(piece.item["replace"])
        kwargs = {}
        for key, value in (replace.pop("kwargs", None) or {}).items():
            if meant.get(key) != LAYER:
                kwargs[key] = value
            elif key not in piece.filled_in or piece.pairs and meant.get("generate_device") not in (None, LAYER):
                kwargs[key] = LAYER
        given = piece.item["replace"].get("kwargs") or {}
        kwargs |= {k: v for k, v in meant.items() if k and v != LAYER and given.get(k) is None}
        kwargs = self._with_transfers(piece, kwargs)
        if kwargs:
            replace["kwargs"] = kwargs
        if any(device == LAYER and key in piece.filled_in and key not in kwargs for key, device in meant.items()):
            replace["device"] = LAYER
        elif "" in meant:
            replace["device"] = meant[""]
        return replace

    def _with_transfers(self, piece: _Piece, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` without the transfer_map where `devices:` says the same; with an empty one where it says more."""
        operator, _ = classes.find_class(str(piece.item["replace"].get("class")))
        if operator is None or "transfer_map" not in classes.parameters(operator):
            return kwargs
        if self._same_transfers(kwargs.get("transfer_map"), self.placed.transfer_map):
            return {key: value for key, value in kwargs.items() if key != "transfer_map"}
        return {**kwargs, "transfer_map": kwargs.get("transfer_map") or {}}

    def _same_transfers(self, old: Mapping[Any, str] | None, new: Mapping[Any, str] | None) -> bool:
        """Whether two transfer maps say the same, where the new one may say of layer 0 what was so without it.

        Without an entry the decoder looks where a layer's first weight is: that is the layer's device only if nothing
        in the layer is elsewhere.
        """
        before, after = ({int(i): canonical(device) for i, device in (found or {}).items()} for found in (old, new))
        if before == after:
            return True
        plain = all(len(counts) <= 1 for counts in self.homes[: min(before, default=None)])
        return plain and {0: canonical(self.placed.devices[0])} | before == after

    def _stay(self, names: Sequence[str]) -> dict[str, Any]:
        """The last rule: modules that no rule named stay on the old default device."""
        patterns = [re.escape(p).replace(r"\*", r"\d+") for p in dict.fromkeys(map(module_pattern, names))]
        name = f"^({'|'.join(patterns)})$" if len(patterns) <= MOST_PATTERNS else ".+"
        device = self.old[self.counts[0]][names[0]].device
        return {"match": {"name": name}, "replace": {"class": "default", "device": device}}

    def _dump(self, written: Sequence[Mapping[str, Any]]) -> str:
        content = {"devices": self.devices, "rules": list(written)}
        return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

    # --- the proof ---

    def _compare(self, text: str) -> tuple[list[str], str]:
        """Modules of which the file `text` says something else than the old one, and what, for the first."""
        for count in self.counts:
            try:
                new = self._plan(yaml.safe_load(text), count)
            except RuleError as error:
                return [], str(error)
            old = self.old[count]
            names = list(dict.fromkeys([*old, *new]))
            if different := [name for name in names if not self._equal(name, old.get(name), new.get(name))]:
                first = different[0]
                return different, f"{first} would be {_words(new.get(first))}, and is {_words(old.get(first))}"
        return [], ""

    def _equal(self, name: str, old: Replacement | None, new: Replacement | None) -> bool:
        if old is None or new is None or old.operator is not new.operator:
            return False
        if old.operator is old.rule is new.rule is None and _holds_nothing(self.model.get_submodule(name)):
            return True
        if not self._same_transfers(old.kwargs.get("transfer_map"), new.kwargs.get("transfer_map")):
            return False
        return canonical(old.device) == canonical(new.device) and _comparable(old) == _comparable(new)


def _canonical(counts: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for device, number in counts.items():
        found[canonical(device)] += number
    return found


def _holds_nothing(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return all(tensor is None for tensor in tensors)


def _comparable(replacement: Replacement) -> dict[str, Any]:
    return {
        key: canonical(value) if key in DEVICE_KWARGS and value is not None else value
        for key, value in replacement.kwargs.items()
        if key != "transfer_map"
    }


def _words(replacement: Replacement | None) -> str:
    if replacement is None:
        return "below a module that hides it"
    operator = replacement.operator.__name__ if replacement.operator else "as it is"
    return f"{operator} on {replacement.device} with {dict(replacement.kwargs)}"


def _devices_section(homes: Sequence[str]) -> dict[str, Any]:
    """`devices:` for the devices of the layers in order; the last one has the rest if that is one stretch."""
    found: dict[str, Any] = {}
    for device in dict.fromkeys(homes):
        text = ranges(i for i, home in enumerate(homes) if home == device)
        found[device] = int(text) if text.isdecimal() else text
    last = homes[-1]
    if isinstance(found[last], int) or "," not in found[last]:
        found[last] = REST
    return found


def _end_of_part(pattern: str, start: int) -> int:
    """Where the part of a pattern that begins at `start` ends: at a dot, ``$`` or ``)`` outside of its brackets."""
    i, depth, in_set = start, 0, False
    while i < len(pattern):
        char, after = pattern[i], pattern[i + 1 : i + 2]
        if char == "\\":
            if after == "." and not depth and not in_set:
                return i
            i += 2
            continue
        if in_set:
            in_set = char != "]"
        elif char == "[":
            in_set = True
        elif char == "(":
            depth += 1
        elif not depth and (char in "$)|" or char == "." and i > start and after not in ("*", "+", "?", "{")):
            return i
        elif char == ")":
            depth -= 1
        i += 1
    return i


class _Dumper(yaml.SafeDumper):
    """Without anchors: two rules that happen to share a value are still two."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
