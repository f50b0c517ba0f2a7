"""The helpdesk program on real customers' messages: eight intents of Banking77."""

from __future__ import annotations

from bt_ray.tasks.banking8.metric import exact_intent
from bt_ray.tasks.banking8.program import DEPARTMENTS, Banking8

__all__ = ["DEPARTMENTS", "Banking8", "exact_intent"]
