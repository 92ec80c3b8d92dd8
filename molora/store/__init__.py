"""What is on disk: atomic folders, base fingerprints, adapters, LoRA import and export, runs."""
