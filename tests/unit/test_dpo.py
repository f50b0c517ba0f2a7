from __future__ import annotations

import pytest

from bt_ray.config import WeightStep
from bt_ray.stages.weight import nothing_to_learn
from bt_ray.training.dpo import dpo_kwargs
from bt_ray.training.pairs import build_pairs, why_no_pair
from bt_ray.training.sft import TrainShape, sft_kwargs

CPU = TrainShape("/out", seed=3, gpu=False)
NOTHING = {"prompts_differ": 0, "completions_equal": 0, "unparsed": 0, "duplicates": 0, "without_preference": 0}


def call(answer, tokens=3, question="q", predictor="answer"):
    outputs = None if answer is None else {"answer": answer}
    return {"predictor": predictor, "inputs": {"question": question}, "outputs": outputs, "token_ids": [7] * tokens}


def run(sample, score, *calls, example="a", accept=None, error=None):
    accept = bool(score) if accept is None else accept
    return {"example_id": example, "sample": sample, "score": score, "accept": accept, "calls": list(calls), "error": error}


def render(predictor, inputs, outputs):
    return {
        "prompt": [{"role": "user", "content": f"{predictor}: {inputs['question']}"}],
        "completion": [{"role": "assistant", "content": outputs["answer"]}],
    }


def pairs_of(*rollouts, **fields):
    """(chosen, rejected) answers, and the counts that are not 0."""
    pairs, counts = build_pairs(list(rollouts), render, WeightStep(method="dpo", **fields))
    words = [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]
    return words, {name: counts[name] for name in NOTHING if counts[name]}


def test_a_pair_is_the_same_call_of_a_better_and_a_worse_rollout():
    pairs, counts = build_pairs([run(0, 0.0, call("no")), run(1, 1.0, call("yes"))], render, WeightStep(method="dpo"))
    assert pairs == [
        {
            "prompt": [{"role": "user", "content": "answer: q"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
            "predictor": "answer",
            "example_id": "a",
        }
    ]
    assert counts == {"examples": 1, "rows": 1, "rows_per_predictor": {"answer": 1}, **NOTHING}


def test_the_better_one_must_pass_and_the_worse_one_need_not_fail():
    assert pairs_of(run(0, 0.4, call("x"), accept=False), run(1, 0.2, call("y"), accept=False)) == ([], {"without_preference": 1})
    assert pairs_of(run(0, 0.9, call("x")), run(1, 1.0, call("y"))) == ([("y", "x")], {})
    failed = run(1, 1.0, call("y"), error={"kind": "program", "message": ""})
    assert pairs_of(run(0, 0.5, call("x")), failed) == ([("x", "y")], {})  # a failed program scores 0
    no_metric = run(1, None, call("y"), error={"kind": "metric", "message": ""})
    assert pairs_of(run(0, 0.5, call("x")), no_metric) == ([], {"without_preference": 1})


def test_examples_are_never_mixed():
    assert pairs_of(run(0, 1.0, call("x"), example="a"), run(0, 0.0, call("y"), example="b")) == ([], {"without_preference": 2})


def test_equal_scores_are_no_preference_unless_tokens_have_a_weight():
    short, long = run(0, 1.0, call("short", tokens=2)), run(1, 1.0, call("long", tokens=8))
    assert pairs_of(short, long) == ([], {"without_preference": 1})
    assert pairs_of(short, long, token_weight=0.1) == ([("short", "long")], {})


def test_among_equal_scores_the_shortest_is_chosen_and_the_longest_rejected():
    good = [run(0, 1.0, call("good9", 9)), run(1, 1.0, call("good2", 2)), run(2, 1.0, call("good5", 5))]
    bad = [run(3, 0.0, call("bad4", 4)), run(4, 0.0, call("bad8", 8)), run(5, 0.0, call("bad1", 1))]
    assert pairs_of(*good, *bad) == ([("good2", "bad8")], {})


def test_the_token_weight_can_turn_the_order_of_scores():
    long, short = run(0, 1.0, call("long", 10)), run(1, 0.8, call("short", 2))
    assert pairs_of(long, short) == ([("long", "short")], {})
    # 1.0 - w * 10/10 against 0.8 - w * 2/10: even at w = 0.25
    assert pairs_of(long, short, token_weight=0.24)[0] == [("long", "short")]
    assert pairs_of(long, short, token_weight=0.26)[0] == [("short", "long")]


def test_the_clearest_preference_comes_first_and_the_cap_is_per_call():
    rollouts = [run(0, 1.0, call("best")), run(1, 0.5, call("middle")), run(2, 0.0, call("worst"))]
    assert pairs_of(*rollouts)[0] == [("best", "worst")]
    assert pairs_of(*rollouts, max_pairs_per_call=2)[0] == [("best", "worst"), ("best", "middle")]
    assert pairs_of(*rollouts, max_pairs_per_call=9)[0] == [("best", "worst"), ("best", "middle"), ("middle", "worst")]
    two_calls = [run(0, 1.0, call("x1"), call("x2")), run(1, 0.0, call("y1"), call("y2"))]
    assert pairs_of(*two_calls)[0] == [("x1", "y1"), ("x2", "y2")]


def test_a_later_call_is_compared_where_its_prompt_is_the_same():
    def chain(sample, score, plan, answer):
        return run(sample, score, call(plan, predictor="plan"), call(answer, question=plan))

    better, worse = chain(0, 1.0, "left", "x"), chain(1, 0.0, "right", "y")
    assert pairs_of(better, worse) == ([("left", "right")], {"prompts_differ": 1})
    same_plan = chain(2, 0.0, "left", "z")
    assert pairs_of(better, same_plan) == ([("x", "z")], {"completions_equal": 1})
    # a comparison that gives nothing for a call leaves its place to the next one
    assert pairs_of(better, worse, same_plan)[0] == [("left", "right"), ("x", "z")]


def test_calls_are_matched_by_their_index_among_those_of_their_predictor():
    better = run(0, 1.0, call("p", predictor="plan"), call("x1"), call("x2"))
    worse = run(1, 0.0, call("y1"), call("y2"), call("r", predictor="plan"))
    assert pairs_of(better, worse)[0] == [("p", "r"), ("x1", "y1"), ("x2", "y2")]
    ended = run(1, 0.0, call("y1"))
    assert pairs_of(better, ended) == ([("x1", "y1")], {})


def test_unparsed_calls_equal_answers_and_repeated_pairs_give_nothing_and_are_counted():
    assert pairs_of(run(0, 1.0, call("x")), run(1, 0.0, call(None))) == ([], {"unparsed": 1})
    assert pairs_of(run(0, 1.0, call("x")), run(1, 0.0, call("x"))) == ([], {"completions_equal": 1})
    repeated = [run(0, 1.0, call("x")), run(1, 0.0, call("y")), run(2, 0.0, call("y"))]
    assert pairs_of(*repeated, max_pairs_per_call=2) == ([("x", "y")], {"duplicates": 1})


def test_pairs_do_not_depend_on_which_rollout_ended_first():
    rollouts = [run(sample, float(sample % 2), call(f"answer {sample}")) for sample in range(6)]
    assert pairs_of(*rollouts, max_pairs_per_call=4) == pairs_of(*reversed(rollouts), max_pairs_per_call=4)


def test_a_skip_says_why_there_is_no_pair():
    _, counts = build_pairs([run(0, 1.0, call("x")), run(1, 0.0, call("x"))], render, WeightStep(method="dpo"))
    assert why_no_pair(counts) == "there is no preference pair (1 gave the same answer)"
    assert nothing_to_learn(WeightStep(method="dpo"), [], counts) == why_no_pair(counts)
    _, counts = build_pairs([run(0, 1.0, call("x")), run(0, 0.0, call("y"), example="b")], render, WeightStep(method="dpo"))
    assert "(2 of 2 examples have no passing rollout beside a worse one)" in why_no_pair(counts)


def test_dpo_has_the_settings_of_sft_and_its_own():
    step = WeightStep(method="dpo", dpo_beta=0.5, dpo_loss="ipo", validation_share=0.1, num_workers=2, zero_stage=3)
    dpo, sft = dpo_kwargs(step, CPU), sft_kwargs(step, CPU)
    own = {"beta": 0.5, "loss_type": ["ipo"], "disable_dropout": True, "precompute_ref_log_probs": False}
    assert {name: value for name, value in dpo.items() if name not in sft} == own
    assert {name for name in sft if name not in dpo} == {"completion_only_loss", "packing"}
    assert all(dpo[name] == sft[name] for name in sft if name in dpo)
    assert dpo_kwargs(WeightStep(method="dpo"), CPU)["loss_type"] == ["sigmoid"]


@pytest.mark.parametrize("fields", [{"dpo_beta": 0}, {"token_weight": -0.1}, {"max_pairs_per_call": 0}, {"dpo_loss": "hinge"}])
def test_settings_without_sense_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        WeightStep.model_validate({"method": "dpo", **fields})


def test_the_frozen_copy_of_an_adapter_gets_the_dtype_of_the_trained_one():
    import torch

    from bt_ray.training.dpo import match_reference_dtype

    matrix = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2).to(torch.bfloat16), "ref": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict({"lora_A": matrix, "other": torch.nn.Linear(2, 2)})
    match_reference_dtype(model)
    assert {parameter.dtype for parameter in matrix.parameters()} == {torch.bfloat16}
    assert model["other"].weight.dtype == torch.float32


def test_calls_that_no_candidate_has_prompts_for_give_no_pair():
    better = run(0, 1.0, call("x", predictor="(fixed) inner"), call("x"))
    worse = run(1, 0.0, call("y", predictor="(fixed) inner"), call("y"))
    assert pairs_of(better, worse)[0] == [("x", "y")]
