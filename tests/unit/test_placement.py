"""What Serve is asked for, for an engine on one GPU and on several."""

from __future__ import annotations

import pytest

from bt_ray.lm.serve_app import AppPlan, _placement


def plan(gpus: int) -> AppPlan:
    return AppPlan("app", "engine", object, (), 1, 64, num_cpus=2.0, gpus=gpus, resources={"engines": 1.0})


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_gpu_is_the_actors_own(gpus: int) -> None:
    assert _placement(plan(gpus)) == {"ray_actor_options": {"num_cpus": 2.0, "num_gpus": gpus, "resources": {"engines": 1.0}}}


def test_two_gpus_are_bundles_of_a_group_that_is_packed_whose_first_holds_the_actor_and_what_has_a_name() -> None:
    assert _placement(plan(2)) == {
        "ray_actor_options": {"num_cpus": 2.0, "resources": {"engines": 1.0}},
        "placement_group_bundles": [{"CPU": 2.0, "engines": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}],
        "placement_group_strategy": "PACK",
    }
