"""Folders written completely or not at all: atomic replacement, manifests, fingerprints, cards."""
