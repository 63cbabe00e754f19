"""Answers held to a grammar in GBNF, llama.cpp's notation. Pure Python and numpy; knows no engine."""
