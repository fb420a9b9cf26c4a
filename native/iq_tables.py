"""Write src/iq_grids.h from ktransformers/iq_grids.py: `python native/iq_tables.py`. Run again when a grid is added."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
GRIDS = runpy.run_path(str(ROOT / "ktransformers" / "iq_grids.py"))["GRIDS"]
HEADER = Path(__file__).parent / "src" / "iq_grids.h"

INTRODUCTION = """\
/* iq_grids.h: made by native/iq_tables.py, for iq_tables.c alone. The points of each grid, packed: value i of a point
 * is level (point >> bits*i) & (2^bits - 1), with 2 bits for grids of three levels and 4 bits for grids of eight. */
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


def text() -> str:
    """The whole header."""
    return INTRODUCTION + "".join("\n" + macro(name) for name in GRIDS)


if __name__ == "__main__":
    HEADER.write_text(text(), encoding="ascii")
