"""Analytic continual learning: a ridge regression on frozen features that never forgets, in float32 of known error."""
