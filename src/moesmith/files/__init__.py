"""Files that appear whole or not at all, where a command may write, and one process in a folder."""
