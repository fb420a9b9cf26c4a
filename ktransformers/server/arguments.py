"""What tools take, and an argument that a model wrote without JSON's quotes as the JSON that its schema wants."""

import ast
import json
from collections.abc import Sequence
from typing import Any

_KINDS = {"object": dict, "array": list, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def functions(tools: Sequence[dict] | None) -> dict[str, dict]:
    """Name -> JSON schema of the arguments, of tools as OpenAI's API has them."""
    found = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        found[function["name"]] = function.get("parameters") or {"type": "object", "properties": {}}
    return found


def resolve(schema: Any, root: dict) -> dict:
    """The schema that a chain of local `$ref`s ends at; an empty one for what is none."""
    seen = set()
    while isinstance(schema, dict) and isinstance(path := schema.get("$ref"), str) and path not in seen:
        seen.add(path)
        schema = root
        for part in path.removeprefix("#").strip("/").split("/"):
            schema = schema.get(part) if isinstance(schema, dict) else None
    return schema if isinstance(schema, dict) and "$ref" not in schema else {}


def kinds(schema: Any, root: dict, depth: int = 8) -> set[str]:
    """The types that a schema allows; empty where it does not say."""
    schema = resolve(schema, root)
    kind = schema.get("type")
    found = {kind} if isinstance(kind, str) else {one for one in kind or () if isinstance(one, str)}
    if schema.get("nullable"):
        found.add("null")
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if not found and values and all(isinstance(value, str) for value in values):
        found.add("string")
    for choice in (*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())) if depth else ():
        found |= kinds(choice, root, depth - 1)
    return found


def parameter(parameters: dict, key: str) -> dict:
    """The schema of one argument; empty where there is none."""
    properties = resolve(parameters, parameters).get("properties")
    return resolve(properties.get(key), parameters) if isinstance(properties, dict) else {}


def cast(text: str, allowed: set[str]) -> str:
    """`text` as JSON of one of the allowed types, else as a string. None are given: what it looks like."""
    if allowed == {"string"}:
        return _dump(text)
    for value in _readings(text.strip()):
        if not isinstance(value, str) and _is(value, allowed):
            whole = isinstance(value, float) and "number" not in allowed and "integer" in allowed
            return _dump(int(value) if whole else value)
    return _dump(text)


def _readings(text: str) -> list[Any]:
    """What the text stands for, as JSON or as Python would write it: one value or none."""
    try:
        value = _WORDS[text.lower()] if text.lower() in _WORDS else json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        if text[:1] not in ("{", "["):
            return []
        try:
            value = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return []
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return []
    return [value]


def _refuse(name: str) -> None:
    raise ValueError(name)


def _is(value: Any, allowed: set[str]) -> bool:
    if not allowed:
        return True
    if isinstance(value, bool):
        return "boolean" in allowed
    if isinstance(value, float) and value.is_integer() and "integer" in allowed:
        return True
    return any(isinstance(value, kind) for name, kind in _KINDS.items() if name in allowed and name != "boolean")


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON's escapes can write and UTF-8 cannot
        return json.dumps(value)
    return text


def quoted(text: str) -> str:
    """The inside of a JSON string."""
    return _dump(text)[1:-1]
