"""Statistics of a parent over calibration text, one layer at a time."""
