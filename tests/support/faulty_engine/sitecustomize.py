"""Makes llama.cpp faulty in runners: Python imports this by itself where the folder is on PYTHONPATH.

The file that FAULTY_DECODE names says how, when a runner starts: `slow` (each llama_decode takes 0.15 s more),
`scramble` (its scores come out in reverse order), `nan` (they are no numbers), `repeat` (one token wins always), or
nothing.
"""

import os
import sys
import time
from typing import Any

SLOW_S = 0.15


def _wrap(fault: str) -> None:
    import ctypes
    import importlib

    import numpy as np

    lib: Any = importlib.import_module("llama_cpp.llama_cpp")
    decode = lib.llama_decode

    def faulty(context: int, batch: Any) -> int:
        status = decode(context, batch)
        if fault == "slow":
            time.sleep(SLOW_S)
            return status
        size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(lib.llama_get_model(context)))
        for at in range(batch.n_tokens):
            if batch.logits[at]:
                row = lib.llama_get_logits_ith(context, at)
                memory: Any = (ctypes.c_float * size).from_address(ctypes.addressof(row.contents))
                scores = np.frombuffer(memory, np.float32)
                scores[:] = {
                    "scramble": scores[::-1].copy(),
                    "nan": np.full(size, np.nan, np.float32),
                    "repeat": np.eye(1, size, 300, np.float32)[0],
                }[fault]
        return status

    lib.llama_decode = faulty


if {"_runner", "skulk.runner"} & set(sys.orig_argv):
    with open(os.environ["FAULTY_DECODE"], encoding="ascii") as file:
        told = file.read().strip()
    if told:
        _wrap(told)
