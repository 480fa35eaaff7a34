"""Orders: their money reserved, moved as they are filled, and given back."""
