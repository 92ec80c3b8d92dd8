"""Folders that are whole or absent: atomic replacement, manifests, fingerprints, cards."""
