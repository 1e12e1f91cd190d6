r"""Continual pre-training: go on with the optimiser as if the tasks were one stream. Every other method adds to it.

    theta <- theta + optimiser(grad mean loss(theta, batch))

Memory and compute: none beyond training. Source: the plain baseline of Ibrahim et al., 2403.08763.
"""

from __future__ import annotations

from jaxcl.compose import Part, Setting


def make(setting: Setting) -> Part:
    """Returns a part that adds nothing."""
    del setting
    return Part()
