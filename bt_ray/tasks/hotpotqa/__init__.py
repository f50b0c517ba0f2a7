"""Multi-hop questions: query, retrieve, query, retrieve, answer."""

from __future__ import annotations

from bt_ray.tasks.hotpotqa.metric import exact_answer
from bt_ray.tasks.hotpotqa.program import HotpotQA

__all__ = ["HotpotQA", "exact_answer"]
