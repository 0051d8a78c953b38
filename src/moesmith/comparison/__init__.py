"""Many conversions of one parent on one footing: a specification, its runs, one table."""
