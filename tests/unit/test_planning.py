"""The plan of a run, what became of it, and which stages may start."""

import io
import re
from dataclasses import asdict

import pytest
from rich.console import Console

from bt_ray import console, planning, running
from bt_ray.cli import _parser
from bt_ray.cluster import stage_runtime_env
from bt_ray.config import ClusterConfig
from bt_ray.errors import RunDirError
from bt_ray.report import facts, text
from bt_ray.report.build import build_report
from bt_ray.report.estimate import estimates
from bt_ray.resources import demand, grown, local_cpus, refusal
from bt_ray.running import keep_plan
from bt_ray.runs.run_dir import RunDir
from tests.support.plans import PROBE, SIZES, config, nodes, pending, planned, shipped
from tests.support.report_facts import demo_facts


def printed(shown):
    out = io.StringIO()
    text.render_plan(shown, Console(file=out, width=120, no_color=True))
    return out.getvalue()


def test_the_plan_in_the_terminal():
    found = {name: asdict(value) for name, value in planned("helpdesk", probe=PROBE).items()}
    found["p.w"]["memory_gib"] = 3.4
    shown = printed({"stages": pending(shipped("helpdesk")), "estimates": found})
    assert "p  about 1 090 LM calls (at most 1 218), 183 k + 5 368 tokens, 1 min 55 s" in shown
    assert "w  about 66 LM calls, 4 620 + 330 tokens, " in shown
    assert "test  LM calls unknown (at most 1 230)" in shown  # whether searches keep their prompts decides a fifth of them
    assert "Together about 3 990 LM calls (at most 4 442), " in shown and "peak 3.4" in shown


def test_without_a_probe_the_time_is_unknown_and_its_range_is_said():
    found = {name: asdict(value) for name, value in planned("helpdesk").items()}
    shown = printed({"stages": pending(shipped("helpdesk")), "estimates": found})
    whole = " ".join(shown.split())
    assert len(re.findall(r"time unknown \(likely (?:\d+ min )?\d+ s to \d+ min \d+ s\)", whole)) == len(found)
    assert "of work" not in whole


def test_what_is_unknown_is_said():
    plan = config(steps={"p": {"optimizer": "dspy.SIMBA"}, "w": {"method": "sft"}}, strategy="p -> w")
    found = {name: asdict(value) for name, value in estimates(nodes(plan), plan, SIZES, PROBE).items()}
    shown = printed({"stages": pending(plan), "estimates": found})
    assert "p  LM calls unknown, tokens unknown, time unknown" in shown and "What is unknown is not counted." in shown


@pytest.fixture
def run(tmp_path):
    row = {"id": "a", "inputs": {"x": 1}, "labels": {"y": 1}}
    splits = {"train": [row] * 64, "search": [row] * 32, "select": [row] * 32, "test": [row] * 96}
    identity = {
        "follow": "a", "weights": {"model_dir": str(tmp_path)},
        "signatures": {name: {"inputs": ["x"], "outputs": ["z"]} for name in ("one", "two")},
    }  # fmt: skip
    made = RunDir(tmp_path / "run")
    made.create(config(strategy="p"), identity, splits)
    return made


def test_a_run_keeps_the_plan_that_it_began_with(run):
    assert facts.collect(run)["plan"] is None
    keep_plan(run)
    first = run.plan()
    most = {name: entry["lm_calls_at_most"] for name, entry in first.items()}
    assert most == {"vanilla": 66, "p": 834, "final": 2 * 194 + 66, "in all": 66 + 834 + 2 * 194 + 66}
    assert first["p"]["lm_calls"] < 834
    run.write_header(config(strategy=["p", "p -> w"], rollout={"samples": 3}), run.header()["identity"])
    keep_plan(run)
    second = run.plan()
    assert second["p"] == first["p"] and second["p.w"]["lm_calls_at_most"] == 64 * 3 * 2 + 2 * 66
    assert second["final"]["lm_calls_at_most"] == 3 * 194 + 66
    assert second["in all"]["lm_calls_at_most"] > first["in all"]["lm_calls_at_most"]
    assert facts.collect(run)["estimates"]["p"] == first["p"]


def test_two_that_write_the_plan_at_once_keep_each_others_entries(run, monkeypatch):
    """Another process adds its stage after this one has looked, and before it has the lock."""

    class Slow(running.RunLock):
        def __enter__(self):
            run.write_plan({"w": {"lm_calls": 7}, "p": {"lm_calls": 8}})
            return super().__enter__()

    monkeypatch.setattr(running, "RunLock", Slow)
    keep_plan(run)
    found = run.plan()
    assert found.keys() == {"vanilla", "p", "w", "final", "in all"}
    assert (found["vanilla"]["lm_calls"], found["p"], found["w"]) == (66, {"lm_calls": 8}, {"lm_calls": 7})


def test_the_plan_of_a_run_that_another_driver_holds_is_left_alone(run):
    with running.RunLock(run.root), pytest.raises(RunDirError, match="a run has one driver"):
        keep_plan(run)
    assert run.plan() is None


def test_run_writes_the_plan_before_it_starts(run, monkeypatch):
    class Interrupted:
        def __init__(self, *arguments):
            assert run.plan() is not None

        def execute(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(console, "prepare_in", lambda config, run: None)
    monkeypatch.setattr(console, "open_run", lambda root, prepared: run)
    monkeypatch.setattr(running, "Driver", Interrupted)
    assert console.run_with_view(run.config(), run.root, plain=True, command="bt-ray run") == 130


def test_the_report_says_how_far_the_plan_was_off():
    found = demo_facts()
    entry = {"lm_calls": 900, "prompt_tokens": None, "completion_tokens": None, "seconds": 390.0}
    found["plan"] = {
        "p": entry,
        "w.w": entry,
        "gone": entry,
        "final": {**entry, "lm_calls": 1000, "prompt_tokens": 90, "completion_tokens": 10},
    }
    found["final_cost"] = {"lm_calls": 800, "prompt_tokens": 150, "completion_tokens": 50, "seconds": 0.0}
    of = {stage["id"]: stage for stage in found["stages"]}
    of["w.w"]["status"] = "running"
    plan = {row["id"]: row for row in build_report(found)["plan"]}
    assert plan["in all"]["lm_calls"] == {"planned": 1900, "actual": 1520, "error": 0.25}
    assert plan["p"]["lm_calls"] == {"planned": 900, "actual": 720, "error": 0.25}
    assert plan["p"]["seconds"] == {"planned": 390.0, "actual": 195.0, "error": 1.0}
    assert plan["p"]["tokens"]["planned"] is None and plan["p"]["tokens"]["error"] is None
    assert plan["w.w"]["lm_calls"]["actual"] is None
    assert plan["final"]["tokens"] == {"planned": 100, "actual": 200, "error": -0.5}
    out = io.StringIO()
    text.render_report(build_report(found), found, Console(file=out, width=150))
    shown = out.getvalue()
    assert "Estimate: calls +25 %, tokens unknown, time +300 % (planned before the run, against what it took)" in shown
    assert "  p: calls +25 %, tokens unknown, time +100 %\n  test: calls +25 %, tokens -50 %, time –\n" in shown
    assert build_report(demo_facts())["plan"] == []


def test_the_verb_probes_unless_told_not_to():
    assert _parser().parse_args(["plan", "c.yaml"]).probe is True
    assert _parser().parse_args(["plan", "c.yaml", "--no-probe"]).probe is False


# Which stages may start, and who has the GPUs


def test_ready_waits_for_parents_and_for_room():
    all_nodes = nodes()
    assert [n.id for n in planning.ready(all_nodes, {}, 4)] == ["vanilla"]
    assert [n.id for n in planning.ready(all_nodes, {"vanilla": "running"}, 4)] == []
    assert [n.id for n in planning.ready(all_nodes, {"vanilla": "done"}, 4)] == ["p", "w"]
    assert [n.id for n in planning.ready(all_nodes, {"vanilla": "done"}, 1)] == ["p"]
    assert [n.id for n in planning.ready(all_nodes, {"vanilla": "done", "p": "running"}, 1)] == []


def test_stages_behind_a_skipped_one_never_start():
    states = {"vanilla": "done", "p": "failed", "w": "done"}
    assert [n.id for n in planning.blocked(nodes(), states)] == ["p.w"]
    assert planning.ready(nodes(), states, 4) == []


def test_local_cluster_size():
    assert local_cpus(ClusterConfig(), cores=1) == 4
    assert local_cpus(ClusterConfig(), cores=8) == 16
    assert local_cpus(ClusterConfig(num_cpus=3), cores=8) == 3


def test_what_never_fits_is_said_in_a_sentence():
    assert refusal(config(), {"CPU": 4.0}) is None
    two_gpus = config(engine={"tensor_parallel_size": 2})
    assert "asks for 2 GPUs" in refusal(two_gpus, {"CPU": 16.0, "GPU": 1.0})
    assert refusal(two_gpus, {"CPU": 16.0, "GPU": 2.0}) is None
    many = config(engine={"replicas": {"min": 8, "max": 8}})
    assert "8.5 logical CPUs" in refusal(many, {"CPU": 4.0}) or "logical CPUs" in refusal(many, {"CPU": 4.0})
    assert "8 GPUs" in refusal(many, {"CPU": 64.0, "GPU": 4.0})
    wide = config(steps={"w": {"method": "sft", "num_workers": 8, "global_batch_size": 8}}, strategy="w")
    assert "Lower num_workers" in refusal(wide, {"CPU": 4.0})
    assert demand(wide, has_gpu=False).train_cpus == 8.0


def test_engines_of_several_models_share_the_gpus():
    models = {"small": {"model": "a/b", "engine": {"replicas": {"min": 1, "max": 8}}}}
    two = config(engine={"replicas": {"min": 1, "max": 8}, "tensor_parallel_size": 2}, models=models, assign={"one": "small"})
    assert planning.engine_counts(two, {"GPU": 3.0}) == {"": 1, "small": 1}
    assert planning.engine_counts(two, {"GPU": 8.0}) == {"": 3, "small": 2}
    assert planning.engine_counts(two, {"CPU": 8.0}) == {"": 1, "small": 1}
    assert (planning.held_devices(two, {"GPU": 8.0}), planning.held_devices(two, {"CPU": 8.0})) == (8, 3)
    asking = {"optimizer": "opro", "proposer": {"model": "c/d", "engine": {"tensor_parallel_size": 2}}}
    beside = config(engine={"replicas": {"min": 1, "max": 8}}, steps={"p": asking}, strategy="p")
    assert planning.engine_counts(beside, {"GPU": 8.0}) == {"": 6}, "the proposer's engine needs two"


def test_engines_of_several_models_share_named_resources():
    engine = {"replicas": {"min": 1, "max": 3}, "resources": {"engines": 0.1}}
    two = config(engine=engine, models={"small": {"model": "a/b"}}, assign={"one": "small"})
    assert planning.engine_counts(two, {"CPU": 8.0, "engines": 0.3}) == {"": 2, "small": 1}
    assert planning.num_replicas(two.engine, {"engines": 0.3}) == 3, "0.3 / 0.1 is below 3 in floating point"
    assert "engine.resources asks for 0.2 of 'engines'" in refusal(two, {"CPU": 8.0, "engines": 0.1})
    assert refusal(two, {"CPU": 8.0, "engines": 0.2}) is None


def test_a_named_resource_that_no_node_has_is_refused_by_name():
    asks = config(
        engine={"replicas": {"min": 2, "max": 2}, "resources": {"engines": 1}},
        steps={"w": {"method": "sft", "resources": {"trainers": 1}}},
        strategy="w",
    )
    assert refusal(asks, {"CPU": 8.0, "engines": 2.0, "trainers": 1.0}) is None
    assert "engine.resources asks for 2 of 'engines', and the cluster has 1 at most" in refusal(
        asks, {"CPU": 8.0, "engines": 1.0}
    )
    assert "steps.w.resources asks for 1 of 'trainers'" in refusal(asks, {"CPU": 8.0, "engines": 2.0})


def test_a_piece_that_no_one_node_can_hold_is_refused():
    asks = config(
        engine={"num_cpus": 6, "resources": {"engines": 1}},
        steps={"w": {"method": "sft", "resources": {"trainers": 1}}},
        strategy="w",
    )
    reach = {"CPU": 16.0, "GPU": 3.0, "engines": 2.0, "trainers": 1.0}
    head, train = {"CPU": 8.0}, {"CPU": 4.0, "GPU": 1.0, "trainers": 1.0}
    assert refusal(asks, reach, [head, {"CPU": 6.0, "GPU": 1.0, "engines": 1.0}, train]) is None
    assert refusal(asks, reach) is None, "without shapes the total is all that is known"
    small = refusal(asks, reach, [head, {"CPU": 4.0, "GPU": 1.0, "engines": 1.0}, train])
    assert "engine asks for CPU 6, GPU 1, engines 1 on one node, and no node of the cluster has that" in small
    no_gpu = refusal(asks, reach, [head, {"CPU": 6.0, "GPU": 1.0, "engines": 1.0}, {"CPU": 4.0, "trainers": 1.0}])
    assert "steps.w: a training worker asks for GPU 1, trainers 1 on one node" in no_gpu
    parallel = config(engine={"tensor_parallel_size": 2})
    assert refusal(parallel, {"CPU": 8.0, "GPU": 2.0}, [{"CPU": 4.0, "GPU": 1.0}]) is None, "its GPUs may lie on two nodes"


def test_engines_follow_the_gpus_within_their_range():
    engine = config(engine={"replicas": {"min": 1, "max": 4}, "tensor_parallel_size": 2}).engine
    assert [planning.num_replicas(engine, {"GPU": gpus}) for gpus in (0, 2, 6, 64)] == [1, 1, 3, 4]
    named = config(engine={"replicas": {"min": 0, "max": 3}, "resources": {"engines": 1, "disk": 2}}).engine
    reach = {"CPU": 64.0, "engines": 8.0}
    assert [planning.num_replicas(named, {**reach, "disk": disk}) for disk in (0.0, 4.0, 64.0)] == [1, 2, 3]
    assert planning.num_replicas(named, {**reach, "disk": 64.0, "GPU": 1.0}) == 1


def test_program_workers_follow_the_engines_on_half_of_the_cpus_beside_them():
    many = config(engine={"replicas": {"min": 1, "max": 64}})
    found = [
        planning.num_program_workers(many, {"CPU": cpus, "GPU": gpus}) for gpus, cpus in ((0, 4), (8, 64), (64, 512), (64, 80))
    ]
    assert found == [1, 8, 64, 16], "64 engines take 64 of the 80"
    assert planning.num_program_workers(many, {}) == 1
    prompts = {name: {"optimizer": "labeled"} for name in "pq"}
    side_by_side = config(engine={"replicas": {"min": 1, "max": 8}}, steps=prompts, strategy=["p", "q"])
    assert planning.num_program_workers(side_by_side, {"CPU": 16.0, "GPU": 8.0}) == 4, "two stages at once"
    set_by_hand = config(engine={"replicas": {"min": 1, "max": 64}}, cluster={"program_workers": 3})
    assert planning.num_program_workers(set_by_hand, {"CPU": 512.0, "GPU": 64.0}) == 3


def test_a_cluster_counts_as_large_as_its_autoscaler_can_make_it():
    idle = {"CPU": 8.0, "memory": 3.0}
    assert grown(idle, {"CPU": 136, "GPU": 12}) == {"CPU": 136.0, "GPU": 12.0, "memory": 3.0}
    assert grown(idle, {}) == idle
    assert grown({"GPU": 2.0}, {"GPU": 1}) == {"GPU": 2.0}  # a node that the autoscaler does not know


def test_a_stage_job_takes_over_the_working_directory_and_environment_of_the_drivers_job():
    own = {
        "working_dir": "gcs://_ray_pkg_1.zip",
        "pip": ["x==1"],
        "env_vars": {"MINE": "1", "RAY_DEDUP_LOGS": "1"},
        "_private": 3,
    }
    found = stage_runtime_env(own)
    assert {name: found[name] for name in ("working_dir", "pip")} == {"working_dir": "gcs://_ray_pkg_1.zip", "pip": ["x==1"]}
    assert found["env_vars"]["MINE"] == "1" and found["env_vars"]["RAY_DEDUP_LOGS"] == "0" and "_private" not in found
    assert stage_runtime_env({}).keys() == {"env_vars"}


PACKAGES = [
    {"py_modules": ["gcs://_ray_pkg_2.zip", "s3://bucket/mine.whl"]},
    {"pip": ["mine==1.2", "other"]},
    {"pip": {"packages": ["mine==1.2"], "pip_check": True, "pip_version": "==25.0"}},
    {"uv": ["mine==1.2"]},
    {"conda": {"dependencies": ["pip", {"pip": ["mine==1.2"]}]}},
    {"py_executable": "uv run --with mine python"},
    {"pip": ["mine==1.2"], "config": {"setup_timeout_seconds": 1800}},
]


@pytest.mark.parametrize("packages", PACKAGES, ids=lambda one: "+".join(one))
def test_the_users_own_packages_reach_the_stages_as_the_run_was_submitted_with_them(packages):
    """Through what Ray makes of them: the driver reads its own environment as Ray has resolved it."""
    from ray.runtime_env import RuntimeEnv

    submitted = RuntimeEnv(**packages, working_dir="gcs://_ray_pkg_1.zip", env_vars={"MINE": "1"})
    in_driver = RuntimeEnv.deserialize(submitted.serialize())
    stage = RuntimeEnv(**stage_runtime_env(dict(in_driver)))
    for name in (*packages, "working_dir"):
        kept = submitted[name]  # Ray fills in an option of `uv` when it reads it again
        found = {key: stage[name][key] for key in kept} if isinstance(kept, dict) else stage[name]
        assert found == kept, name
    assert stage["env_vars"]["MINE"] == "1"


@pytest.mark.parametrize(
    ("reach", "engine", "w", "expected"),
    [
        ({"CPU": 64.0}, {}, {}, 1),
        ({"GPU": 1.0}, {}, {}, 1),  # the engine must go first
        ({"GPU": 2.0}, {}, {}, 1),
        ({"GPU": 8.0}, {"replicas": {"min": 1, "max": 4}}, {"num_workers": 2, "global_batch_size": 4}, 2),
        ({"GPU": 8.0}, {"replicas": {"min": 0, "max": 4}}, {}, 1),  # a fine-tune sends the engines away
        ({"GPU": 8.0, "one": 1.0}, {"resources": {"one": 1}}, {"resources": {"one": 1}}, 1),
        ({"GPU": 4.0}, {}, None, 4),  # nothing is fine-tuned
    ],
)
def test_branches_side_by_side_are_those_that_can_train_beside_the_engines(reach, engine, w, expected):
    steps = {"p": {"optimizer": "random_fewshot"}, **({} if w is None else {"w": {"method": "sft", **w}})}
    assert planning.max_parallel(config(engine=engine, steps=steps, strategy=list(steps)), reach) == expected


@pytest.mark.parametrize(
    "where", [{"engine": {"resources": {"GPU": 1}}}, {"steps": {"w": {"method": "sft", "resources": {"CPU": 2}}}}]
)
def test_cpus_and_gpus_have_keys_of_their_own(where):
    with pytest.raises(ValueError, match="is not for this key: engines have num_cpus"):
        config(**{"strategy": "w" if "steps" in where else "p", **where})
