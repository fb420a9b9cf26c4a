"""What is typed, pasted or piped becomes messages; commands and history; on a real terminal by way of a pty."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from ktransformers import env
from ktransformers.cli import messages
from ktransformers.errors import KTransformersError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def history(tmp_path, monkeypatch):
    path = tmp_path / "state" / "chat_history"
    monkeypatch.setenv("KT_HISTORY", str(path))
    return path


def piped(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return list(messages.read(quiet=True))


def typed(text):
    """The messages out of keys: what a terminal sends."""
    with create_pipe_input() as keys:
        keys.send_bytes(text.encode(errors="surrogateescape"))
        return list(messages.Messages(messages.line_editor(keys, DummyOutput()), terminal=True))


# ---- pipes -------------------------------------------------------------------------------------------------


def test_each_line_of_a_pipe_is_a_message(monkeypatch):
    assert piped(monkeypatch, "one\n\n  \ntwo\nexit\nnever\n") == ["one", "two"]


def test_a_fence_takes_several_lines(monkeypatch):
    assert piped(monkeypatch, '"""first\nsecond"""\nthird\n/quit\nnever\n') == ["first\nsecond", "third"]


def test_a_fence_that_is_never_closed_still_makes_a_message(monkeypatch, capsys):
    assert piped(monkeypatch, '"""first\nsecond') == ["first\nsecond"]
    assert "is missing" in capsys.readouterr().err


def test_bytes_of_a_pipe_that_are_not_utf_8_are_replaced_and_one_notice_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello \xff\xfe there\nagain \xff\n"), "utf-8"))
    assert list(messages.read(quiet=True)) == ["hello \ufffd\ufffd there", "again \ufffd"]
    err = capsys.readouterr().err
    assert err.count("note:") == 1 and "not UTF-8" in err


# ---- the editor --------------------------------------------------------------------------------------------

PASTE = "\x1b[200~{}\x1b[201~"
UP, DOWN, END = "\x1b[A", "\x1b[B", "\x04"


def test_pasted_lines_are_one_message():
    assert typed(PASTE.format("one\rtwo\rthree") + "\r" + "next\r" + END) == ["one\ntwo\nthree", "next"]


def test_a_pasted_fence_is_one_message():
    assert typed(PASTE.format('"""one\rtwo"""') + "\r" + END) == ["one\ntwo"]


def test_alt_enter_starts_a_new_line():
    assert typed("one\x1b\rtwo\r" + END) == ["one\ntwo"]


def test_ctrl_c_says_how_to_quit_and_ctrl_d_quits(capsys):
    assert typed("half\x03whole\r" + END) == ["whole"]
    assert "type exit or press Ctrl-D to quit" in capsys.readouterr().err


def test_commands_are_completed():
    assert typed("/h\t\r" + END) == ["/help"]


def test_what_was_typed_is_there_in_the_next_session(history):
    assert typed("What is MLA?\r" + END) == ["What is MLA?"]
    assert history.stat().st_mode & 0o077 == 0
    assert typed(UP + "\r" + END) == ["What is MLA?"]


def test_stray_bytes_are_replaced_and_one_notice_says_so(history, capsys):
    assert typed("one \udcff\udcfe\rtwo \udcff\r" + END) == ["one \ufffd\ufffd", "two \ufffd"]
    err = capsys.readouterr().err
    assert err.count("note:") == 1 and "not UTF-8" in err
    assert "+one \ufffd\ufffd" in history.read_text()


def test_the_history_keeps_prompts_and_not_what_ends_the_program(history):
    for last in ("exit", " quit ", "/exit", "/quit"):
        typed(f"What is MLA?\r  \r/help\r{last}\r")
    kept = [line for line in history.read_text().splitlines() if line.startswith("+")]
    assert kept == ["+What is MLA?", "+/help"] * 4


def test_history_can_be_off_and_a_place_that_cannot_be_written_is_a_notice(history, monkeypatch, capsys):
    monkeypatch.setenv("KT_HISTORY", "off")
    assert typed("secret\r" + END) == ["secret"] and not history.exists()
    monkeypatch.setenv("KT_HISTORY", "/dev/null/history")
    assert typed("secret\r" + END) == ["secret"]
    assert "set KT_HISTORY to another file, or to off" in " ".join(capsys.readouterr().err.split())


def test_the_history_is_in_the_state_folder(monkeypatch):
    monkeypatch.delenv("KT_HISTORY")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert env.history() == "/state/ktransformers/chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert env.history() == os.path.expanduser("~/.local/state/ktransformers/chat_history")


def test_a_pipe_needs_no_editor():
    code = "import sys\nfrom ktransformers.cli import messages\nlist(messages.read())\nprint('prompt_toolkit' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], input="one\n", capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout == "False\n", ran.stderr


# ---- commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "command"),
    [("/help", True), ("/foo bar", True), ("/?", True), ("/etc/hosts: what is it?", False), (" /help", False),
     ("/ is a slash", False), ("what is /help", False), ("/3", False)],
)  # fmt: skip
def test_what_looks_like_a_command_is_one(text, command):
    assert messages.is_command(text) == command


def test_an_unknown_command_is_an_error_that_names_the_others():
    assert messages.resolve("/NEW") == "/new" and messages.resolve("/quit now") == "/exit"
    with pytest.raises(KTransformersError, match=r"did you mean '/help'.*Commands: /help, /new, /exit\."):
        messages.resolve("/hepl")


# ---- the whole program at a terminal -----------------------------------------------------------------------


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *arguments, **environment):
        command = [sys.executable, "-m", "ktransformers", "chat", "--greedy", *arguments]
        self.process, self.leader = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, command, {**os.environ, "TERM": "xterm", **environment})
        self.seen, self.at = "", 0  # what came, and how much of it `until` has passed

    def until(self, pattern, seconds=120):
        """Read until `pattern` comes after what the last call found; the terminal's answers to queries are given."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen[self.at :], re.DOTALL)):
            assert time.monotonic() < end, f"{pattern!r} not in {self.seen[self.at :]!r}"
            if select.select([self.leader], [], [], 0.2)[0]:
                try:
                    piece = os.read(self.leader, 65536).decode(errors="replace")
                except OSError:
                    piece = ""
                assert piece, f"ended with {self.seen[self.at :]!r}"
                if "\x1b[6n" in piece:
                    self.send("\x1b[1;1R")
                self.seen += piece
        passed = self.seen[self.at : self.at + found.end()]
        self.at += found.end()
        return passed

    def send(self, text):
        os.write(self.leader, text if isinstance(text, bytes) else text.encode())

    def ended(self):
        """Wait for the end; returns the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_a_session_at_a_terminal(history):
    """Loading is shown; three pasted lines get one answer; Ctrl-C at the prompt and in an answer; exit code."""
    terminal = Terminal("--chunk-size", "1")
    terminal.until("loading the embedded model")
    assert "/help lists commands" in terminal.until("press Ctrl-D to quit")
    terminal.until(">")
    terminal.send(PASTE.format("What is\ra rule\rfile?") + "\r")
    assert "YAML" in terminal.until(r"decode \d+ tokens")
    time.sleep(0.5)  # until the prompt is there again
    terminal.send("\x03")
    terminal.until("type exit or press Ctrl-D to quit")
    terminal.send("word " * 600 + "\r")
    terminal.until(r"\?2004l")  # the editor has handed the terminal back; 600 passes take a second
    time.sleep(0.2)
    terminal.send("\x03")
    terminal.until("stopped.*tokens/s")
    terminal.send(b"hello \xff\xfe there\r")
    terminal.until("not UTF-8")
    terminal.until(r"decode \d+ tokens")
    terminal.send("/nwe\r")
    terminal.until("no such command")
    terminal.send("exit\r")
    terminal.until("exit")
    assert terminal.ended() == 0
    assert "Traceback" not in terminal.seen and len(re.findall(r"prefill \d+ tokens", terminal.seen)) == 3
    assert "+What is" in history.read_text()
