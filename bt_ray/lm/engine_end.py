"""Loaded by vLLM's core, in its process: it shall not outlive the process that started it.

The core waits for its client for ever where that was killed. On a cluster the raylet ends it; nobody does where the raylet is
lost too, or where there is none. Named as an extension of vLLM's worker, this module is loaded as soon as the core makes its
worker, long before it can answer; nothing else imports it. With tensor parallel workers, which are Ray's actors, the core holds none
and does not load it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any


class EndsWithItsParent:
    """What vLLM finds here; the worker itself needs nothing of it."""


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


if (_parent := multiprocessing.parent_process()) is not None:
    threading.Thread(target=_end_after, args=(_parent,), daemon=True).start()
