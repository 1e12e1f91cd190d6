"""Hugging Face checkpoints in and out: see `families` for the names, `read` and `write` for the files."""
