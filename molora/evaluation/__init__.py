"""Measuring a mixture: metrics, the task runner, what the gates did, and the report."""
