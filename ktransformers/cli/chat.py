"""`kt chat`: the chat program with short flags. local_chat loads, talks and says what went wrong."""

from pathlib import Path
from typing import Annotated

import typer

from ktransformers.cli.common import complete_rule


def chat(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face model folder or a .gguf; default: the small embedded model.", metavar="MODEL"
        ),
    ] = "",
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="A .gguf, a .safetensors or a folder; default: MODEL's own.")
    ] = "",
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            "-r",
            help="Rule file, or a packaged one's name; default: by family.",
            autocompletion=complete_rule,
        ),
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in an answer.")] = 1000,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores this process may use.")] = 0,
    chunk_size: Annotated[int, typer.Option(min=1, help="Prompt tokens per forward pass.")] = 8192,
    prompt_file: Annotated[Path | None, typer.Option(help="Answer the text of this file, then leave.")] = None,
    devices: Annotated[
        list[str],
        typer.Option(metavar="NAME=NAME", help="Rename devices of the rules, such as cuda=cpu; may be repeated."),
    ] = [],  # noqa: B006  (typer wants a list)
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer and nothing else.")] = False,
) -> None:
    """Chat with a model, or answer the lines of standard input."""
    from ktransformers import local_chat

    local_chat.main(
        model_path=model,
        gguf_path=weights,
        optimize_config_path=rule,
        max_new_tokens=max_new_tokens,
        cpu_infer=threads,
        chunk_size=chunk_size,
        prompt_file="" if prompt_file is None else str(prompt_file),
        device=devices,
        greedy=greedy,
        as_json=as_json,
    )
