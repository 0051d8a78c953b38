"""Parents in GGUF files."""
