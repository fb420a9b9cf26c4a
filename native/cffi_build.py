"""Builds ktransformers._native, the cffi module: API from kt_native.h, code from the static libraries of setup.py.

Not shipped in the wheel. setup.py names it in `cffi_modules`; nothing else imports it.
"""

from glob import glob
from pathlib import Path

from cffi import FFI

HEADER = Path(__file__).parent / "include" / "kt_native.h"


def api() -> str:
    """The part of the header between its two marker comments: plain declarations that cffi can parse."""
    return HEADER.read_text(encoding="ascii").split("/* <cffi> */")[1].split("/* </cffi> */")[0]


ffibuilder = FFI()
ffibuilder.cdef(api())
ffibuilder.set_source(
    "ktransformers._native",
    '#include "kt_native.h"',
    include_dirs=["native/include"],
    # setup.py runs at the repository root. A change in any C file or header relinks the module.
    depends=sorted(glob("native/include/*.h") + glob("native/src/**/*.[ch]", recursive=True)),
    extra_compile_args=["-fvisibility=hidden"],
    libraries=["pthread", "m"],
)
