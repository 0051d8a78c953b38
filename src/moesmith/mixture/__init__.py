"""The carving, and the models that it describes."""
