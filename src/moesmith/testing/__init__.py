"""Tiny parents, random carvings and text, for tests and benchmarks, here and of methods that others write."""
