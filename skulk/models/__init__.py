"""Models: what they are, where their files lie, and whether they are whole; the only reader of headers and cards."""
