"""What an answer is held to: the fields that ask for it, by any of the names that clients use, and its constraint."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ktransformers.errors import KTransformersError
from ktransformers.server import answers
from ktransformers.server.errors import ApiError, refused
from ktransformers.server.schemas import Form
from ktransformers.server.service import Served

_STRUCTURED = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "choice"}
"""Keys of `structured_outputs`, and the `guided_*` fields -> what they are here."""


def form_of(body: Form) -> dict[str, Any]:
    """The one thing that is asked for, as an argument of answers.constraint; nothing where the answer is free."""
    asked: list[tuple[str, str, Any]] = []  # (what a client calls it, what it is here, value)
    for name in ("response_format", "json_schema", "regex", "grammar"):
        asked.append((name, name, getattr(body, name)))
    for key, name in _STRUCTURED.items():
        asked.append((f"guided_{key}", name, getattr(body, f"guided_{key}")))
    for key, value in (body.structured_outputs or {}).items():
        if key not in _STRUCTURED and value:
            raise refused(f"structured_outputs.{key[:50]}", f"is not supported, expected {', '.join(_STRUCTURED)}.")
        asked.append((f"structured_outputs.{key}", _STRUCTURED.get(key, ""), value))
    asked = [one for one in asked if one[2] is not None and one[2] != {"type": "text"} and one[1]]
    if len(asked) > 1:
        names = " and ".join(name for name, _, _ in asked)
        raise ApiError(400, f"{names}: an answer can follow one of them. Leave the others out.", param=asked[0][0])
    return dict(_argument(*one) for one in asked)


def _argument(said: str, name: str, value: Any) -> tuple[str, Any]:
    if name != "choice":
        return name, value
    if not (isinstance(value, list) and value and all(isinstance(one, str) and one for one in value)):
        raise ApiError(400, f"{said}: expected a list of strings.", param=said)
    return "grammar", "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in value)


def constraint_of(
    served: Served, form: Mapping[str, Any], prompt_text: str, tools: Sequence[dict[str, Any]] | None = None,
    tool_choice: Any = None, parallel: bool = True,
) -> Any:  # fmt: skip
    """What makes the constraint of an answer to a prompt, None where it is free. Raises ApiError for what cannot be
    followed. The model's own stop tokens may end it; a request's would cost a vocabulary of their own."""
    stop = served.generation_config.eos_token_id
    stop = [] if stop is None else [stop] if isinstance(stop, int) else stop
    try:
        return answers.constraint(
            served.tokenizer, served.vocab_size, tools=tools, tool_choice=tool_choice, prompt_text=prompt_text,
            parallel=parallel, stop=stop, **form,
        )  # fmt: skip
    except KTransformersError as error:
        raise ApiError(400, str(error), param=next(iter(form), None) or "tool_choice") from error
