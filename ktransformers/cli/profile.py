"""`kt profile`: run prompts, count which experts they choose, write the counts for the planner.

Counting is planner/profile.py's, loading and generating the engine's; here is what people give and see.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktransformers.cli.common import (
    DevicesOption,
    ForceOption,
    JsonOption,
    RuleOption,
    WeightsOption,
    err,
    new_file,
    note,
    renamed_devices,
    show,
)
from ktransformers.configs import text_config
from ktransformers.errors import KTransformersError
from ktransformers.paths import existing_path

if TYPE_CHECKING:
    from ktransformers.planner.profile import RoutingProfile

GROUPS = 8
"""Most rows of the table: layers are grouped so that a deep model fits a screen."""


@dataclass
class LayerGroup:
    """A row of the table. `top_share`: the share of the hits that falls on the most used tenth of the experts."""

    layers: str
    hits: int
    top_share: float
    never_chosen: int
    experts: int


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a .gguf, with weights.")],
    prompts: Annotated[
        Path, typer.Option(help='One prompt per line, or JSON lines with "prompt"; like those you will ask.')
    ],
    weights: WeightsOption = "",
    rule: RuleOption = "",
    devices: DevicesOption = [],  # noqa: B006  (typer wants a list)
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum new tokens per prompt.")] = 32,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the profile there.")] = Path("profile.json"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Count which experts a model chooses for your prompts, so that kt plan can put the most used on the GPU."""
    texts = read_prompts(prompts)
    new_file(str(output), "-o", force)

    from ktransformers.engine.load import load
    from ktransformers.planner.profile import record

    loaded, tokenizer = load(
        model, weights, rule,
        devices=renamed_devices(devices), needs_template=False, progress=not as_json, notify=note,
    )  # fmt: skip
    with record(loaded) as found:
        _run(loaded, tokenizer, texts, max_new_tokens, prompts)
    found.write(output)
    groups = summary(found)
    data = {
        "profile": output, "model_type": found.model_type, "prompts": len(texts), "tokens": found.tokens,
        "hits": found.hits, "top_share": found.top_share(), "groups": groups,
    }  # fmt: skip
    show(data, as_json, lambda: _rendered(found, groups, len(texts), output))


# ---- prompts -----------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """The prompts of a file with the numbers of their lines. Raises KTransformersError for none and for bad JSON.

    A file that ends in .jsonl holds JSON throughout; in any other a line that is a JSON object with "prompt" is one,
    and every other line is a prompt as it is.
    """
    there = existing_path(path, "--prompts") or path
    try:
        lines = there.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path once more
        raise KTransformersError(f"--prompts {path}: cannot be read: {reason}. Check the path.") from error
    found = [(n, _prompt(line, path, n)) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise KTransformersError(f"--prompts {path}: is empty, expected one prompt per line.")
    return found


def _prompt(line: str, path: Path, number: int) -> str:
    try:
        entry = json.loads(line) if line.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        entry = None
    if isinstance(entry, dict) and "prompt" in entry:
        text = entry["prompt"]
    elif path.suffix == ".jsonl":
        text = None
    else:
        text = line
    if not isinstance(text, str) or not text.strip():
        raise KTransformersError(
            f'--prompts {path}:{number}: found {line[:60]!r}, expected a JSON object with a text as "prompt".'
        )
    return text


# ---- running -----------------------------------------------------------------------------------------------


def _run(model: Any, tokenizer: Any, texts: list[tuple[int, str]], max_new_tokens: int, path: Path) -> None:
    """Answer every prompt greedily, each in a conversation of its own."""
    from ktransformers.engine.generate import generate
    from ktransformers.engine.sampling import Sampling

    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    sampling = Sampling(stop_ids=Sampling(model.generation_config, stops).stop_ids)
    context = getattr(text_config(model.config), "max_position_embeddings", None) or 1 << 62
    for number, text in _progress(texts):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(ids) >= context:
            raise KTransformersError(
                f"--prompts {path}:{number}: {len(ids)} tokens, but the model takes {context}. Shorten the prompt."
            )
        for _ in generate(model, ids, max_new_tokens=min(max_new_tokens, context - len(ids)), sampling=sampling):
            pass  # choosing is all that is asked for; nobody reads the answer


def _progress(texts: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    from rich.progress import track

    return iter(track(texts, "prompts", console=err, transient=True, disable=not err.is_terminal))


# ---- what people see ---------------------------------------------------------------------------------------


def summary(found: "RoutingProfile") -> list[LayerGroup]:
    """The profile by groups of layers that follow one another."""
    from ktransformers.errors import ranges

    layers = sorted(found.layers)
    size = max(1, -(-len(layers) // GROUPS))
    groups = []
    for start in range(0, len(layers), size):
        part = layers[start : start + size]
        counts = [n for layer in part for n in found.layers[layer]]
        groups.append(LayerGroup(ranges(part), sum(counts), found.top_share(layers=part), counts.count(0), len(counts)))
    return groups


def _rendered(found: "RoutingProfile", groups: list[LayerGroup], prompts: int, output: Path) -> Iterator[Any]:
    from rich.table import Table
    from rich.text import Text

    title = f"Routing of {found.model_type}: prompts {prompts}, tokens {found.tokens:,}"
    table = Table(title=title, title_justify="left")
    table.add_column("layers")
    for column in ("hits", "share of the top 10% of experts", "never chosen"):
        table.add_column(column, justify="right")
    for group in groups:
        unused = f"{group.never_chosen} of {group.experts}"
        table.add_row(group.layers, f"{group.hits:,}", f"{group.top_share:.0%}", unused)
    yield table
    skew = found.top_share()
    yield f"The most used 10% of all experts take {skew:.0%} of the hits; uniform use would be 10%."
    yield Text(f"Written to {output}.")
