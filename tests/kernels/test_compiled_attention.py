"""The kernels of attention and around it compiled for chips that are not here: what came out has to fit the chips.

In a process of its own, as kernels are either interpreted or compiled; the few cases of `bench_kernels_of_attention --quick`.
"""

import pytest

LARGE = {"sm_80": 163, "sm_90": 227}
"""KB of shared memory that a program can have where it is more than 99; AMD: 64."""


@pytest.fixture(scope="module")
def rows(compiled_rows):
    return compiled_rows("tests.bench.bench_kernels_of_attention")


def test_nothing_spills(rows):
    assert {row["target"] for row in rows} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942", "gfx1100"}
    assert [row for row in rows if row["spills"]] == []


def test_shared_memory_fits(rows):
    limit = lambda target: 64 if target.startswith("gfx") else LARGE.get(target, 99)  # noqa: E731
    assert [row for row in rows if row["shared"] > limit(row["target"]) * 1024] == []


def test_caches_are_read_sixteen_bytes_at_a_time_by_the_matrix_units(rows):
    decode = [row for row in rows if "decode" in row["name"]]
    assert len(decode) > 10 and [row for row in decode if not row["wide"] or not row["matrix"]] == []
    several = [row["matrix"] for row in decode if "8 new tokens" in row["name"]]
    assert several == ["wgmma"]
