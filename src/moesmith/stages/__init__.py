"""The bodies of the stages, in the order of a conversion; ``conversion.py`` strings them together."""
