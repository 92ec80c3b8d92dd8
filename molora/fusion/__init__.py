"""Fusing adapters: many experts become one ordinary LoRA, exact on products."""
