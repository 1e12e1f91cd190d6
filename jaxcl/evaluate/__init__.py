"""Evaluation of runs and checkpoints on tasks in files; `python -m jaxcl.evaluate RUN --tasks=...`."""
