"""Exceptions with one root, and the two helpers that make their messages worth reading.

A message names its subject, what was found, what was expected, and the next step. This file knows
nothing about rules, weights or devices; it is the bottom of the import order together with env.py.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar


class KTransformersError(Exception):
    """Root of every error this package raises on purpose. Never raised directly for a known kind of fault."""

    problems: Sequence[object] = ()
    """What `join_errors` listed, each with a text of its own."""


class RuleError(KTransformersError, ValueError):
    """A rule file cannot be read, or a rule in it does not fit the model. Lists every problem at once."""


class WeightError(KTransformersError, ValueError):
    """A checkpoint is damaged, or its tensors do not fit the model."""


class NativeError(KTransformersError, RuntimeError):
    """The C library refused a call, or is not built."""


class UnsupportedError(KTransformersError, NotImplementedError):
    """Valid input that this version does not compute, such as a quantization type or a model family."""


class SFTError(KTransformersError, ValueError):
    """A training file, a dataset or an adapter that cannot be used."""


class DeviceError(KTransformersError, RuntimeError):
    """A device that a rule or a call names does not exist on this machine."""


_E = TypeVar("_E", bound=KTransformersError)


def did_you_mean(word: str, candidates: Iterable[str], spelled: Mapping[str, str] | None = None) -> str:
    """Return ``" (did you mean 'x'?)"`` for the candidate closest to `word`, or ``""`` when none is close.

    `spelled`: how a candidate is to be written, where that is not the candidate itself.
    """
    close = difflib.get_close_matches(str(word), list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {(spelled or {}).get(close[0], close[0])!r}?)" if close else ""


def join_errors(kind: type[_E], headline: str, problems: Sequence[object]) -> _E:
    """Build one exception of `kind` that lists every problem on a line of its own below `headline`."""
    error = kind(headline + "".join(f"\n  - {problem}" for problem in problems))
    error.problems = tuple(problems)
    return error


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges, ``[3, 4, 5, 8]`` -> ``3-5,8``: how rule files name layers and experts. Empty text for none."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def is_whole(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether `value` is a whole number from `least` to `most`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def parse_ranges(text: str) -> tuple[list[tuple[int, int | None]], str | None]:
    """The reverse of `ranges`: ``3-5,8`` -> first and last number of each part. Last is None for an open end, ``30-``.

    Returns them and None, or nothing and the first part that is no range. An empty text names none.
    """
    found: list[tuple[int, int | None]] = []
    for part in text.split(",") if text.strip() else ():
        match = re.fullmatch(r"\s*(\d{1,9})\s*(-\s*(\d{1,9})?\s*)?", part, re.ASCII)
        last = match and (int(match[3]) if match[3] else None if match[2] else int(match[1]))
        if not match or last is not None and last < int(match[1]):
            return [], part
        found.append((int(match[1]), last))
    return found, None
