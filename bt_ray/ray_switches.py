"""Switches of `ray.init` that it has no argument for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from bt_ray.environment import environment


def read_ray_switches() -> None:
    """Let ray read its environment variables and its token again: it did at its import, and keeps what it read."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def own_node() -> Iterator[None]:
    """Let `ray.init` start a node whose job agent takes any free port, since its fixed one is taken where a second
    cluster runs on the machine, and which has no log monitor, since no driver of ours asks for workers' logs."""
    from ray._private import parameter

    original = parameter.RayParams
    parameter.RayParams = partial(original, dashboard_agent_listen_port=0, include_log_monitor=False)
    try:
        yield
    finally:
        parameter.RayParams = original


@contextmanager
def loopback_only() -> Iterator[None]:
    """Let `ray.init` bind its processes to 127.0.0.1, as it does on macOS and Windows: on Linux it takes the
    host's address, and rewrites a 127.0.0.1 that it is given. The constant is for this process, where ray may
    be imported already; the variable for those that it starts."""
    from ray._private import ray_constants

    original = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = original
