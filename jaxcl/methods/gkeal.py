r"""GKEAL: ridge regression in the features of a Gaussian kernel, for tasks of few rows.

    x_i = exp(-|f - c_i|^2 / (2 sigma^2))         f: features of the frozen network; c_i: fixed centres
    W = (X^T X + gamma I)^-1 X^T Y                all rows so far, as in ACIL

Source: Zhuang et al. 2023 ("GKEAL: Gaussian kernel embedded analytic learning for few-shot class incremental task").
Needs config.adapter = dict(name='analytic', expansion='gaussian', width=..., sigma=...); published sigmas are 5 to 15.
Memory and compute are those of `acil`.

Deviations. Centres are features of rows that are drawn from all of the first task; the published code permutes its
first rows alone, which are of one class where rows are sorted, and where it has fewer rows than centres it divides by
sums near zero. Augmented rows of the first task (augmented feature concatenation) are not made here: give the source
more rows.
"""

from __future__ import annotations

from typing import Literal

from jaxcl.compose import Setting
from jaxcl.methods import acil
from jaxcl.ridge import learner
from jaxcl.schema import UserError
from jaxcl.types import Method


def make(
    setting: Setting,
    *,
    gamma: float | Literal["gcv", "loo"] = 0.1,
    every: int | None = None,
    how: Literal["auto", "solve", "refresh", "recursion"] = "auto",
) -> Method:
    """Returns the complete method.

    Args:
      setting: of the run, with a model that has a head in closed form over a Gaussian expansion.
      gamma, every, how: as for `acil`.

    Raises:
      UserError: an option out of range, or another model.
    """
    made = learner.analytic_of(setting, "gkeal")
    if made.expansion != "gaussian":
        raise UserError(f"config.adapter.expansion={made.expansion!r}: 'gkeal' is of a kernel; set it to 'gaussian'")
    learner.check_gammas("gkeal", gamma, learner.GAMMAS)
    learner.check_every("gkeal", every)
    return acil.make(setting, gamma=gamma, every=every, how=how)


def merger(*, gamma: float | str = 0.1, **_: object) -> learner.Merger:
    """Returns what adds what two runs keep; see `jaxcl.compose.merger`."""
    learner.check_sums("gkeal", gamma)
    return acil.merger(gamma=gamma)


def explain(setting: Setting, **options: object) -> str:
    """Returns how the weights are come by, and why."""
    return acil.explain(setting, **options)  # type: ignore[arg-type]
