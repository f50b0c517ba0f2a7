"""What a run leaves on a cluster that goes on without it: nothing."""

from __future__ import annotations

import time

RAYS_OWN = ("ActorLocationTracker", "_AutoscalingCoordinatorActor", "_StatsActor")  # Ray Data's, one of each on a cluster
END_TIMEOUT_S = 60.0


def what_is_left(beside: str = "") -> dict[str, set[str]]:
    """Applications, actors and placement groups on the connected cluster that are neither Ray's own nor those of somebody
    else's application `beside`."""
    import ray
    from ray import serve
    from ray.util.state import list_actors

    address = f"http://{ray._private.worker.get_dashboard_url()}"
    actors = {actor.class_name for actor in list_actors(address, filters=[("state", "=", "ALIVE")], limit=1000)}
    groups = {name for name, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}
    apps = set(serve.status().applications)
    assert not beside or beside in apps, "it was taken down"
    others = {name for name in actors if beside and name.startswith(f"ServeReplica:{beside}:")}
    return {"apps": apps - {beside}, "actors": actors - {"ServeController", *RAYS_OWN} - others, "groups": groups}


def assert_nothing_is_left(beside: str = "") -> None:
    """Soon at least: actors end after their jobs."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while any((left := what_is_left(beside)).values()) and time.monotonic() < deadline:
        time.sleep(1.0)
    assert not any(left.values()), left
