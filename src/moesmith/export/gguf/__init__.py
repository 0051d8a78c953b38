"""GGUF files, and llama.cpp."""
