"""The chat program: load a model, then answer what a person types or a pipe holds, until told to stop.

`kt chat` and `python -m ktransformers.local_chat` are two sets of flags for it. It shows things and keeps the
conversation; `engine/` loads and computes, `messages.py` reads what is said.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from ktransformers.cli import messages
from ktransformers.cli.common import check_adapter, drop_output, err, note, print_error, renamed_devices, with_adapter
from ktransformers.cli.turns import OutputError, Turns
from ktransformers.configs import text_config
from ktransformers.errors import KTransformersError
from ktransformers.paths import existing_path

if TYPE_CHECKING:
    from ktransformers.engine.generate import Timing

NEW_TOKENS = 1000
"""Most tokens of an answer where neither a flag nor the model's generation_config says a number."""

THINK = "<think>\n"
"""How reasoning begins in the models that `force_think` is for (DeepSeek-R1 and those that learned from it)."""


@dataclass(frozen=True)
class Options:
    """What the flags say. Empty texts, None and 0 mean: decide for me."""

    model_path: str = ""
    weights: str = ""
    rule: str = ""
    devices: tuple[str, ...] = ()
    threads: int = 0
    prompt_file: str = ""
    max_new_tokens: int | None = None
    chunk_size: int = 8192
    cache: str = ""
    adapter: str = ""
    greedy: bool = False
    force_think: bool = False
    as_json: bool = False


def talk(options: Options) -> None:
    """Run the program. Raises KTransformersError for what cannot start, typer.Exit with the exit code at the end."""
    devices = renamed_devices(options.devices)
    check_adapter(options.adapter)
    prompt = read_prompt_file(options.prompt_file)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks is not the end of the program
    with _loading(options) as on_step:
        on_step("importing torch")
        _set_threads(options.threads)
        from ktransformers.engine.load import load

        model, tokenizer = load(
            options.model_path, options.weights, options.rule,
            devices=devices, cache=options.cache, progress=not options.as_json, notify=note, on_step=on_step,
        )  # fmt: skip
        if options.adapter:
            on_step(f"putting {options.adapter} onto the model")
            model = with_adapter(model, options.adapter)
        chat = Chat(model, tokenizer, options)
    hold(chat, prompt)


def hold(chat: Turns, prompt: str) -> None:
    """Answer the one `prompt`, or without it what is typed or piped. Raises typer.Exit with the exit code."""
    try:
        code = chat.run([prompt], commands=False) if prompt else chat.run(messages.read(chat.as_json))
        code = 0 if messages.at_terminal() and not prompt else code  # who sat there has seen what failed
    except OutputError as error:
        drop_output()
        print_error(f"standard output cannot be written: {error}. Free space, or write elsewhere.")
        code = 1
    raise typer.Exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Start
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _loading(options: Options) -> Iterator[Any]:
    """Say at once what is being loaded, then, on a terminal, what is going on and how long it took."""
    if options.as_json and not err.is_terminal:
        yield lambda text: None
        return
    start = time.monotonic()
    name = options.model_path or options.weights or "the embedded model"
    err.print(Text(f"loading {name}", "dim"), soft_wrap=True)
    status = err.status("")
    status.start()

    def on_step(text: str) -> None:
        if text.startswith("loading"):
            status.stop()  # the weights have a bar of their own
        else:
            status.update(Text(text, "dim"))

    try:
        yield on_step
    finally:
        status.stop()
    if err.is_terminal:
        err.print(f"[dim]loaded in {time.monotonic() - start:.1f} s[/dim]")


def _set_threads(count: int) -> None:
    """Give the C library and torch `count` threads; more than the cores would make both crawl, so they are the most."""
    if count == 0:
        return
    import numpy  # noqa: F401  before torch, whose own import of it would swallow a Ctrl-C
    import torch

    from ktransformers import native

    cores = native.default_threads()
    if count < 0:
        raise KTransformersError(f"{count} CPU threads: expected 1 to {cores}, or 0 for all cores.")
    if count > cores:
        note(f"{count} CPU threads: this process may use {cores} cores, so there are {cores} threads")
        count = cores
    native.set_threads(count)
    torch.set_num_threads(count)


def read_prompt_file(path: str) -> str:
    if not path:
        return ""
    there = existing_path(path, "prompt file") or Path(path)
    try:
        text = there.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path once more
        raise KTransformersError(f"prompt file {path}: cannot be read: {reason}. Check the path.") from error
    if not text.strip():
        raise KTransformersError(f"prompt file {path}: is empty, expected the text of a message.")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Talk
# ---------------------------------------------------------------------------------------------------------------------


class Chat(Turns):
    """One conversation with a model of this process, and its KV cache, which agrees with the messages."""

    def __init__(self, model: Any, tokenizer: Any, options: Options):
        from ktransformers.engine.cache import PrefixCache
        from ktransformers.engine.sampling import Chooser, Sampling

        super().__init__(options.as_json)
        self.model, self.tokenizer, self.options = model, tokenizer, options
        stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        sampling = Sampling(model.generation_config, stop)
        self.sampling = sampling.greedy() if options.greedy else sampling
        Chooser(self.sampling, model, [0], 1, tokenizer)  # what cannot be used is known before the first message
        if unhonoured := sampling.unhonoured():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in unhonoured.items())
            note(f"generation_config asks for what has no effect here ({reasons})")
        self.cache = PrefixCache()

    def forget(self) -> None:
        self.cache.clear()

    def answer(self, text: str) -> str:
        """Stream the answer to `text`, then say how fast it came. Ctrl-C keeps what was said so far."""
        from ktransformers.engine.detokenize import Detokenizer
        from ktransformers.engine.generate import Timing, generate

        kept = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        timing, words, thought, stopped = Timing(), Detokenizer(self.tokenizer), "", False
        try:
            try:
                prompt, thought = self._prompt()
                room = min(self._most_new(), self._context() - len(prompt))
                self._show(thought)
                for token in generate(
                    self.model, prompt, max_new_tokens=room, chunk_size=self.options.chunk_size,
                    sampling=self.sampling, cache=self.cache, timing=timing, tokenizer=self.tokenizer,
                ):  # fmt: skip
                    self._show(words.add(token))
                if len(words.ids) == room < self._most_new():
                    err.print("\n[dim]the model's context is full[/dim]")
            except KeyboardInterrupt:
                stopped = True
            self._show(words.rest())
        except Exception:
            self.messages = kept
            raise
        said = thought + words.text
        self.messages.append({"role": "assistant", "content": said})
        self._finish(text, said, timing, stopped)
        return said

    def _prompt(self) -> tuple[list[int], str]:
        """Token ids of the conversation, and the text that the answer is made to begin with.

        The oldest turns are dropped when the model's context would overflow.
        """
        limit, dropped = self._context(), 0
        room = max(1, min(self._most_new(), limit // 4))
        ids, thought = self._tokens(self.messages)
        if len(ids) + room > limit and (alone := len(self._tokens(self.messages[-1:])[0])) + room > limit:
            raise KTransformersError(
                f"message: has {alone} tokens; the model takes {limit} in all, {room} of them kept for the answer. "
                "Shorten it."
            )
        while len(ids) + room > limit:
            del self.messages[:2]
            dropped += 1
            ids, thought = self._tokens(self.messages)
        if dropped:
            turns = "its oldest turn was" if dropped == 1 else f"its {dropped} oldest turns were"
            err.print(f"[dim]the conversation is longer than the model's context; {turns} dropped[/dim]")
        return ids, thought

    def _most_new(self) -> int:
        """Most tokens of an answer."""
        return self.options.max_new_tokens or self.sampling.config.max_new_tokens or NEW_TOKENS

    def _context(self) -> int:
        """How many tokens prompt and answer may have together."""
        limit = getattr(text_config(self.model.config), "max_position_embeddings", None) or sys.maxsize
        said = self.options.max_new_tokens or self.sampling.config.max_new_tokens  # goes before max_length, as there
        return limit if said else min(limit, self.sampling.config.max_length or limit)

    def _tokens(self, conversation: list[dict[str, str]]) -> tuple[list[int], str]:
        from jinja2 import TemplateError

        try:
            ids = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise KTransformersError(
                f"the tokenizer's chat template refuses this conversation: {error}. Say /new to start over."
            ) from error
        if not self.options.force_think or self.tokenizer.decode(ids[-8:]).rstrip().endswith(THINK.rstrip()):
            return ids, ""
        return [*ids, *self.tokenizer.encode(THINK, add_special_tokens=False)], THINK

    def _finish(self, question: str, answer: str, timing: "Timing", stopped: bool) -> None:
        if self.options.as_json:
            data = {"question": question, "answer": answer, "stopped": stopped, **asdict(timing)}
            self._write(json.dumps(data) + "\n")
            return
        self._write("\n")
        err.print(
            f"[dim]{'stopped · ' if stopped else ''}"
            f"prefill {timing.prefill_tokens} tokens, {timing.prefill_rate:.1f} tokens/s · "
            f"decode {timing.decode_tokens} tokens, {timing.decode_rate:.1f} tokens/s[/dim]"
        )
