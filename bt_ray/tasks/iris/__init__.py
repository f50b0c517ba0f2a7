"""Name the species of an iris from four measurements, with one chain of thought."""

from __future__ import annotations

from bt_ray.tasks.iris.metric import exact_species
from bt_ray.tasks.iris.program import Iris

__all__ = ["Iris", "exact_species"]
