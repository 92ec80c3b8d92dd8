"""Showing results to people: terminal tables, pictures, and a one-file HTML page."""
