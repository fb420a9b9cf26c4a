"""The pages that people read, and the output that they show: `python -m tests.pages` makes it, a test compares it.

In a page a bash block is run in the repository, a yaml block that begins with "# file: NAME" is written to that file, and
python blocks run in order as one program. A text block after the line `<!-- prints -->` is what the bash or python block
before it prints; `<!-- prints: COMMAND -->` pipes that through a shell command first (`head -5`, `sed ...`). Other text blocks
need what the tests do not have.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "models" / "README.md", ROOT / "native" / "README.md"]
PAGES += sorted((ROOT / "tutorials").glob("*.md"))
BLOCK = re.compile(
    r"(?:^<!-- prints(?P<pipe>: [^\n]+?)? -->\n(?P<gap>\n*))?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
CUT = "\x1e"
"""Printed between two python blocks."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Block:
    """A fenced block. `prints`: the shell filter of the output that it shows ("" for none), None if it shows no output."""

    language: str
    text: str
    prints: str | None
    span: tuple[int, int]
    """Where its text lies in the page."""


def blocks(page: Path) -> list[Block]:
    """The page's blocks in order."""
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        shows = None if match["gap"] is None else (match["pipe"] or "").removeprefix(": ")
        found.append(Block(match["language"], match["text"], shows, match.span("text")))
    return found


def program(page: Path) -> str:
    """The page's python blocks as one script, with its files written in between, as a reader would."""
    parts = []
    for block in blocks(page):
        if block.language == "yaml" and (name := re.match(r"# file: (\S+)\n", block.text)):
            parts.append(f"open({name.group(1)!r}, 'w').write({block.text!r})\n")
        elif block.language == "python":
            parts.append(f"print({CUT!r}, end='', flush=True)\n{block.text}")
    return "\n".join(parts)


@functools.cache
def run_python(page: Path) -> subprocess.CompletedProcess[str]:
    """Run the page's python in a folder of its own; once in a process, who asks again gets the same answer."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "page.py")
        script.write_text(program(page), encoding="utf-8")
        command = [sys.executable, str(script)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


@functools.cache
def run_bash(text: str) -> subprocess.CompletedProcess[str]:
    """Run a bash block in the repository, as from a shell: a make within `make test` would say which folder it enters.
    Once in a process, as run_python."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    environment = {**inherited, "COLUMNS": "100"}
    return subprocess.run(
        ["bash", "-ec", text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def filtered(output: str, command: str) -> str:
    """`output` without colours, through a shell filter, without blanks at the ends of lines."""
    plain = ANSI.sub("", output)
    if command:
        plain = subprocess.run(["bash", "-ec", command], input=plain, capture_output=True, text=True, check=True).stdout
    return "".join(f"{line.rstrip()}\n" for line in plain.strip("\n").splitlines())


def shown(page: Path, python: str, bash: dict[str, str]) -> Iterator[tuple[Block, str]]:
    """Each block that shows output, with what it should say. `python`: what the program printed; `bash`: block -> output."""
    pieces = iter(python.split(CUT)[1:])
    before = ""
    for block in blocks(page):
        if block.language == "python":
            before = next(pieces, "")
        elif block.language == "bash":
            before = bash.get(block.text, "")
        elif block.prints is not None:
            yield block, filtered(before, block.prints)


def outputs(page: Path) -> list[tuple[Block, str]]:
    """What the page should show, by running it. Raises RuntimeError if a block that shows something fails."""
    every = blocks(page)
    showing = [before for before, after in pairwise(every) if after.prints is not None]
    bash, python = {}, ""
    for block in showing:
        if block.language == "bash":
            ran = run_bash(block.text)
            if ran.returncode:
                raise RuntimeError(f"{page.name}: {block.text}{ran.stderr}")
            bash[block.text] = ran.stdout
    if any(block.language == "python" for block in showing):
        ran = run_python(page)
        if ran.returncode:
            raise RuntimeError(f"{page.name}: {ran.stderr}")
        python = ran.stdout
    return list(shown(page, python, bash))


def rewrite(page: Path) -> bool:
    """Write what the page's blocks print into it. Returns whether that changed anything."""
    text = page.read_text(encoding="utf-8")
    for block, printed in reversed(outputs(page)):
        text = text[: block.span[0]] + printed + text[block.span[1] :]
    changed = text != page.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    return changed


if __name__ == "__main__":
    for page in PAGES:
        print(f"{page.relative_to(ROOT)}: {'changed' if rewrite(page) else 'as it was'}")
