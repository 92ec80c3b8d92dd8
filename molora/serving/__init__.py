"""A trained mixture that answers."""
