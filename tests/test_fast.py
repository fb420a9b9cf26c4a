"""The table of `make test-fast` names tests that there are, and leaves out no kind of test but those."""

from pathlib import Path

import pytest

from tests.fast import EVERY, SLOW, mark_slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("named", SLOW)
def test_what_is_named_exists(named):
    file, _, test = named.partition("::")
    assert (ROOT / file).is_file() and f"def {test}" in (ROOT / file).read_text(encoding="utf-8")


class Item:
    def __init__(self, nodeid):
        self.nodeid, self.marks = nodeid, []

    def add_marker(self, mark):
        self.marks.append(mark.name)


def test_slow_tests_and_most_cases_of_others_are_left_out():
    items = [Item(f"tests/test_fast.py::test_cases[{i}]") for i in range(2 * EVERY)]
    items += [Item(f"{SLOW[0]}[case]"), Item("tests/test_fast.py::test_alone")]
    mark_slow(items)
    kept = [item.nodeid.split("::")[1] for item in items if not item.marks]
    assert kept == ["test_cases[0]", f"test_cases[{EVERY}]", "test_alone"]
