"""`python -m ktransformers.local_chat`: `kt chat` under upstream's flags."""

from typing import Annotated, Any

import typer

from ktransformers.cli import published_flags
from ktransformers.cli.common import CacheOption, DevicesOption, OneCommand, before_torch


def _option(name: str, help: str, **more: Any) -> Any:
    """An option that is spelled with underscores, as upstream's, or with dashes."""
    return typer.Option(f"--{name}", f"--{name.replace('_', '-')}", help=help, **more)


Command = published_flags.command_class(
    {"model": "--model_path", "weights": "--gguf_path", "rule": "--optimize_config_path", "threads": "--cpu_infer",
     "devices": "--devices", "force_think": "--force-think"},
    OneCommand,
)  # fmt: skip

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def main(
    model_path: Annotated[
        str,
        _option(
            "model_path", "Folder with config and tokenizer; default: what the .gguf says, else the embedded model."
        ),
    ] = "",
    gguf_path: Annotated[
        str,
        _option("gguf_path", "Weights: a .gguf (first of a split set), a .safetensors, or a folder; "
                "default: model_path."),
    ] = "",
    optimize_config_path: Annotated[
        str, _option("optimize_config_path", "Rule file, or the name of a packaged one; default: by model family.")
    ] = "",
    max_new_tokens: Annotated[
        int | None,
        _option("max_new_tokens", "Maximum new tokens in an answer; default: the model's generation_config, "
                "else 1000.", min=1),
    ] = None,
    cpu_infer: Annotated[int, _option("cpu_infer", "CPU threads; 0: all cores this process may use.")] = 0,
    chunk_size: Annotated[int, _option("chunk_size", "Prompt tokens per forward pass.", min=1)] = 8192,
    cache: CacheOption = "",
    prompt_file: Annotated[str, _option("prompt_file", "Answer the text of this file, then exit.")] = "",
    devices: DevicesOption = [],  # noqa: B006  (typer wants a list)
    greedy: Annotated[bool, typer.Option("--greedy", help="Greedy decoding.")] = False,
    force_think: Annotated[
        bool, typer.Option("--force-think", help="Begin answers with <think>, for reasoning models.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer and nothing else.")] = False,
) -> None:
    """Chat with a model whose modules a rule file places and replaces."""
    from ktransformers.cli.conversation import Options, talk

    before_torch()
    talk(
        Options(
            model_path=model_path, weights=gguf_path, rule=optimize_config_path, devices=tuple(devices),
            threads=cpu_infer, prompt_file=prompt_file, max_new_tokens=max_new_tokens, chunk_size=chunk_size,
            cache=cache, greedy=greedy, force_think=force_think, as_json=as_json,
        )
    )  # fmt: skip


if __name__ == "__main__":
    app(prog_name="python -m ktransformers.local_chat")
