"""Route a bank customer's message: department first, then intent. Only the intent is labelled."""

from __future__ import annotations

from bt_ray.tasks.helpdesk.metric import exact_intent
from bt_ray.tasks.helpdesk.program import DEPARTMENTS, Helpdesk

__all__ = ["DEPARTMENTS", "Helpdesk", "exact_intent"]
