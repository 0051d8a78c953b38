"""Measurements of a model: perplexity, tasks, routing."""
