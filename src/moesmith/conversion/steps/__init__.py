"""What each stage of a conversion does."""
