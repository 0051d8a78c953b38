"""Load parents from GGUF files."""
