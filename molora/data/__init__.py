"""Data: records and their sources, tasks with stable ids, prompts, batches and the resumable loader."""
