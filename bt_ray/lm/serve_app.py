"""Ray Serve's side of the pool: make, find, scale and delete one application. All of it blocks.

Ray is imported inside functions: the client's module loads without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bt_ray.errors import PoolError
from bt_ray.lm import lease

log = logging.getLogger(__name__)
POLL_S = 0.2


@dataclass(frozen=True)
class AppPlan:
    """One application with one deployment; the deployment's name holds the hash of its config."""

    app_name: str
    deployment_name: str
    replica_class: type
    replica_args: tuple[Any, ...]
    replicas: int
    max_ongoing: int
    num_cpus: float
    gpus: int  # per replica
    resources: Mapping[str, float]  # per replica, beside these


def get_or_create(plan: AppPlan, timeout_s: float) -> None:
    """Deploy unless the same deployment is there and healthy; return when a replica runs. PoolError."""
    from ray import serve
    from ray.serve.api import RunTarget

    _forget_other_clusters()
    found = serve.status().applications.get(plan.app_name)
    if found is not None and plan.deployment_name in found.deployments and found.status in ("RUNNING", "DEPLOYING"):
        return
    # Without this Serve would start an HTTP proxy on every node.
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(
        plan.replica_class,
        name=plan.deployment_name,
        num_replicas=plan.replicas,
        max_ongoing_requests=plan.max_ongoing,
        graceful_shutdown_timeout_s=20,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        **_placement(plan),
    )
    target = RunTarget(deployment.bind(*plan.replica_args), name=plan.app_name, route_prefix=None, external_scaler_enabled=True)
    # Not serve.run: that waits for ever where the cluster lacks the resources.
    serve.run_many([target], wait_for_applications_running=False)
    _wait(lambda: replica_states(plan.app_name).get("RUNNING", 0) > 0, timeout_s, plan.app_name, "no replica started")


def _forget_other_clusters() -> None:
    """Serve keeps its controller's handle over `ray.shutdown()` and tells clusters apart by the driver's job id, which
    is 01000000 for the first driver of each: a second cluster started in this process would be asked for the controller
    of the first. Without a handle it looks the controller up by name."""
    from ray.serve import context

    context._disconnect()


def _placement(plan: AppPlan) -> dict[str, Any]:
    """One GPU belongs to the replica's actor; several make a placement group for the ray executor."""
    own = {"num_cpus": plan.num_cpus, "resources": dict(plan.resources)}
    if plan.gpus <= 1:
        return {"ray_actor_options": {**own, "num_gpus": plan.gpus}}
    bundles = [{"CPU": plan.num_cpus, **plan.resources}, *({"GPU": 1.0} for _ in range(plan.gpus))]
    return {
        "ray_actor_options": own,
        "placement_group_bundles": bundles,
        "placement_group_strategy": "PACK",
    }


def handle(app_name: str) -> Any:
    """The handle that calls go through. PoolError where there is no such application."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_app_handle(app_name)
    except RayServeException as error:
        raise PoolError(f"pool {app_name}: there is no such application ({error}). Deploy it first.") from error


def replica_states(app_name: str) -> dict[str, int]:
    """Replicas by state ("RUNNING", "STARTING", ...). PoolError where the application is gone or broken."""
    from ray import serve

    app = serve.status().applications.get(app_name)
    if app is None:
        raise PoolError(f"pool {app_name}: the application is gone; its lease ran out or it was closed. Deploy it again.")
    states: dict[str, int] = {}
    for deployment in app.deployments.values():
        for state, count in deployment.replica_states.items():
            states[str(getattr(state, "value", state))] = states.get(str(getattr(state, "value", state)), 0) + count
    if app.status == "DEPLOY_FAILED":
        raise PoolError(f"pool {app_name}: replicas cannot start: {app.message}")
    return {state: count for state, count in states.items() if count}


def set_replicas(app_name: str, count: int, timeout_s: float, enough: int | None = None) -> None:
    """Set the number of replicas, keeping those that run, and wait until it is reached, or `enough` of them run. PoolError."""
    import ray
    from ray import serve
    from ray.serve._private.common import DeploymentID
    from ray.serve.context import _get_global_client

    replica_states(app_name)  # says so where the application is gone
    name = next(iter(serve.status().applications[app_name].deployments))
    # Serve's public way to a given count, 0 included, is its REST API, which needs the dashboard; this is
    # the call behind it. `serve.run` with another count would restart every replica.
    controller = _get_global_client()._controller
    ray.get(controller.update_deployment_replicas.remote(DeploymentID(name=name, app_name=app_name), count))

    def reached() -> bool:
        states = replica_states(app_name)
        if enough is not None:
            return states.get("RUNNING", 0) >= enough
        return states.get("RUNNING", 0) == count and sum(states.values()) == count

    _wait(reached, timeout_s, app_name, f"not scaled to {count} replicas")


def delete(app_name: str) -> None:
    """Delete the application and its lease; fine if it is gone already."""
    from ray import serve

    if app_name in serve.status().applications:
        serve.delete(app_name)
    lease.drop(app_name)


def delete_family(app_name: str) -> None:
    """Delete the application and those of models beside it, whose names go on where its own ends."""
    from ray import serve

    for name in serve.status().applications:
        if name.startswith(f"{app_name}-"):
            delete(name)
    delete(app_name)


def infrastructure_errors() -> tuple[type[BaseException], ...]:
    """What a lost, replaced or overloaded replica looks like to a caller. Never raised by an engine's answer."""
    from ray.exceptions import RayActorError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

    return (RayActorError, TaskCancelledError, BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError)


def _wait(done: Callable[[], bool], timeout_s: float, app_name: str, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() >= deadline_s:
            raise PoolError(
                f"pool {app_name}: {what} within {timeout_s:g} s (states: {replica_states(app_name) or 'none'}). "
                "`ray status` shows what resources are missing."
            )
        time.sleep(POLL_S)
