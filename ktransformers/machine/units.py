"""Sizes and rates as people write them: `24GiB`, `3350GB/s`. Numbers and text only, nothing about machines."""

import math
import re

from ktransformers.errors import KTransformersError

DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15}
BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50}
UNITS = {**DECIMAL, **BINARY}
"""Unit in lower case -> bytes."""

GIB = BINARY["gib"]
_SIZE = re.compile(r"(-?\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_RATE = re.compile(r"(.+?)\s*/\s*s(?:ec)?", re.IGNORECASE)


def parse_bytes(text: str, subject: str = "size") -> int:
    """Bytes of `24GiB`, `24 GB` or `24576MiB`; `subject` begins the message.

    Raises KTransformersError for a number without a unit, an unknown unit, and what is not above zero.
    """
    found = _SIZE.fullmatch(str(text).strip())
    if not found:
        raise KTransformersError(f"{subject} {text!r}: expected a number with a unit, such as 24GiB or 24576MiB.")
    number, unit = found[1], found[2]
    if float(number) <= 0:
        raise KTransformersError(f"{subject} {text!r}: expected a size above zero, such as 24GiB.")
    if unit.lower() not in UNITS:
        problem = f"unit {unit!r} is not known" if unit else "has no unit"
        raise KTransformersError(
            f"{subject} {text!r}: {problem}; was {_meant(number, unit)} meant? "
            "Expected MiB, GiB, TiB (powers of 1024), or MB, GB, TB (powers of 1000)."
        )
    return max(1, round(float(number) * UNITS[unit.lower()]))


def _meant(number: str, unit: str) -> str:
    letter = unit[:1].upper()
    letter = letter if letter and letter in "KMGTP" else "G"
    return f"{number}{letter}iB"


def parse_rate(text: str, subject: str = "bandwidth") -> float:
    """Bytes per second of `200GB/s` or `3.35TB/s`. Raises KTransformersError as `parse_bytes` does."""
    found = _RATE.fullmatch(str(text).strip())
    if not found:
        raise KTransformersError(f"{subject} {text!r}: expected bytes per second, such as 200GB/s.")
    return float(parse_bytes(found[1], subject))


def format_bytes(size: float) -> str:
    """`size` in the largest binary unit of which it has at least one, with three digits that matter: 1.25 GiB."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_rate(rate: float, unit: str = "B/s") -> str:
    """`rate` per second in decimal units: 46.9 GB/s, or with unit "OP/s" 834 GOP/s."""
    return _scaled(rate, 1000, tuple(f"{prefix}{unit}" for prefix in ("", "k", "M", "G", "T", "P")))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return f"{value} {units[0]}"
    step = 0
    while round(abs(value), 1 if step else 0) >= base and step + 1 < len(units):
        value, step = value / base, step + 1
    if not step:
        return f"{value:.0f} {units[0]}"
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    number = f"{value:.{digits}f}"
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {units[step]}"
