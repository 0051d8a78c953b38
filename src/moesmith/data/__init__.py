"""Text: records, domains, windows and blocks of tokens."""
