"""Talk to a finished model in the terminal."""
