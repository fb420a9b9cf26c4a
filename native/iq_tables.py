"""Write src/formats/iq_grids.h from ktransformers/quants/iq_grids.py: `python native/iq_tables.py`, for a new grid."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
GRIDS = runpy.run_path(str(ROOT / "ktransformers" / "quants" / "iq_grids.py"))["GRIDS"]
HEADER = Path(__file__).parent / "src" / "formats" / "iq_grids.h"

INTRODUCTION = """\
/* iq_grids.h: made by native/iq_tables.py, for iq_tables.c alone. The points of each grid, packed: value i of a point
 * is level (point >> bits*i) & (2^bits - 1), with 2 bits for grids of three levels and 4 bits for grids of eight.
 * KT_IQ1_*: the high bytes of the IQ1 grid by sixteens, see kt_iq1_high. */
"""


def words(name: str) -> list[str]:
    """The points of a grid as hexadecimal numbers of 16 bits."""
    grid = GRIDS[name]
    bits = 16 // grid.digits
    return [f"{sum(code << bits * i for i, code in enumerate(point)):04x}" for point in grid.codes().tolist()]


def macro(name: str) -> str:
    """The points as a macro that applies another one to each: `#define KT_GRID_NAME(X) X(0000) X(0002) ...`."""
    points = words(name)
    lines = ["".join(f" X({p})" for p in points[i : i + 14]) for i in range(0, len(points), 14)]
    return f"#define KT_GRID_{name}(X) \\\n   " + " \\\n   ".join(lines) + "\n"


def steps() -> str:
    """High bytes of the IQ1 grid, which is sorted: of 16 points in a row, the first ones share a high byte and so do
    the rest. Three lists for the 128 such sixteens: the byte of the first point, that of the last, and how many
    points have the byte of the first."""
    high = [int(point[:2], 16) for point in words("IQ1")]
    sixteens = [high[i : i + 16] for i in range(0, len(high), 16)]
    assert all(set(block) <= {block[0], block[-1]} for block in sixteens)
    lists = {
        "FIRST": [block[0] for block in sixteens],
        "LAST": [block[-1] for block in sixteens],
        "STEP": [block.count(block[0]) for block in sixteens],
    }
    return "".join(
        f"\n#define KT_IQ1_{name} \\\n   "
        + " \\\n   ".join("".join(f" {v}," for v in values[i : i + 16]) for i in range(0, 128, 16))
        + "\n"
        for name, values in lists.items()
    )


def text() -> str:
    """The whole header."""
    return INTRODUCTION + "".join("\n" + macro(name) for name in GRIDS) + steps()


if __name__ == "__main__":
    HEADER.write_text(text(), encoding="ascii")
