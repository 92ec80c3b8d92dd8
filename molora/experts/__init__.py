"""Experts: the stacked bank, its kernel and its initialisation."""
