"""One loop for every training stage, and its losses."""
