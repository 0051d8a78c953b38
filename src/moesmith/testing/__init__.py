"""Make tiny parents, random carvings and text, for tests and benchmarks here and for methods that others write."""
