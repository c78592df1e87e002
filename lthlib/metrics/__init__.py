"""Metrics, a folder a dimension: functions of arrays or networks, the rows that describe them, one ``measure``.

`METRICS` holds every row. What is useful without a ticket is offered here: ``lthlib.metrics.ece(probs, labels)``.
"""

from __future__ import annotations

import importlib
import pkgutil

from lthlib.core.errors import suggest
from lthlib.metrics.registry import METRICS, Metric, Value, computed, metric

__all__ = ["METRICS", "Metric", "Value", "computed", "metric"]

FUNCTIONS = {
    "arrays": "softmax",
    "generalization.accuracy": "accuracy true_class_margin",
    "generalization.ood": "msp_score max_logit_score energy_score roc_auc aupr fpr_at_tpr",
    "generalization.corruption": "corruption_error relative_corruption_error",
    "generalization.attacks": "fgsm pgd adversarial_logits",
    "calibration.errors": "ece ece_lthpass sce adaptive_ece ace reliability_diagram",
    "calibration.scores": "nll brier brier_decomposition temperature_scaling",
    "calibration.intervals": "bootstrap_intervals",
    "interpretability.lime": "explain fidelity_stability",
    "interpretability.expo": "expo",
    "interpretability.measure": "dissect",
    "flatness.exact": "hessian_trace",
}


def __getattr__(name: str) -> object:
    for module, names in FUNCTIONS.items():
        if name in names.split():
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    offered = sorted(" ".join(FUNCTIONS.values()).split())
    raise AttributeError(f"lthlib.metrics has no {name!r}.{suggest(name, offered)} Functions: {', '.join(offered)}.")


for _module in pkgutil.walk_packages(__path__, f"{__name__}."):  # each file registers its rows
    importlib.import_module(_module.name)
