"""`kt chat`: the chat program with short flags."""

from pathlib import Path
from typing import Annotated

import typer

from ktransformers.cli import published_flags
from ktransformers.cli.common import AdapterOption, CacheOption, DevicesOption, complete_rule
from ktransformers.errors import KTransformersError

Command = published_flags.command_class(
    {"model": "", "weights": "--weights", "rule": "--rule", "threads": "--threads", "devices": "--devices",
     "force_think": "--force-think"}
)  # fmt: skip
"""Takes the flags of published command lines too."""


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
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", "--max_new_tokens", min=1,
            help="Maximum new tokens in an answer; default: the model's generation_config, else 1000.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores this process may use.")] = 0,
    chunk_size: Annotated[
        int, typer.Option("--chunk-size", "--chunk_size", min=1, help="Prompt tokens per forward pass.")
    ] = 8192,
    cache: CacheOption = "",
    adapter: AdapterOption = "",
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", "--prompt_file", help="Answer the text of this file, then exit.")
    ] = None,
    devices: DevicesOption = [],  # noqa: B006  (typer wants a list)
    greedy: Annotated[bool, typer.Option("--greedy", help="Greedy decoding.")] = False,
    force_think: Annotated[
        bool, typer.Option("--force-think", help="Begin answers with <think>, for reasoning models.")
    ] = False,
    server: Annotated[
        str, typer.Option("--server", metavar="URL", help="Talk to a running kt serve, or any server of OpenAI's API.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer and nothing else.")] = False,
) -> None:
    """Chat with a model, or answer the lines of standard input."""
    prompt = "" if prompt_file is None else str(prompt_file)
    if server:
        from ktransformers.cli import remote

        if model or weights or rule or devices or adapter:
            raise KTransformersError(
                "--server: it has its model. Leave MODEL, --weights, --rule, --devices and --adapter out."
            )
        return remote.talk(server, prompt, max_new_tokens, greedy, as_json)

    from ktransformers.cli.conversation import Options, talk

    talk(
        Options(
            model_path=model, weights=weights, rule=rule, devices=tuple(devices), threads=threads,
            prompt_file=prompt, max_new_tokens=max_new_tokens, adapter=adapter,
            chunk_size=chunk_size, cache=cache, greedy=greedy, force_think=force_think, as_json=as_json,
        )
    )  # fmt: skip
