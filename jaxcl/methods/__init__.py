"""Continual-learning methods: one algorithm per file, each with `make(setting, **options)`."""
