"""Methods to make a mixture from a dense model, one file each: ``base.py`` says what a method is."""
