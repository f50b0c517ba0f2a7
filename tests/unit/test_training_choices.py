from __future__ import annotations

from collections import Counter

import pytest

from bt_ray.config import WeightStep
from bt_ray.errors import TrainingError
from bt_ray.stages.weight import kept_back, nothing_to_learn
from bt_ray.training.choices import Choice, balance, choose_rows, first_rows, hold_out
from bt_ray.training.history import held_out_losses, history, stops_early

IDS = [str(number) for number in range(20)]
PREDICTORS = ["plan"] * 2 + ["answer"] * 7 + ["check"] * 3


def row(example, predictor="answer", sample=0):
    return {"example_id": example, "predictor": predictor, "sample": sample}


def test_held_out_examples_are_drawn_by_seed_whatever_their_number_of_rows():
    held = hold_out(IDS * 3, 0.25, seed=1)
    assert len(held) == 5 and held < set(IDS)
    assert hold_out(IDS, 0.25, seed=1) == held != hold_out(IDS, 0.25, seed=2)
    assert hold_out(IDS, 0.0, seed=1) == frozenset()


@pytest.mark.parametrize(("share", "examples", "held"), [(0.01, 20, 1), (0.99, 20, 19), (0.5, 2, 1), (0.9, 2, 1), (0.3, 10, 3)])
def test_at_least_one_example_is_held_out_and_one_stays(share, examples, held):
    assert len(hold_out(IDS[:examples], share, seed=0)) == held


def test_one_example_cannot_be_held_out():
    with pytest.raises(TrainingError, match=r"validation_share 0.5 needs two examples.*there is 1"):
        hold_out(["a", "a"], 0.5, seed=0)


def test_no_balance_takes_each_row_once():
    assert balance(PREDICTORS, "none", seed=0) == list(range(12))


def test_downsample_draws_as_many_as_the_rarest_has():
    chosen = balance(PREDICTORS, "downsample", seed=0)
    assert Counter(PREDICTORS[index] for index in chosen) == {"plan": 2, "answer": 2, "check": 2}
    assert len(set(chosen)) == 6 and chosen == sorted(chosen)
    assert balance(PREDICTORS, "downsample", seed=0) == chosen
    assert any(balance(PREDICTORS, "downsample", seed=seed) != chosen for seed in range(1, 5))


def test_upsample_repeats_every_row_as_often_as_it_goes():
    chosen = balance(PREDICTORS, "upsample", seed=0)
    assert Counter(PREDICTORS[index] for index in chosen) == {"plan": 7, "answer": 7, "check": 7}
    times = Counter(chosen)
    assert sorted(times[index] for index in (0, 1)) == [3, 4] and sorted(times[index] for index in (9, 10, 11)) == [2, 2, 3]
    assert all(times[index] == 1 for index in range(2, 9)) and chosen == sorted(chosen)


def test_the_token_limit_takes_whole_rollouts_in_order():
    rollouts = [("a", 0), ("a", 0), ("a", 1), ("b", 0), ("b", 0)]
    lengths = [10, 10, 5, 10, 1]
    assert [first_rows(rollouts, lengths, limit) for limit in (20, 24, 25, 35, 36, 99)] == [2, 2, 3, 3, 5, 5]
    assert first_rows([("a", 0), ("b", 0), ("c", 0)], [5, 50, 1], 10) == 1  # c fits, but b came before it
    with pytest.raises(TrainingError, match=r"first rollout alone has 20 tokens, max_train_tokens is 19"):
        first_rows(rollouts, lengths, 19)


def test_without_choices_every_row_is_trained_on():
    rows = [row("a"), row("b"), row("a")]
    assert choose_rows(rows, [1, 1, 1], WeightStep(), seed=0) == Choice([0, 1, 2], [], 0)


def test_the_choices_together_hold_out_then_balance_then_cut():
    rows = [row(example, predictor, sample) for example in IDS for sample in (0, 1) for predictor in ("plan", "answer", "answer")]
    step = WeightStep(validation_share=0.25, balance="downsample", max_train_tokens=300)
    choice = choose_rows(rows, [10] * len(rows), step, seed=3)
    held = hold_out(IDS, 0.25, seed=3)
    assert {rows[index]["example_id"] for index in choice.held_out} == held
    assert len(choice.held_out) == 5 * 6  # all their rows: neither balanced nor cut
    assert not held & {rows[index]["example_id"] for index in choice.train}
    # 15 examples, 2 rollouts, 1 row of each predictor a rollout on average: 60 rows, of which 30 fit at most
    assert len(choice.train) + choice.left_out == 60 and 25 <= len(choice.train) <= 30
    assert choice.counts() == {"trained": len(choice.train), "held_out": 30, "left_out": choice.left_out}


def test_upsampled_copies_count_as_tokens():
    rows = [row("a", "plan"), row("a", "answer"), row("b", "answer"), row("c", "answer")]
    choice = choose_rows(rows, [10] * 4, WeightStep(balance="upsample", max_train_tokens=40), seed=0)
    assert choice.train == [0, 0, 0, 1] and choice.left_out == 2


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([1.0, 0.9, 0.8], 1, False),
        ([1.0, 0.9, 0.95], 1, True),
        ([1.0, 0.9, 0.95], 2, False),
        ([1.0, 0.9, 0.95, 0.9], 2, True),
        ([1.0, 0.9, 0.95, 0.89], 2, False),
        ([1.0], 1, False),
        ([], 1, False),
        ([1.0, 2.0, 3.0, 4.0], None, False),
    ],
)
def test_training_stops_after_so_many_epochs_without_a_lower_loss(losses, patience, stops):
    assert stops_early(losses, patience) is stops


def test_the_history_joins_the_held_out_loss_to_the_step_it_followed():
    log = [
        {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 3, "entropy": 9.0},
        {"step": 2, "epoch": 1.0, "loss": 1.0, "rewards/margins": 0.25, "logps/chosen": -4.0},
        {"step": 2, "epoch": 1.0, "eval_loss": 1.5, "eval_runtime": 7.0},
        {"step": 2, "epoch": 1.0, "train_runtime": 3.0, "train_loss": 1.5},
    ]
    assert history(log) == [
        {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 3.0},
        {"step": 2, "epoch": 1.0, "loss": 1.0, "reward_margin": 0.25, "chosen_logp": -4.0, "eval_loss": 1.5},
    ]
    assert held_out_losses(log) == [1.5]


def test_a_stage_says_what_was_kept_back_and_why_it_was_skipped():
    assert (
        kept_back([{"trained": 9, "held_out": 1, "left_out": 7}, {"trained": 2, "held_out": 3}])
        == ", 4 held out, 7 left out by max_train_tokens"
    )
    assert kept_back([{"trained": 9, "held_out": 0, "left_out": 0}]) == kept_back([{}]) == ""
    assert "could be parsed" in str(nothing_to_learn(WeightStep(), [], {}))
    assert "only example" in str(nothing_to_learn(WeightStep(validation_share=0.1), [row("a"), row("a")], {}))
    assert nothing_to_learn(WeightStep(validation_share=0.1), [row("a"), row("b")], {}) is None
