"""A conversation, message by message: how answers are shown, and what happens where one fails.

conversation.py answers with a model of this process, remote.py with a server's.
"""

import json
import sys
import traceback
from collections.abc import Iterable

from ktransformers import env
from ktransformers.cli import messages
from ktransformers.cli.common import error_object, print_error
from ktransformers.errors import KTransformersError


class OutputError(Exception):
    """Standard output cannot be written: whoever reads it went away, or the disk is full."""


class Turns:
    """The messages of a conversation; a subclass answers them.

    Whatever goes wrong in a turn, the message that failed is not part of the conversation.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.messages: list[dict[str, str]] = []

    def answer(self, text: str) -> str:
        """Show the answer to `text` as it comes; it and the message become part of the conversation."""
        raise NotImplementedError

    def forget(self) -> None:
        """After an error that nobody expected: whatever is kept besides the messages may be wrong."""

    def run(self, said: Iterable[str], commands: bool = True) -> int:
        """Answer each message; returns the exit code: 0, or 1 when one of them failed."""
        code, coming, text = 0, iter(said), ""
        while True:
            try:
                text = next(coming)
                if commands and messages.is_command(text):
                    self._command(text.strip())
                else:
                    self.answer(text)
            except StopIteration:
                return code
            except OutputError:
                raise
            except KeyboardInterrupt:  # at a prompt or between two answers; one in an answer stops that
                if not messages.at_terminal():
                    raise
                messages.say_how_to_quit()
            except Exception as error:
                self._failed(text, error)
                code = 1

    def _command(self, text: str) -> None:
        name = messages.resolve(text)
        if name == "/new":
            self.messages.clear()
        elif name == "/help":
            messages.show_help()

    def _failed(self, question: str, error: Exception) -> None:
        """Report an error in one line. One that nobody expected may have left anything in the cache."""
        if not isinstance(error, KTransformersError):
            self.forget()
            if env.debug():
                traceback.print_exception(error)
        print_error(_one_line(error))
        if self.as_json:
            self._write(json.dumps({"question": question, **error_object(error)}) + "\n")

    def _show(self, piece: str) -> None:
        if piece and not self.as_json:
            self._write(piece)

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            raise OutputError(str(error)) from error


def _one_line(error: Exception) -> str:
    """What a person reads: our own errors as they are, any other with its kind and the next step."""
    if isinstance(error, KTransformersError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no message"]
    return (
        f"{type(error).__name__}: {lines[0]}. This answer failed; the conversation goes on without it. "
        "KT_DEBUG=1 shows where it happened."
    )
