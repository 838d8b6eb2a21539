"""Live servers of any engine, as their clients see them."""
