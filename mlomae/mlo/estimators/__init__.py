"""Estimators of the influence by the name that ``hypergradient.estimator`` gives them."""

from __future__ import annotations

from mlomae.mlo.estimators.exact import double_backward
from mlomae.mlo.estimators.fd import central_difference
from mlomae.mlo.estimators.fd_forward import forward_difference
from mlomae.mlo.estimators.jvp import forward_mode
from mlomae.mlo.influence import Estimator

ESTIMATORS: dict[str, Estimator] = {
    "fd": central_difference,
    "fd-forward": forward_difference,
    "jvp": forward_mode,
    "exact": double_backward,
}
TRUNCATION_ORDER = {"fd": 2, "fd-forward": 1}
"""Power of the radius with which a finite difference's truncation error grows."""
