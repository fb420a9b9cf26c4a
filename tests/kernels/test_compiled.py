"""The kernels compiled for chips that are not here: what the compilers made of them has to fit the chips, and the table.

In a process of its own, as kernels are either interpreted or compiled; the few cases of `bench_kernels --quick`.
"""

import pytest

WEIGHTS_LOOP = 1.1
"""How much worse than the table a loop may become before somebody looks."""


@pytest.fixture(scope="module")
def rows(compiled_rows):
    return compiled_rows("tests.bench.bench_kernels")


def test_nothing_spills(rows):
    assert {row["target"] for row in rows} >= {"sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942", "gfx1100"}
    assert [row for row in rows if row["spills"]] == []


def test_shared_memory_fits_the_smallest_chips(rows):
    """99 KB on sm_86, 89 and 120, 64 KB on AMD."""
    limit = lambda target: 64 if target.startswith("gfx") else 99  # noqa: E731
    assert [row for row in rows if row["shared"] > limit(row["target"]) * 1024] == []


def test_codes_are_loaded_sixteen_bytes_at_a_time(rows):
    assert [row for row in rows if not row["wide"]] == []


def test_dots_are_computed_by_the_matrix_units(rows):
    dots = [row for row in rows if row["name"].startswith("dot")]
    assert dots and [row for row in dots if not row["matrix"]] == []
    wide = [row["matrix"] for row in dots if row["target"] == "sm_90" and row["name"].endswith("64")]
    assert wide == ["wgmma"]


def test_loops_are_no_longer_than_in_the_table(rows):
    """The table is of Triton 3.9.0; another compiler may differ by some instructions."""
    bench = pytest.importorskip("tests.bench.bench_kernels")
    table = bench.per_weight_of_table()
    found = {(row["name"], row["target"]): row["per_weight"] for row in rows}
    assert found.keys() <= table.keys()
    longer = {case: (now, table[case]) for case, now in found.items() if now > WEIGHTS_LOOP * table[case]}
    assert longer == {}
