"""Grade-school mathematics with one chain of thought."""

from __future__ import annotations

from bt_ray.tasks.gsm8k.metric import last_number_matches
from bt_ray.tasks.gsm8k.program import GSM8K

__all__ = ["GSM8K", "last_number_matches"]
