"""llama.cpp as an engine: GGUF models through the low-level API of llama-cpp-python, several sequences in one batch."""
