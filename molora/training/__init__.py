"""Training: build a model from a recipe, fit it with Lightning, checkpoint and resume it exactly."""
