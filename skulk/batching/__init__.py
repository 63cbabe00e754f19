"""The step plan: what runs next on an engine, as pure functions."""
