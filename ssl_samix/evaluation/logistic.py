"""Scikit-learn's logistic regression on scaled features, and what it fitted in terms of torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssl_samix.evaluation.linear_heads import Examples, Scaling


def matrix(data: Examples) -> tuple[Any, Any]:
    """Return (n, D) float32 features of variance 1 and (n,) labels, for scikit-learn."""
    x, labels = (torch.cat(part) for part in zip(*data.in_order(), strict=True))
    return x.mul_(math.sqrt(x.shape[1])).cpu().numpy(), labels.cpu().numpy()


def fit(model: Any, x: Any, labels: Any) -> bool:
    """Fit, and return whether lbfgs converged; it only warns if not."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, labels)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def answers(model: Any) -> Callable[[Tensor], Tensor]:
    """Turn a fitted model into a map from scaled features (B, D) to logits (B, 1, C)."""

    def classify(x: Tensor) -> Tensor:
        scaled = (x * math.sqrt(x.shape[1])).cpu().numpy()
        logits = torch.from_numpy(model.decision_function(scaled)).to(x.device)
        if logits.ndim == 1:  # of two classes, scikit-learn gives the second one's log-odds
            logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
        return logits[:, None]

    return classify


def folded(model: Any, scaling: Scaling) -> nn.Linear:
    """Return a fitted model and the scaling before it as one layer on the CPU."""
    weight, bias = (torch.from_numpy(part).double() for part in (model.coef_, model.intercept_))
    if len(weight) == 1:  # of two classes, scikit-learn has the second one's log-odds
        weight, bias = (torch.cat([torch.zeros_like(part), part]) for part in (weight, bias))
    weight = weight * scaling.factor.cpu() * math.sqrt(weight.shape[1])
    # Without first weights of its own: those would take from the random numbers of what follows.
    head: nn.Linear = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias - weight @ scaling.shift.cpu())
    return head
