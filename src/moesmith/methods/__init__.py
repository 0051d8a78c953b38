"""Ways to make a mixture of a dense model, one file each: see ``base.py`` for what a method is."""
