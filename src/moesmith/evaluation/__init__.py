"""Measure a model: perplexity, tasks, routing."""
