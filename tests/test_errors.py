"""The words for runs of numbers, both ways."""

import pytest

from ktransformers.errors import parse_ranges, ranges


@pytest.mark.parametrize("numbers", [[], [0], [3, 4, 5, 8], [0, 2, 4], list(range(40))], ids=str)
def test_what_ranges_writes_parse_ranges_reads(numbers):
    spans, wrong = parse_ranges(ranges(numbers))
    assert wrong is None
    assert [n for first, last in spans for n in range(first, last + 1)] == numbers


@pytest.mark.parametrize(
    "text, spans",
    [(" 1 - 3 , 7", [(1, 3), (7, 7)]), ("30-", [(30, None)]), ("0-1, 5-", [(0, 1), (5, None)]), ("  ", [])],
)
def test_spaces_and_open_ends(text, spans):
    assert parse_ranges(text) == (spans, None)


@pytest.mark.parametrize(
    "text, wrong",
    [("1,,2", ""), ("1,", ""), ("3-1", "3-1"), ("-4", "-4"), ("1,x", "x"), ("1-2-3", "1-2-3"), ("\u0663", "\u0663"),
     ("1.5", "1.5"), ("1" * 10, "1" * 10)],
)  # fmt: skip
def test_the_first_part_that_is_no_range_is_named(text, wrong):
    assert parse_ranges(text) == ([], wrong)
