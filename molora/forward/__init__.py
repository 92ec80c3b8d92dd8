"""What one forward pass does: the layers' experts, gates and losses at work."""
