"""Engines: what computes tokens. One protocol, one package each; the only users of llama_cpp and mlx."""
