"""Turn text into records, domains, windows and blocks of tokens."""
