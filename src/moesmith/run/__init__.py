"""Everything about a run's folder."""
