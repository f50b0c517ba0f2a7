"""A lease on a pool: a value in Ray's own key-value store that somebody alive keeps changing.

No clock is compared between machines: a reader measures on its own clock for how long the value
stayed the same. A file would need shared storage, an actor a process.
"""

from __future__ import annotations

import time
import uuid


def _key(app_name: str) -> bytes:
    return f"bt_ray:lease:{app_name}".encode()


def renew(app_name: str) -> None:
    """Say that the pool `app_name` is still wanted. Needs a connected Ray."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_key(app_name), uuid.uuid4().bytes, overwrite=True)


def drop(app_name: str) -> None:
    """Remove the lease's entry, when the pool is closed."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(_key(app_name))


def read(app_name: str) -> bytes | None:
    """The lease's present value; any change means a renewal."""
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(_key(app_name))


class Watch:
    """Tells for how many seconds a value has not changed, on this process's clock."""

    def __init__(self, now_s: float | None = None) -> None:
        self._value: bytes | None = None
        self._since_s = time.monotonic() if now_s is None else now_s

    def unchanged_s(self, value: bytes | None, now_s: float) -> float:
        """Seconds since `value` last differed from the one before."""
        if value != self._value:
            self._value, self._since_s = value, now_s
        return now_s - self._since_s
