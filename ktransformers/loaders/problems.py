"""Keeping a list of hundreds of problems readable: equal ones of many layers or experts become one line."""

import re
from collections import defaultdict
from dataclasses import dataclass

from ktransformers.errors import ranges

_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")  # a layer or expert inside a dotted name


@dataclass(frozen=True)
class TensorProblem:
    """Something wrong with the tensor `name`."""

    name: str
    text: str

    @property
    def line(self) -> str:
        return f"{self.name}: {self.text}"


def grouped(problems: list[TensorProblem], at_least: int = 3) -> list[str]:
    """One line per problem; from `at_least` on, lines that differ only in numbers inside names become one,
    `model.layers.{3-60}.mlp.gate.weight: missing (58 tensors)`. The order of first appearance is kept."""
    groups: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        groups[_NUMBER.sub("#", problem.line)].append(problem.line)
    lines = []
    for members in groups.values():
        lines += [_merged(members)] if len(members) >= at_least else members
    return lines


def _merged(lines: list[str]) -> str:
    columns = zip(*([int(n) for n in _NUMBER.findall(line)] for line in lines), strict=True)
    numbers = [_shown(set(column)) for column in columns]
    merged = _NUMBER.sub(lambda _: numbers.pop(0), lines[0])
    return f"{merged} ({len(lines)} tensors)"


def _shown(values: set[int]) -> str:
    """`{3-60}`, `{0,2,5-9}`, or the number itself when there is only one."""
    if len(values) == 1:
        return str(*values)
    runs = ranges(values).split(",")
    if len(runs) > 8:
        runs = [*runs[:7], "...", runs[-1]]
    return "{" + ",".join(runs) + "}"
