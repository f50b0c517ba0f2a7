"""bt_ray: alternate prompt search and fine-tuning of LM programs, on Ray.

`import bt_ray` loads neither torch, vllm nor ray; the names below load on first use.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["BetterTogether", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "BetterTogether":
        from bt_ray.better_together import BetterTogether

        return BetterTogether
    raise AttributeError(f"module 'bt_ray' has no attribute {name!r}")
