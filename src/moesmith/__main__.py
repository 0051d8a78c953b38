"""``python -m moesmith``: the same as the command ``moesmith``."""

from moesmith.cli import main

if __name__ == "__main__":
    main()
