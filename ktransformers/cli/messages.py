"""What a person says to the chat program: typed at a terminal, or the lines of a pipe. And the /commands among it.

On a terminal prompt_toolkit edits the line: what is pasted stays one message, and what was typed is remembered.
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from ktransformers import env
from ktransformers.cli.common import err, note
from ktransformers.errors import KTransformersError, did_you_mean

COMMANDS = {
    "/help": "show this",
    "/new": "start a new conversation",
    "/exit": "quit",
}
ALIASES = {"/?": "/help", "/quit": "/exit", "exit": "/exit", "quit": "/exit"}
FENCE = '"""'
QUIT = "type exit or press Ctrl-D to quit"

BANNER = f"Ctrl-C stops an answer, /help lists commands and keys, {QUIT}."


def show_help() -> None:
    """Print the commands and keys."""
    for name, meaning in COMMANDS.items():
        err.print(Text.assemble((f"{name:8}", "bold"), meaning))
    keys = f"Ctrl-C stops an answer. Alt-Enter starts a new line, as do lines between {FENCE} and {FENCE}."
    slash = "A message that begins with / needs a space before it."
    err.print(f"{keys}\n{QUIT[0].upper()}{QUIT[1:]}. {slash}", soft_wrap=True)


def say_how_to_quit() -> None:
    """After a Ctrl-C that had nothing to stop."""
    err.print(f"\n[dim]{QUIT}[/dim]")


def is_command(text: str) -> bool:
    """Whether `text` is a command, known or not: /word, with nothing like a path in it."""
    return bool(re.match(r"/([A-Za-z_-]+|\?)(\s|$)", text))


def resolve(text: str) -> str:
    """The name in COMMANDS of a command. Raises KTransformersError for one that does not exist."""
    word = text.split()[0].lower()
    name = ALIASES.get(word, word)
    if name not in COMMANDS:
        raise KTransformersError(
            f"{word}: no such command{did_you_mean(word, COMMANDS)}. Commands: {', '.join(COMMANDS)}. "
            "For a message that begins so, type a space first."
        )
    return name


def at_terminal() -> bool:
    """Whether somebody types."""
    return sys.stdin is not None and sys.stdin.isatty()


def read(quiet: bool = False) -> "Messages | tuple[()]":
    """What is said on standard input until the end of it. `quiet`: without the banner."""
    if sys.stdin is None:  # closed
        return ()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # as the line editor reads: `Messages` replaces stray bytes
    if not at_terminal():
        return Messages(lambda prompt: input(), terminal=False)
    if not quiet:
        err.print(f"[dim]{BANNER}[/dim]", soft_wrap=True)
    return Messages(line_editor() if sys.stderr.isatty() else input, terminal=True)


class Messages:
    """Messages out of what `ask` returns for a prompt; it raises EOFError at the end.

    No generator, which a Ctrl-C at the wrong moment would end for good.
    """

    def __init__(self, ask: Callable[[str], str], terminal: bool):
        self._ask, self._terminal, self._told = ask, terminal, False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            try:
                text = self._ask("> ")
                if text.strip().startswith(FENCE):
                    text = _fenced(text.strip().removeprefix(FENCE), self._ask)
            except EOFError:
                raise StopIteration from None
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                say_how_to_quit()
                continue
            if ends(text):
                raise StopIteration
            if text.strip():
                return self._whole(text)

    def _whole(self, text: str) -> str:
        """`text`, and one notice for the first of those that had stray bytes."""
        whole = without_stray_bytes(text)
        if whole != text and not self._told:
            self._told = True
            note("input that is not UTF-8 was replaced by \N{REPLACEMENT CHARACTER}; send UTF-8 to keep it")
        return whole


def ends(text: str) -> bool:
    """Whether `text` is what ends the program."""
    return ALIASES.get(text.strip(), text.strip()) == "/exit"


def without_stray_bytes(text: str) -> str:
    """`text` with a replacement character for each byte that was no UTF-8: a surrogate, which no tokenizer takes."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _fenced(first: str, ask: Callable[[str], str]) -> str:
    """Everything up to the line that ends with the closing fence. `first` may hold several lines."""
    lines = [first] if first else []
    while not (lines and lines[-1].rstrip().endswith(FENCE)):
        try:
            lines.append(ask("... "))
        except EOFError:
            note(f"the closing {FENCE} is missing; everything up to the end is the message")
            return "\n".join(lines).strip()
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines).strip()


# ---- the line editor ---------------------------------------------------------------------------------------


def line_editor(source: Any = None, sink: Any = None) -> Callable[[str], str]:
    """A function that shows a prompt and returns what was typed; raises EOFError (Ctrl-D) and KeyboardInterrupt.

    `source` and `sink` are prompt_toolkit's input and output; None is the terminal, by way of standard error, so that
    answers alone are on standard output.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    session: PromptSession[str] = PromptSession(
        history=_history(),
        completer=WordCompleter(list(COMMANDS), meta_dict=dict(COMMANDS), sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
        multiline=True,  # so that pasted lines are shown as such; Enter ends the message all the same
        prompt_continuation="  ",
        key_bindings=_keys(),
        input=source,
        output=sink or create_output(stdout=sys.stderr),
    )
    return session.prompt


def _keys() -> Any:
    """Enter sends, Alt-Enter starts a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return keys


def _history() -> Any:
    """What was typed before: of this session, and of earlier ones where the file can be read and written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if env.history() == "off":
        return _of_prompts(InMemoryHistory())
    path = Path(env.history())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            path.chmod(0o600)  # what people ask is nobody else's business
    except OSError as error:
        note(f"history {path}: cannot be written ({error.strerror}); set KT_HISTORY to another file, or to off")
        return _of_prompts(InMemoryHistory())
    return _of_prompts(FileHistory(str(path)))


def _of_prompts(history: Any) -> Any:
    """`history`, made to leave out what nobody wants back: blank lines, and what ends the program."""
    keep = history.append_string

    def append(text: str) -> None:
        if text.strip() and not ends(text):
            keep(without_stray_bytes(text))

    history.append_string = append
    return history
