"""What the README and the tutorials tell people to type works as printed.

In each page: a yaml block that begins with "# file: NAME" is written to that file, python blocks run in order as one
program, bash blocks run in the repository. Blocks marked text show output or need what the tests do not have.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def program(page):
    """The page's python blocks as one script, with its files written in between, as a reader would."""
    parts = []
    for language, text in blocks(page):
        if language == "yaml" and (name := re.match(r"# file: (\S+)\n", text)):
            parts.append(f"open({name.group(1)!r}, 'w').write({text!r})\n")
        elif language == "python":
            parts.append(text)
    return "\n".join(parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_python_runs(page, tmp_path):
    script = tmp_path / "page.py"
    script.write_text(program(page))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr


COMMANDS = [(page, text) for page in PAGES for language, text in blocks(page) if language == "bash"]


@pytest.mark.parametrize(("page", "text"), COMMANDS, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_the_pages_commands_run(page, text):
    if "make test" in text:
        return  # this very command is running
    ran = subprocess.run(
        ["bash", "-ec", text], cwd=ROOT, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == 0, ran.stderr
    if "make chat" in text:
        assert ran.stdout.strip(), "make chat answered nothing"


def test_every_language_of_a_block_is_one_that_is_run_or_said_not_to_be():
    assert {language for page in PAGES for language, _ in blocks(page)} <= {"python", "bash", "yaml", "text"}
