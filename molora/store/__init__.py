"""Adapters, ordinary LoRAs and runs on disk: save, load, import, export, compose."""
