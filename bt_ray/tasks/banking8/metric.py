"""The metric is the helpdesk's: the data has the same label field."""

from __future__ import annotations

from bt_ray.tasks.helpdesk.metric import exact_intent

__all__ = ["exact_intent"]
