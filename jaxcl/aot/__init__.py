"""Ahead of time: the train step of a config, compiled for accelerators that are not here."""
