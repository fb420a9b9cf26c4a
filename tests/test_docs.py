"""What the README and the tutorials tell people to type works as printed, and prints what they show (tests/pages.py)."""

import pytest

from tests.pages import PAGES, ROOT, blocks, outputs, run_bash, run_python

IDS = [str(page.relative_to(ROOT).with_suffix("")) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_pages_python_runs(page):
    ran = run_python(page)
    assert ran.returncode == 0, ran.stderr


COMMANDS = [(page, block.text) for page in PAGES for block in blocks(page) if block.language == "bash"]


@pytest.mark.parametrize(("page", "text"), COMMANDS, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_the_pages_commands_run(page, text):
    if "make test" in text:
        return  # this very command is running
    ran = run_bash(text)
    assert ran.returncode == 0, ran.stderr
    if "make chat" in text:
        assert ran.stdout.strip(), "make chat answered nothing"


SHOWING = [page for page in PAGES if any(block.prints is not None for block in blocks(page))]


@pytest.mark.parametrize("page", SHOWING, ids=[page.stem for page in SHOWING])
def test_the_pages_show_what_is_printed(page):
    for block, printed in outputs(page):
        assert block.text == printed, f"{page.name} is out of date. Run `make pages`."


def test_every_language_of_a_block_is_one_that_is_run_or_said_not_to_be():
    assert {block.language for page in PAGES for block in blocks(page)} <= {"python", "bash", "yaml", "text", ""}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
