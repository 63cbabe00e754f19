"""Flags that keep a miscompiling GCC away from a processor's matrix tiles (AMX).

llama.cpp compiled with `-march=native` on a Xeon since Sapphire Rapids uses them, and crashes in its first large
product where GCC leaves out most of the tile configuration (bug 114098: 11 before 11.5, 12 before 12.4, 13 before 13.3;
Debian 12 has 12.2). A small program finds out whether this compiler is one of them: what it loads is read back.

Standard library only.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

WITHOUT_TILES = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
TIMEOUT_S = 60

PROGRAM = r"""
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

struct config { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; };

__attribute__((noinline)) void soil_the_stack() {
    volatile uint8_t left[4096];
    for (unsigned i = 0; i < sizeof left; i++) left[i] = 0xA5;
}

__attribute__((noinline)) void load() {
    alignas(64) config one = {};
    one.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        one.rows[tile] = 16;
        one.row_bytes[tile] = 64;
    }
    _tile_loadconfig(&one);
}

int main() {
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */)) return 2;
    soil_the_stack();
    load();
    config got;
    __asm__ volatile("sttilecfg %0" : "=m"(got));
    for (int tile = 0; tile < 8; tile++)
        if (got.rows[tile] != 16 || got.row_bytes[tile] != 64) return 3;
    return 0;
}
"""


def flags_for(cpu: str) -> tuple[str, ...]:
    """What to add to CFLAGS and CXXFLAGS; nothing where there are no tiles, or they are compiled rightly.

    Args:
        cpu: the processor's flags as Linux lists them.
    """
    return WITHOUT_TILES if "amx_tile" in cpu.split() and not _compiles_rightly(_compiler()) else ()


def _compiler() -> tuple[str, ...]:
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    return tuple(os.environ.get("CXX", "").split() or found[:1])


@functools.cache
def _compiles_rightly(compiler: tuple[str, ...]) -> bool:
    """Tried once for each: the key of the cache and the compilation both ask."""
    if not compiler:
        return True
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "tiles"
        command = [*compiler, "-x", "c++", "-std=c++11", "-O3", "-march=native", "-o", str(program), "-"]
        try:
            made = subprocess.run(command, check=False, input=PROGRAM.encode(), capture_output=True, timeout=TIMEOUT_S)
            if made.returncode != 0:
                # One that can't compile this won't compile llama.cpp's tiles either, and may not know the flags.
                return True
            return subprocess.run([str(program)], check=False, capture_output=True, timeout=TIMEOUT_S).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return True
