"""What vLLM's process gets from us: that it does not outlive the process that started it.

vLLM's core waits for its client for ever where that was killed. On a cluster the raylet ends it; nobody does where the
raylet is lost too, or where there is none.
"""

from __future__ import annotations

import os
import threading
import time

LOOK_S = 1.0


class EndsWithItsParent:
    """An extension of vLLM's worker, which lives in the core's process (but for tensor parallel workers, which Ray ends)."""

    def end_with_parent(self, parent: int) -> None:
        """From now on, end this process once `parent`, which started it, is gone. Does nothing in any other process."""
        if os.getppid() == parent:
            threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
