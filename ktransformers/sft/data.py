"""Datasets in the two forms that training files name, as conversations: alpaca and sharegpt, of answers or of pairs.

alpaca    {"instruction", "input", "output", "system", "history": [[question, answer], ...]}
sharegpt  {"conversations": [{"from": "human", "value": ...}, ...], "system", "tools"}, or messages
pairs     the same with "chosen" and "rejected" in place of the answer

A name is looked up in dataset_info.json of the dataset folder, whose entries say how columns are called; a path is read
as it is and its form told from its columns. Files are JSON or JSON lines. Nothing is fetched from elsewhere.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktransformers.errors import SFTError, did_you_mean

Message = dict[str, str]
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "observation": "tool", "tool": "tool", "function_call": "assistant", "function": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an answer; of a pair, `rejected` is the other answer."""

    messages: list[Message]
    rejected: str | None = None
    tools: Any = None


def read_examples(names: str, folder: str, limit: int = 0, system: str = "", pairs: bool = False) -> list[Example]:
    """The examples of datasets `names`, commas between; of each at most `limit`. Raises SFTError."""
    return [example for name in names.split(",") if name.strip()
            for example in _of(name.strip(), Path(folder), limit, system, pairs)]  # fmt: skip


def _of(name: str, folder: Path, limit: int, system: str, pairs: bool) -> Iterator[Example]:
    path, entry = _find(name, folder)
    rows, count = _rows(path), 0
    for number, row in enumerate(rows):
        if limit and count >= limit:
            break
        try:
            example = _example(row, entry, system)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise SFTError(f"{path}, example {number + 1}: {found}. {_EXPECTED}") from error
        if pairs != (example.rejected is not None):
            found = "no rejected answer, expected chosen and rejected" if pairs else "a pair of answers, expected one"
            raise SFTError(f"{path}, example {number + 1}: found {found}; or say stage: {'sft' if pairs else 'dpo'}.")
        count += 1
        yield example
    if not count:
        raise SFTError(f"{path}: holds no examples.")


_EXPECTED = (
    "Expected alpaca's columns (instruction, input, output) or sharegpt's (conversations of from and value, or "
    "messages of role and content); name others under columns in dataset_info.json."
)


def _find(name: str, folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The file of a dataset and its entry in dataset_info.json, {} for a path."""
    for path in (Path(name), folder / name):
        if path.suffix in (".json", ".jsonl") and path.exists():
            return path, {}
    table = folder / "dataset_info.json"
    if not table.exists():
        step = "Set dataset_dir, or name a file"
        raise SFTError(f"dataset {name}: no such file, and {folder} has no dataset_info.json. {step}.")
    known = _json(table)
    if not isinstance(known, dict) or name not in known:
        names = list(known) if isinstance(known, dict) else []
        has = ", ".join(names[:12]) or "none"
        raise SFTError(f"dataset {name}: not in {table}{did_you_mean(name, names)}; it has {has}.")
    entry = known[name]
    if "file_name" not in entry:
        found = ", ".join(entry) or "nothing"
        step = "nothing is fetched; download it first"
        raise SFTError(f"dataset {name}: {table} says {found}, expected file_name; {step}.")
    path = folder / entry["file_name"]
    if not path.is_file():
        raise SFTError(f"dataset {name}: {path}: no such file, which {table} names.")
    return path, entry


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SFTError(f"{path}: is no JSON: {error}.") from error


def _rows(path: Path) -> list[Any]:
    """All rows of a file of JSON, or of JSON lines whatever its name says."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SFTError(f"{path}: cannot be read: {error}.") from error
    if text.lstrip().startswith("["):
        return _json(path)
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise SFTError(f"{path}, line {number}: is no JSON: {error}.") from error
    return rows


def _example(row: Mapping[str, Any], entry: Mapping[str, Any], system: str) -> Example:
    columns = entry.get("columns", {})
    shape = entry.get("formatting") or ("sharegpt" if "conversations" in row or "messages" in row else "alpaca")
    if shape not in _SHAPES:
        raise ValueError(f"formatting {shape!r}; known: {', '.join(_SHAPES)}")
    messages, answers = _SHAPES[shape](row, columns, entry.get("tags", {}))
    said = row.get(columns.get("system", "system")) or system
    if said and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": said})
    tools = row.get(columns.get("tools", "tools"))
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    if answers is None:
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"the last message is {messages[-1]['role']}'s, expected an answer")
        return Example(messages, tools=tools)
    return Example([*messages, {"role": "assistant", "content": answers[0]}], answers[1], tools)


Made = tuple[list[Message], tuple[str, str] | None]


def _alpaca(row: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> Made:
    question = row[columns.get("prompt", "instruction")]
    more = row.get(columns.get("query", "input"))
    question = f"{question}\n{more}" if more else question
    messages = []
    for asked, answered in row.get(columns.get("history", "history")) or ():
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": _text(question)})
    chosen, rejected = row.get(columns.get("chosen", "chosen")), row.get(columns.get("rejected", "rejected"))
    if chosen is not None:
        return messages, (_text(chosen), _text(rejected))
    answer = row[columns.get("response", "output")]
    if isinstance(answer, list):  # the older way to write a pair
        return messages, (_text(answer[0]), _text(answer[1]))
    return [*messages, {"role": "assistant", "content": _text(answer)}], None


def _sharegpt(row: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> Made:
    key = columns.get("messages", "messages" if "messages" in row else "conversations")
    turns = row[key]
    plain = bool(turns) and "role" in turns[0]
    role = tags.get("role_tag", "role" if plain else "from")
    content = tags.get("content_tag", "content" if plain else "value")
    named = {tags[f"{who}_tag"]: who for who in ("user", "assistant", "system", "observation", "function")
             if f"{who}_tag" in tags}  # fmt: skip
    messages = [{"role": ROLES[named.get(turn[role], turn[role])], "content": _text(turn[content])} for turn in turns]
    chosen, rejected = row.get(columns.get("chosen", "chosen")), row.get(columns.get("rejected", "rejected"))
    if chosen is None:
        return messages, None
    return messages, (_said(chosen, content), _said(rejected, content))


_SHAPES = {"alpaca": _alpaca, "sharegpt": _sharegpt}


def _said(turn: Any, content: str) -> str:
    """The text of an answer: itself, a turn, or the last of several."""
    turn = turn[-1] if isinstance(turn, list) else turn
    return _text(turn.get(content, turn.get("content")) if isinstance(turn, dict) else turn)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"found {type(value).__name__} {value!r:.60}, expected text")
    return value
