"""For all suites: no test asserts a time, so hypothesis doesn't either; a busy machine is no defect."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")
