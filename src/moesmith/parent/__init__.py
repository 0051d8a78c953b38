"""Load a dense parent, examine it, prove what it computes, and run it whole or one layer at a time."""
