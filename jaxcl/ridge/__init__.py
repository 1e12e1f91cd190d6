"""Analytic continual learning: a ridge regression on frozen features that never forgets, in float32 of known error."""

METHODS = ("acil", "aef_ocl", "air", "ds_al", "fecam", "gkeal", "nmc", "ranpac", "slda")  # the head is solved for
