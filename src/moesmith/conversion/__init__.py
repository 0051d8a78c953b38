"""A conversion from start to finish, and what it will cost."""
