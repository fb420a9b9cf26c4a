"""Chat with a model in a terminal, or answer the lines of standard input: `python -m ktransformers.local_chat --help`.

The flags are upstream's. This file talks to people; `generate.py` computes and `optimize.py` loads.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ktransformers.cli.common import fail, interrupted
from ktransformers.errors import KTransformersError

EXIT_WORDS = ("exit", "quit", "/exit", "/quit")
FENCE = '"""'
HELP = (
    f"Ctrl-C stops an answer, {FENCE} starts and ends a message of several lines, /new forgets, exit or Ctrl-D leaves."
)

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)


def main(
    model_path: Annotated[
        str,
        typer.Option(
            "--model_path",
            "--model-path",
            help="Folder with config and tokenizer; default: what the .gguf says, without one the embedded model.",
        ),
    ] = "",
    gguf_path: Annotated[
        str,
        typer.Option(
            "--gguf_path",
            "--gguf-path",
            help="Weights: a .gguf (first of a split set), a .safetensors, or a folder; default: model_path.",
        ),
    ] = "",
    optimize_config_path: Annotated[
        str,
        typer.Option(
            "--optimize_config_path",
            "--optimize-config-path",
            help="Rule file, or the name of a packaged one; default: by model family.",
        ),
    ] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", "--max-new-tokens", min=1, help="Most tokens in an answer.")
    ] = 1000,
    cpu_infer: Annotated[
        int, typer.Option("--cpu_infer", "--cpu-infer", help="CPU threads; 0 means all cores this process may use.")
    ] = 0,
    chunk_size: Annotated[
        int, typer.Option("--chunk_size", "--chunk-size", min=1, help="Prompt tokens per forward pass.")
    ] = 8192,
    prompt_file: Annotated[
        str, typer.Option("--prompt_file", "--prompt-file", help="Answer the text of this file, then leave.")
    ] = "",
    device: Annotated[
        list[str], typer.Option("--devices", help="Rename devices of the rules, such as cuda=cpu; may be repeated.")
    ] = [],  # noqa: B006  (typer wants a list)
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the likeliest token, whatever generation_config says.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer and nothing else.")] = False,
) -> None:
    """Chat with a model whose modules a rule file places and replaces."""
    # Before torch loads its OpenMP: waiting threads that spin hold the cores that the C library's threads need. On two
    # cores with one of them busy elsewhere, decoding was 17 times slower with spinning than with sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _set_threads(cpu_infer)
        prompt = _read_prompt_file(prompt_file)
        model, tokenizer = load(model_path, gguf_path, optimize_config_path, dict(pair(d) for d in device), as_json)
        chat = Chat(model, tokenizer, max_new_tokens, chunk_size, greedy, as_json)
    except KTransformersError as error:
        raise typer.Exit(fail(error, as_json)) from None
    except KeyboardInterrupt:
        raise typer.Exit(interrupted(as_json)) from None
    try:
        code = chat.run([prompt] if prompt_file else _messages(as_json))
    except OSError as error:  # whoever reads the answers went away, or the disk they go to is full
        err.print(f"[red]error:[/red] standard output cannot be written: {escape(str(error))}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit cannot fail again
        code = 1
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Start
# ---------------------------------------------------------------------------------------------------------------------


def _set_threads(count: int) -> None:
    """Give the C library and torch `count` threads; more than the cores would make both crawl."""
    import torch

    from ktransformers import native

    if count == 0:
        return
    cores = native.default_threads()
    if not 1 <= count <= cores:
        raise KTransformersError(
            f"{count} CPU threads: expected 1 to {cores}, the cores this process may use (more threads than cores "
            "wait for one another). Leave the flag out to use all."
        )
    native.set_threads(count)
    torch.set_num_threads(count)


def _read_prompt_file(path: str) -> str:
    if not path:
        return ""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KTransformersError(f"prompt file {path}: cannot be read: {error}") from error
    if not text.strip():
        raise KTransformersError(f"prompt file {path}: is empty, expected the text of a message.")
    return text


def pair(text: str) -> tuple[str, str]:
    name, sign, target = text.partition("=")
    if not (name and sign and target):
        raise KTransformersError(f"--devices {text!r}: expected NAME=NAME, such as cuda=cpu.")
    return name, target


def load(
    model_path: str, weights: str, rule: str, devices: dict[str, str], quiet: bool, talks: bool = True
) -> tuple[Any, Any]:
    """Build the model on the meta device, replace and load; returns (model, tokenizer).

    `talks`: insist on a chat template. Raises KTransformersError.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ktransformers.models import DEFAULT_RULES, embedded_model
    from ktransformers.optimize import optimize_and_load

    logging.set_verbosity_error()
    if not model_path and not weights:
        model_path, weights = str(embedded_model()), str(next(embedded_model().glob("*.gguf"), ""))
    model_path, weights = model_path or weights, weights or model_path
    config, tokenizer = _read_config(model_path, talks)
    if not rule:
        rule = DEFAULT_RULES.get(config.model_type, "Default")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise KTransformersError(f"{model_path}: transformers has no causal LM for this config: {error}") from error
    with warnings.catch_warnings():
        if not sys.warnoptions:  # a person wants the sentence, not where in our source it was said
            warnings.showwarning = lambda message, *_, **__: err.print(f"[yellow]note:[/yellow] {escape(str(message))}")
        return optimize_and_load(model, rule, weights, devices=devices, progress=not quiet), tokenizer


def _read_config(model_path: str, talks: bool = True) -> tuple[Any, Any]:
    """Config and tokenizer of a model folder, or of a GGUF file."""
    path = Path(model_path).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        from ktransformers import config_from_gguf, tokenizer_from_gguf

        config, tokenizer = config_from_gguf(path), tokenizer_from_gguf(path)
        step = "or give a folder with chat_template.jinja as the model and this file as its weights"
    else:
        config, tokenizer = _read_folder(model_path, path)
        step = "or add chat_template.jinja to the folder"
    if talks and not getattr(tokenizer, "chat_template", None):
        raise KTransformersError(
            f"{model_path}: the tokenizer has no chat template, so messages cannot be told apart. "
            f"Use an instruction-tuned model, {step}."
        )
    return config, tokenizer


def _read_folder(model_path: str, folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    if not folder.is_dir():
        raise KTransformersError(
            f"model {model_path}: no such folder; expected a Hugging Face model folder, or a .gguf file."
        )
    if not folder.joinpath("config.json").is_file():
        raise KTransformersError(f"{model_path}: has no config.json; expected a Hugging Face model folder.")
    try:
        # False, not left out: transformers would ask on the terminal whether to run the folder's code.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises its own kinds for damaged files, none with a common root
        if "trust_remote_code" in str(error):
            raise KTransformersError(
                f"{model_path}: transformers does not know this model or its tokenizer, and code from a model folder "
                "is not run. Use a release of transformers that has the model, or build config, model and tokenizer "
                "with trust_remote_code=True in a program of your own and call optimize_and_load."
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise KTransformersError(f"{model_path}: config or tokenizer cannot be read: {' '.join(lines[:2])}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Talk
# ---------------------------------------------------------------------------------------------------------------------


def _messages(quiet: bool) -> Iterator[str]:
    """Yield what the user says, from a terminal or line by line from a pipe."""
    if sys.stdin is None:  # closed
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a stray byte costs one character, not the program
    terminal = sys.stdin.isatty()
    if terminal and not quiet:
        import readline  # noqa: F401  (line editing and history for input())

        err.print(f"[dim]{HELP}[/dim]")
    while True:
        try:
            line = input("\n> " if terminal else "")
            if line.strip().startswith(FENCE):
                line = _read_fenced(line.strip().removeprefix(FENCE), terminal)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                return
            err.print("\n[dim]exit or Ctrl-D leaves[/dim]")
            continue
        if line.strip() in EXIT_WORDS:
            return
        if line.strip():
            yield line


def _read_fenced(first: str, terminal: bool) -> str:
    """Read lines up to the one that ends with the closing fence."""
    lines = [first] if first else []
    while not (lines and lines[-1].rstrip().endswith(FENCE)):
        try:
            lines.append(input("... " if terminal else ""))
        except EOFError:
            err.print(f"[yellow]note:[/yellow] the closing {FENCE} is missing; everything up to the end is the message")
            return "\n".join(lines).strip()
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines).strip()


class Chat:
    """One conversation: its messages, its KV cache, and how answers are shown."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, chunk_size: int, greedy: bool, as_json: bool):
        from ktransformers.engine.cache import PrefixCache
        from ktransformers.engine.generate import Sampling

        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.chunk_size, self.as_json = max_new_tokens, chunk_size, as_json
        stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        sampling = Sampling.from_config(model.generation_config, stop)
        self.sampling = Sampling(stop_ids=sampling.stop_ids) if greedy else sampling
        self.cache = PrefixCache()
        self.messages: list[dict[str, str]] = []

    def run(self, messages: Iterator[str] | list[str]) -> int:
        """Answer each message; returns the exit code."""
        code = 0
        for text in messages:
            if text.strip() == "/new":
                self.messages.clear()
                continue
            if text.strip() in ("/help", "/?"):
                err.print(f"[dim]{HELP}[/dim]")
                continue
            try:
                self.answer(text)
            except KTransformersError as error:
                err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
                code = 1
        return code

    def answer(self, text: str) -> str:
        """Stream the answer to `text`, then say how fast it came. Ctrl-C keeps what was said so far."""
        from ktransformers.engine.generate import Timing, generate

        self.messages.append({"role": "user", "content": text})
        timing, words = Timing(), _Words(self.tokenizer)
        stopped = False
        try:
            prompt = self._prompt()
            room = min(self.max_new_tokens, self._context() - len(prompt))
            tokens = generate(
                self.model, prompt, max_new_tokens=room, chunk_size=self.chunk_size,
                sampling=self.sampling, cache=self.cache, timing=timing,
            )  # fmt: skip
            for token in tokens:
                self._show(words.add(token))
            if len(words.ids) == room < self.max_new_tokens:
                err.print("\n[dim]the model's context is full[/dim]")
        except KeyboardInterrupt:
            stopped = True
        except KTransformersError:
            self.messages.pop()
            raise
        self._show(words.rest())
        self.messages.append({"role": "assistant", "content": words.text})
        self._finish(text, words.text, timing, stopped)
        return words.text

    def _prompt(self) -> list[int]:
        """Token ids of the conversation; the oldest turns are dropped when the model's context would overflow."""
        limit = self._context()
        room = max(1, min(self.max_new_tokens, limit // 4))
        ids = self._tokens(self.messages)
        if len(ids) + room > limit and (alone := len(self._tokens(self.messages[-1:]))) + room > limit:
            raise KTransformersError(
                f"message: has {alone} tokens; the model takes {limit} in all, {room} of them kept for the answer. "
                "Shorten it."
            )
        while len(ids) + room > limit:
            del self.messages[:2]
            ids = self._tokens(self.messages)
            err.print("[dim]the conversation outgrew the model's context; its oldest turn was dropped[/dim]")
        return ids

    def _context(self) -> int:
        """How many tokens prompt and answer may have together."""
        return getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise KTransformersError(
                f"the tokenizer's chat template refuses this conversation: {error}. Say /new to start over."
            ) from error

    def _show(self, piece: str) -> None:
        if piece and not self.as_json:
            out.print(piece, end="", markup=False)
            out.file.flush()

    def _finish(self, question: str, answer: str, timing: Any, stopped: bool) -> None:
        if self.as_json:
            print(
                json.dumps({"question": question, "answer": answer, "stopped": stopped, **asdict(timing)}), flush=True
            )
            return
        out.print()
        err.print(
            f"[dim]{'stopped · ' if stopped else ''}"
            f"prefill {timing.prefill_tokens} tokens, {timing.prefill_rate:.1f} tokens/s · "
            f"decode {timing.decode_tokens} tokens, {timing.decode_rate:.1f} tokens/s[/dim]"
        )


class _Words:
    """Turns token ids into text as they come, holding back the bytes of an unfinished character.

    Each step decodes only the tokens since the last piece and the piece before it, which gives tokenizers that join
    words differently at the start of a text the context they need.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.ids, self.text = tokenizer, [], ""
        self.context, self.done = 0, 0  # offsets into ids

    def add(self, token: int) -> str:
        self.ids.append(token)
        return self._take(hold=True)

    def rest(self) -> str:
        piece = self._take(hold=False).rstrip("\ufffd")  # an answer that was cut short may end inside a character
        self.text = self.text.rstrip("\ufffd")
        return piece

    def _take(self, hold: bool) -> str:
        before, now = self._decode(self.ids[self.context : self.done]), self._decode(self.ids[self.context :])
        if hold and now.endswith("\ufffd"):
            return ""
        self.context, self.done = self.done, len(self.ids)
        piece = now[len(before) :]
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


if __name__ == "__main__":
    typer.run(main)
