"""What is wrong with rules, or worth a word: one `Finding` each, with the place in the file that is at fault."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktransformers.errors import RuleError, did_you_mean, join_errors

Keys = tuple[Any, ...]
"""The way to a value of a rule: ("replace", "kwargs", "generate_op")."""


@dataclass(frozen=True)
class Finding:
    """One line for people. `where`: ``path:line``, ``rule N`` of a parsed list, or a path where no line is at fault.

    `level` is error, warning or note; `keys` the value in the rule, so that no value is complained of twice.
    """

    level: str
    where: str
    rule: int | None
    text: str
    keys: Keys = field(default=(), compare=False)

    def __str__(self) -> str:
        rule = f" (rule {self.rule})" if self.rule is not None and self.where != f"rule {self.rule}" else ""
        return f"{self.where}{rule}: {self.text}" if self.where else self.text


class RuleWarning(UserWarning):
    """A finding about rules that work as they are."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


@dataclass
class Reporter:
    """Collects findings about one rule, so that the search for others goes on.

    `where` is the rule's place and `lines` that of each of its keys: a finding about a key names the key's line.
    """

    where: str
    number: int
    findings: list[Finding]
    lines: Mapping[Keys, int] = field(default_factory=dict)
    level: str = "error"

    def __call__(self, text: str, *keys: Any) -> None:
        self.findings.append(Finding(self.level, place(self.where, self.lines, keys), self.number, text, keys))

    def has(self, *keys: Any) -> bool:
        """Whether something was said already of the value at `keys`, or of one below it."""
        return any(found.rule == self.number and found.keys[: len(keys)] == keys for found in self.findings)


def place(where: str, lines: Mapping[Keys, int], keys: Keys) -> str:
    """``path:line`` of the key at the end of `keys`, or of the nearest above it that the file has."""
    while keys and keys not in lines:
        keys = keys[:-1]
    return f"{where.rpartition(':')[0]}:{lines[keys]}" if keys else where


def rule_error(headline: str, findings: Sequence[Finding]) -> RuleError:
    """One error that lists all findings, and keeps them as its `problems`."""
    many = "1 problem" if len(findings) == 1 else f"{len(findings)} problems"
    return join_errors(RuleError, f"{headline}: {many}, nothing was changed:", findings)


_DEVICES_AND_OPS = (
    "generate_device", "prefill_device", "out_device", "gpu_device", "generate_op", "prefill_op", "backend",
    "transfer_map", "per_layer_prefill_intput_threshold", "absorb_for_prefill",
)  # fmt: skip
HOMES: dict[str, str] = {
    **dict.fromkeys(("name", "trait"), "under match"),
    "class": "under match or replace",
    "kwargs": "under replace",
    **dict.fromkeys(("recursive", "expect", "match", "replace"), "one level up, next to match and replace"),
    **dict.fromkeys(_DEVICES_AND_OPS, "under replace, in its kwargs"),
}
"""Keys that are right somewhere in a rule -> where."""


def unknown_key(key: Any, known: Sequence[str]) -> str:
    """What to say of a key that is not among those `known` where it stands."""
    if isinstance(key, str) and key in HOMES:
        return f"{key!r} belongs {HOMES[key]}; known here: {', '.join(known)}"
    return f"unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}"
