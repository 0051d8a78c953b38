"""Exports: a carving as files that other software loads, verified by logits. One target per file."""
