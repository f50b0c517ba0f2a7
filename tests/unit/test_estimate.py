"""What a run will cost, counted by hand against the shipped configs."""

from dataclasses import replace

import pytest

from bt_ray.config import PromptStep
from bt_ray.report.estimate import Probe, Rates, estimates, probe_of, sizes_from, training_rows
from bt_ray.report.workload import Sizes, search_bound, workload
from tests.support.plans import PROBE, SHAPES, SIZES, config, nodes, planned


def calls_of(found):
    return {name: value.lm_calls for name, value in found.items()}


def test_helpdesk_by_hand_and_against_a_run():
    """A finished run of this config made the calls on the right: the plan is 15 % above it (with the second run of the pick, which it did not make, added to both), by `p`, `p.w.p` and test.

    Racing stopped one candidate of `p` and five of `p.w.p` half way, and `zero_shot` was the incoming
    prompts, so nine candidates were scored and not ten. `p.w.p` kept the prompts that `p.w` had
    evaluated, so neither its evaluation nor its test was run again. The others are exact.
    """
    found = planned("helpdesk")
    rollout, search, evaluate, test = 64 * 4 * 2, 10 * 32 * 2, 33 * 2, 97 * 2
    assert calls_of(found) == {
        "vanilla": evaluate,  # 66
        "p": rollout + search + evaluate,  # 1122: search 544
        "w": evaluate,  # 66: its rollouts are those of p
        "p.w": rollout + 2 * evaluate,  # 644
        "p.w.p": rollout + search + evaluate,  # 928: search 416, evaluate 0
        "final": 5 * test + test + evaluate,  # 1036: five stages with four outcomes, the gold control, the pick on select again
    }
    made = {"vanilla": 66, "p": 1122, "w": 66, "p.w": 644, "p.w.p": 928, "final": 1036}
    exact = {name for name, value in found.items() if value.lm_calls == made[name]}
    assert exact == {"vanilla", "w", "p.w"}
    assert all(found[name].lm_calls > made[name] and found[name].at_most for name in found.keys() - exact)
    assert not found["vanilla"].at_most and not found["w"].at_most
    total = sum(value.lm_calls for value in found.values())
    assert total / sum(made.values()) - 1 == pytest.approx(0.150, abs=0.001)


def test_seconds_fit_the_run_that_the_rates_come_from():
    """Seconds of that run's steps. `w` learned from 60 rows where the rate of passing runs gives 92."""
    took = {"vanilla": 44, "p": 132, "w": 154, "p.w": 277, "p.w.p": 113, "final": 276}
    found = planned("helpdesk")
    total = sum(value.seconds for value in found.values())
    assert total / sum(took.values()) - 1 == pytest.approx(0.15, abs=0.05)
    assert all(0.75 < found[name].seconds / seconds < 1.5 for name, seconds in took.items())
    assert all(value.rough for value in found.values())


def test_the_other_shipped_configs_by_hand():
    evaluate, search, rollout, test = 17 * 2, 10 * 16 * 2, 80 * 2 * 2, 81 * 2
    assert calls_of(planned("banking8")) == {
        "vanilla": evaluate, "p": rollout + search + evaluate, "w": evaluate, "p.w": rollout + 2 * evaluate,
        "p.w.p": rollout + search + evaluate, "final": 6 * test + evaluate,
    }  # fmt: skip
    for task, samples in (("iris", 2), ("gsm8k", 1), ("hotpotqa", 1)):
        sizes = SHAPES[task]
        each = sizes.num_predictors
        rollout, search = sizes.train * samples * each, 10 * sizes.search * each
        evaluate, test = (sizes.select + 1) * each, (sizes.test + 1) * each
        assert calls_of(planned(task)) == {
            "vanilla": evaluate, "p": rollout + search + evaluate, "w": evaluate,
            "p.p": rollout + search + evaluate, "w.w": rollout + evaluate,
            "p.w": 2 * evaluate,  # the rollouts of p.p
            "w.p": search + evaluate,  # those of w.w
            "p.w.p": rollout + search + evaluate, "final": 8 * test + evaluate,
        }, task  # fmt: skip
    assert planned("gsm8k")["p"].lm_calls == 1000 + 2500 + 251


def test_rollouts_are_shared_by_content_across_depths():
    shared = config(steps={"p": {"optimizer": "random_fewshot", "teacher": "original"}}, strategy="p -> p")
    steps = {name: [item.step for item in work] for name, work in workload(nodes(shared), shared, SIZES).items()}
    assert steps["p"] == ["rollout", "search", "evaluate"]
    assert steps["p.p"] == ["search", "evaluate"]  # its teacher is the program as written, on the base, as for p
    own = config(steps={"p": {"optimizer": "random_fewshot"}}, strategy="p -> p")
    assert [item.step for item in workload(nodes(own), own, SIZES)["p.p"]] == ["rollout", "search", "evaluate"]


@pytest.mark.parametrize(
    ("step", "candidates", "train_runs", "proposer_calls"),
    [
        ({"optimizer": "random_fewshot", "num_candidates": 5}, 4 + 5, 0, 0),
        ({"optimizer": "random_fewshot", "num_candidates": 5, "max_bootstrapped_demos": 0}, 3 + 5, 0, 0),
        ({"optimizer": "labeled", "num_candidates": 5}, 2 + 5, 0, 0),
        ({"optimizer": "labeled", "max_labeled_demos": 0}, 2, 0, 0),
        # a summary and three instructions for each of two predictors, each asked for three times at most
        ({"optimizer": "mipro", "num_candidates": 5, "num_instructions": 4}, 2 + 5, 0, (1 + 2 * 3) * 3),
        ({"optimizer": "mipro", "num_instructions": 1}, 2 + 6, 0, 0),
        ({"optimizer": "opro", "num_candidates": 5}, 2 + 5, 0, 5 * 3),
        ({"optimizer": "gpo", "num_candidates": 5}, 2 + 5, 0, 5 * 3),
        # 50 iterations of a parent on three rows, five children, two answers an iteration
        ({"optimizer": "gepa", "num_candidates": 5}, 2 + 5, 50 * 3 + 5 * 3, 50 * 2),
        ({"optimizer": "gepa", "num_candidates": 1, "options": {"reflection_minibatch_size": 20}}, 3, 2 * 64 + 20, 10 * 2),
        ({"optimizer": "gepa", "num_candidates": 1, "options": {"module_selector": "all"}}, 3, 30 + 3, 10 * 2 * 2),
    ],
)
def test_the_most_that_a_searcher_asks_for(step, candidates, train_runs, proposer_calls):
    bound = search_bound(PromptStep.model_validate(step), SIZES)
    assert (bound.candidates, bound.train_runs, bound.proposer_calls) == (candidates, train_runs, proposer_calls)
    plan = config(steps={"p": step}, strategy="p")
    found = estimates(nodes(plan), plan, SIZES)["p"]
    assert found.lm_calls == (64 + candidates * 32 + train_runs + 33) * 2 + proposer_calls
    assert found.at_most


@pytest.mark.parametrize("optimizer", ["dspy.SIMBA", "my.module:Searcher"])
def test_a_foreign_optimiser_has_no_number(optimizer):
    plan = config(steps={"p": {"optimizer": optimizer}, "w": {"method": "sft"}}, strategy="p -> w")
    found = estimates(nodes(plan), plan, SIZES, PROBE)
    assert found["p"].lm_calls is None and found["p"].seconds is None and found["p"].prompt_tokens is None
    # What comes after it is known, but for the length of the prompts that it leaves.
    assert found["p.w"].lm_calls == 128 + 2 * 66 and found["p.w"].prompt_tokens is None
    assert found["vanilla"].prompt_tokens == 66 * 70


def test_a_control_at_equal_cost_has_no_number():
    plan = config(controls={"equal_cost": "p"})
    assert estimates(nodes(plan), plan, SIZES)["final"].lm_calls is None
    assert "final" not in estimates(nodes(plan), plan, replace(SIZES, test=0))


def test_the_gold_control_needs_a_labelled_predictor_and_pays_for_rollouts_that_nobody_made():
    plan = config(controls={"gold": "w"}, strategy="vanilla")
    assert estimates(nodes(plan), plan, SIZES)["final"].lm_calls == 97 * 2 + 66 + 128 + 97 * 2
    bare = estimates(nodes(plan), plan, replace(SIZES, num_labelled=0))["final"]
    assert bare.lm_calls == 97 * 2 + 66
    trained = estimates(nodes(plan), plan, SIZES)["final"].seconds - bare.seconds
    rates = Rates()
    assert trained == pytest.approx(
        (128 + 194) / rates.calls_per_s + rates.finetune_start_s + 64 * 2 / rates.train_rows_per_s, 0.01
    )


def test_a_probe_gives_calls_tokens_and_speed():
    found = planned("helpdesk", probe=PROBE)
    assert found["vanilla"].prompt_tokens == 66 * 70 and found["vanilla"].completion_tokens == 66 * 5
    assert found["vanilla"].seconds == pytest.approx(20 + Rates().stage_start_s + 66 / 10.0)
    # eight demos of 35 tokens at most, in the search and in the evaluation of what it picks
    assert found["p"].prompt_tokens == 512 * 70 + (640 + 66) * (70 + 8 * 35)
    assert found["p.w"].prompt_tokens == 512 * 350 + 66 * 70 + 66 * 350
    assert not found["p"].rough and found["w"].rough  # the speed of training was not measured
    twice = planned("helpdesk", probe=replace(PROBE, calls_per_run=4.0))
    assert twice["p"].lm_calls == 2 * found["p"].lm_calls
    silent = planned("helpdesk", probe=replace(PROBE, demo_tokens=None))
    assert silent["p"].prompt_tokens is None and silent["p"].completion_tokens is not None
    assert all(value.prompt_tokens is None for value in planned("helpdesk").values())
    written = config(steps={"p": {"optimizer": "opro"}}, strategy="p")
    assert estimates(nodes(written), written, SIZES, PROBE)["p"].prompt_tokens is None


def test_what_rows_of_a_probe_show():
    call = {"prompt_token_ids": [0] * 30, "token_ids": [0] * 4}
    rows = [{"calls": [call, call], "accept": True}, {"calls": [call], "accept": False}]
    found = probe_of(rows, 12.0, seconds=2.0, engine_start_s=9.0)
    assert found == Probe(2, 1.5, 30.0, 4.0, 12.0, 1.5, 0.5, 9.0)
    assert probe_of([{"calls": [], "accept": False}], None, 2.0, 9.0) is None


def test_training_rows_follow_from_the_share_that_passes():
    def rows(**step):
        plan = config(steps={"w": {"method": "sft", **step}}, strategy="w", rollout={"samples": 4})
        return training_rows(plan.steps["w"], 4, SIZES, 0.25)

    assert rows() == 64 * 4 * 0.25 * 2
    assert rows(samples_per_example="best") == pytest.approx(64 * (1 - 0.75**4) * 2)
    assert rows(validation_share=0.5) == 64
    assert rows(method="dpo") == pytest.approx(2 * 64 * (1 - 0.75**4 - 0.25**4) * 2)


def test_sizes_of_splits_and_signatures():
    row = {"inputs": {"message": "x"}, "labels": {"intent": "a"}}
    signatures = {
        "department": {"inputs": ["message"], "outputs": ["department"]},
        "intent": {"inputs": [], "outputs": ["intent"]},
    }
    found = sizes_from({"train": [row] * 3, "search": [row] * 2, "select": [row]}, signatures)
    assert found == Sizes(3, 2, 1, 0, num_predictors=2, calls_per_run=2.0, num_labelled=1)


def test_a_faster_engine_shortens_the_estimate():
    slow, fast = (planned("helpdesk", probe=replace(PROBE, calls_per_s=rate)) for rate in (1.0, 100.0))
    assert all(fast[name].seconds < slow[name].seconds for name in slow)
