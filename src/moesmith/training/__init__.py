"""Train every stage with one loop and its losses."""
