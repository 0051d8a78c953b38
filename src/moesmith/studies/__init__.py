"""Studies: the papers' own questions, each a command, figures and a page."""
