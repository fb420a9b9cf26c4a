"""JSON of this server, in and out. In: strict, since what comes is hostile until checked. Out: UTF-8 without spaces."""

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import Response

DEPTH = 100
"""Levels of lists and objects. Templates and schema compilers walk what they are given by recursion."""


class JsonResponse(Response):
    """A response of plain JSON types."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(dumps(content), status_code, headers)


def dumps(value: Any) -> bytes:
    """`value`, of plain JSON types, as UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def loads(body: bytes) -> Any:
    """The value of a body. Raises ValueError, with a sentence, for what is not JSON in UTF-8, numbers that are not
    finite, halves of surrogate pairs, which no text can hold, and nesting without end."""
    try:
        value = json.loads(body.decode(), parse_constant=_not_a_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of the body is not UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the body is not JSON: {error.msg} at character {error.pos}.") from error
    except RecursionError as error:
        raise ValueError(f"the body is nested deeper than {DEPTH} levels.") from error
    _check(value)
    return value


def _not_a_number(name: str) -> None:
    raise ValueError(f"the body has {name}, which is no JSON number.")


def _check(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        below: list[Any] = []
        for each in level:
            kind = type(each)
            if kind is str:
                _check_text(each)
            elif kind is list:
                below += each
            elif kind is dict:
                below += each
                below += each.values()
            elif kind is float and not math.isfinite(each):
                raise ValueError("the body has a number that is too large.")
        if not below:
            return
        level = below
    raise ValueError(f"the body is nested deeper than {DEPTH} levels.")


def _check_text(text: str) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the body has half of a surrogate pair, which is no character.") from error
