"""For all suites: no test asserts a time, so hypothesis doesn't either; a busy machine is no defect."""

from __future__ import annotations

import signal

from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell that starts the tests in the background has Ctrl-C ignored, and every process below would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("house", deadline=None)
settings.load_profile("house")
