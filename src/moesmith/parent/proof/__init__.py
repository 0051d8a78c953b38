"""Prove by numbers what the rest of a parent's decoder computes."""
