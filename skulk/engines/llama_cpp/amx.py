"""Whether this build of llama.cpp can use the processor's matrix tiles (AMX), or dies of the first large product.

Until 11.5, 12.4, 13.3 and 14.1 (bug 114098) GCC's `_tile_loadconfig` told the optimiser of 8 of the 64 bytes it reads:
the stores of the others are left out, and the processor faults on what happens to lie there. llama.cpp fills its
configuration on the stack, so a build for such a processor (Xeon from Sapphire Rapids on) by such a compiler crashes in
`ggml_backend_amx_mul_mat`. The compiler of a library stands in its `.comment` section.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from skulk.engines.llama_cpp.native import library, native_folder

log = logging.getLogger(__name__)

# The first release of each line of GCC that compiles it rightly; 10 knows no AMX, and what isn't listed is right.
_MENDED_IN: Final = {11: 5, 12: 4, 13: 3}
_COMPILER: Final = re.compile(rb"GCC: \([^)\0]{0,100}\) (\d{1,3})\.(\d{1,3})\.\d")
_LIBRARIES: Final = "*ggml-cpu*"


def is_miscompiled(binary: bytes) -> bool:
    """Whether some part of a library was compiled by a GCC with that bug; an unknown compiler passes for right."""
    return any(int(minor) < _MENDED_IN.get(int(major), 0) for major, minor in set(_COMPILER.findall(binary)))


@functools.cache
def can_use_tiles() -> bool:
    """False where the installed library would crash in its tile products; said once in the log, with what to do."""
    if "AMX_INT8 = 1" not in library().llama_print_system_info().decode("utf-8", "replace"):
        return True
    if not any(map(is_miscompiled, _contents(native_folder().glob(_LIBRARIES)))):
        return True
    log.warning(
        "this llama-cpp-python was compiled for AMX by a GCC that compiles it wrongly (bug 114098) and would crash: "
        "models load without repacked weights, which may be slower. To mend it remove .venv and run `make up` (in a "
        "clone of this project), or compile it with GCC 12.4, 13.3, 14 or later, or with CFLAGS and CXXFLAGS "
        "'-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'."
    )
    return False


def _contents(files: Iterable[Path]) -> Iterable[bytes]:
    for file in files:
        try:
            yield file.read_bytes()
        except OSError as error:
            log.debug("%s can't be read: %s", file, error)
