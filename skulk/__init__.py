"""Skulk: one LLM cluster out of the unlike machines of a home or an office."""

__version__ = "0.1.0"
