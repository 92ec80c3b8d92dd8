"""Base models: loading, quantisation, heads."""
