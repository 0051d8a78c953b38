"""The dense side: a parent is loaded, examined, proved, and run whole or one layer at a time."""
