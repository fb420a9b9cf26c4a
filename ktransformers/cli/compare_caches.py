"""`kt cache compare`: what keeping keys and values in fewer bits does to a model's predictions. The engine measures."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktransformers.cli.common import (
    DevicesOption,
    JsonOption,
    RuleOption,
    WeightsOption,
    check_cache,
    note,
    renamed_devices,
    show,
    token_bar,
)
from ktransformers.errors import KTransformersError
from ktransformers.paths import existing_path

if TYPE_CHECKING:
    from ktransformers.engine.compare_caches import CacheEffect

TOKENS = 512
"""Tokens that are compared where no flag says how many."""


def compare(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder or a .gguf; default: the small embedded model.")
    ] = "",
    types: Annotated[
        list[str],
        typer.Option("--type", "-t", metavar="TYPE", help="f32, f16, bf16, q8_0, of latents on a GPU fp8; repeatable."),
    ] = ["q8_0"],  # noqa: B006  (typer wants a list)
    text: Annotated[
        Path | None, typer.Option("--text", help="A text to predict; default: one that the model writes, seed 0.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help=f"Tokens of it; default: {TOKENS}, or what there is.")
    ] = None,
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Tokens per forward pass.")] = 64,
    weights: WeightsOption = "",
    rule: RuleOption = "",
    devices: DevicesOption = [],  # noqa: B006  (typer wants a list)
    as_json: JsonOption = False,
) -> None:
    """Compare types of the KV cache: memory, and how far a model's predictions move from those with its own dtype."""
    for kind in types:
        check_cache("--type", kind)
    words = None if text is None else _read(text)

    from ktransformers.engine import compare_caches
    from ktransformers.engine.load import load

    loaded, tokenizer = load(
        model, weights, rule,
        devices=renamed_devices(devices), needs_template=False, progress=not as_json, notify=note,
    )  # fmt: skip
    ids = _ids(loaded, tokenizer, words, tokens)
    with token_bar(len(ids) * (len(set(types)) + 1)) as advance:
        found = compare_caches.compare(loaded, ids, types, chunk_size, advance)
    data = {"tokens": len(ids), "chunk_size": chunk_size, "text": None if text is None else str(text), "types": found}
    show(data, as_json, lambda: _rendered(found, len(ids)))


def _read(path: Path) -> str:
    there = existing_path(path, "--text") or path
    try:
        return there.read_text(encoding="utf-8")
    except OSError as error:
        raise KTransformersError(f"--text {path}: cannot be read: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise KTransformersError(f"--text {path}: byte {error.start} is not UTF-8. Give a text file.") from error


def _ids(model: Any, tokenizer: Any, words: str | None, tokens: int | None) -> list[int]:
    """The tokens to predict. Raises KTransformersError where there are fewer than asked for."""
    from ktransformers.configs import text_config
    from ktransformers.engine.compare_caches import own_text

    context = getattr(text_config(model.config), "max_position_embeddings", None) or TOKENS
    if (tokens or 0) > context:
        raise KTransformersError(f"--tokens {tokens}: the model takes {context}. Give a smaller number.")
    count = tokens or min(TOKENS, context)
    if words is None:
        starts = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        return own_text(model, next(token for token in starts if token is not None), count)
    ids = tokenizer.encode(words)
    needed = tokens or 2
    if len(ids) < needed:
        raise KTransformersError(f"--text: found {len(ids)} tokens, expected at least {needed}. Give a longer text.")
    return ids[:count]


def _rendered(found: list["CacheEffect"], tokens: int) -> Iterator[Any]:
    from rich.table import Table

    table = Table(title=f"Cache types, {tokens} tokens", title_justify="left")
    table.add_column("type")
    for column in ("bytes per token", "mean KL, nats", "max KL, nats", "same top token", "perplexity"):
        table.add_column(column, justify="right")
    own = found[0]
    for one in found:
        size = f"{one.bytes_per_token:,} ({one.bytes_per_token / own.bytes_per_token:.0%})"
        moved = ("-", "-", "-") if one is own else (f"{one.kl_mean:.2g}", f"{one.kl_max:.2g}", f"{one.same_top:.1%}")
        table.add_row(one.type, size, *moved, f"{one.perplexity:.4f}")
    yield table
    yield f"KL: how far the next token's probabilities move from those with the model's own dtype, {own.type}."
