"""Prove by numbers what a parent's decoder computes apart from its feed-forward networks."""
