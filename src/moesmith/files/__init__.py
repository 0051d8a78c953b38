"""Write files whole or not at all, only where a command may write, with one process in a folder."""
