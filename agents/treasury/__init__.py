"""Treasury: what the company can still extend at once."""
