from __future__ import annotations

import pytest

from bt_ray.errors import TrainingError
from bt_ray.training.rows import build_rows, select_rollouts
from bt_ray.training.tokens import TokenPair, TokenRow, pack_tree, tokenize_pairs, tokenize_rows


def rollout(example, sample=0, score=1.0, accept=True, calls=None, error=None):
    calls = calls if calls is not None else [call("answer", f"q{example}", f"a{sample}")]
    return {"example_id": example, "sample": sample, "score": score, "accept": accept, "calls": calls, "error": error}


def call(predictor, question, answer, tokens=3):
    outputs = None if answer is None else {"answer": answer}
    return {"predictor": predictor, "inputs": {"question": question}, "outputs": outputs, "token_ids": [7] * tokens}


def render(predictor, inputs, outputs):
    return {
        "prompt": [{"role": "user", "content": f"{predictor}: {inputs['question']}"}],
        "completion": [{"role": "assistant", "content": outputs["answer"]}],
    }


def keys(rows):
    return [(row["example_id"], row["sample"]) for row in rows]


def test_only_passing_rollouts_give_rows():
    rows = [rollout("a", accept=False), rollout("b"), rollout("c", error={"kind": "metric", "message": ""})]
    assert keys(select_rollouts(rows, "all")) == [("b", 0)]


def test_all_first_and_best_choose_among_the_samples_of_an_example():
    rows = [
        rollout("a", 2, score=0.9),
        rollout("b", 0, score=0.5),
        rollout("a", 0, score=1.0, accept=False),
        rollout("a", 3, score=0.9),
        rollout("a", 1, score=0.4),
    ]
    assert keys(select_rollouts(rows, "all")) == [("a", 1), ("a", 2), ("a", 3), ("b", 0)]
    assert keys(select_rollouts(rows, "first")) == [("a", 1), ("b", 0)]
    assert keys(select_rollouts(rows, "best")) == [("a", 2), ("b", 0)]  # equal scores: the lower sample
    assert rows[0]["sample"] == 2  # the caller's list is as it was


def test_a_best_without_score_loses():
    rows = [rollout("a", 0, score=None), rollout("a", 1, score=0.1)]
    assert keys(select_rollouts(rows, "best")) == [("a", 1)]


def test_shortest_counts_the_tokens_of_all_calls_and_takes_the_first_of_equals():
    def run(sample, *tokens, **more):
        return rollout("a", sample, calls=[call("answer", "q", f"a{sample}", count) for count in tokens], **more)

    rows = [run(0, 9), run(1, 2, 3), run(2, 5), run(3, 4, 2), run(4, 1, accept=False)]
    assert keys(select_rollouts(rows, "shortest")) == [("a", 1)]
    assert keys(select_rollouts(rows[2:], "shortest")) == [("a", 2)]


def test_an_unknown_choice_is_refused():
    with pytest.raises(TrainingError, match="newest"):
        select_rollouts([], "newest")  # type: ignore[arg-type]


def test_rows_of_all_modules_are_pooled_in_order_with_their_predictor():
    calls = [call("plan", "x", "p"), call("answer", "x", "y")]
    rows, counts = build_rows([rollout("a", calls=calls), rollout("b", calls=calls[1:])], render)
    assert [(row["example_id"], row["predictor"]) for row in rows] == [("a", "plan"), ("a", "answer"), ("b", "answer")]
    assert rows[0]["prompt"] == [{"role": "user", "content": "plan: x"}]
    assert rows[0]["completion"] == [{"role": "assistant", "content": "p"}]
    assert counts == {
        "rollouts": 2,
        "examples": 2,
        "rows": 3,
        "rows_per_predictor": {"answer": 2, "plan": 1},
        "duplicates": 0,
        "unparsed": 0,
    }


def test_duplicates_are_dropped_within_an_example_and_predictor_only():
    same = [call("answer", "x", "y")]
    rows, counts = build_rows([rollout("a", 0, calls=same), rollout("a", 1, calls=same), rollout("b", 0, calls=same)], render)
    assert [row["example_id"] for row in rows] == ["a", "b"]
    assert counts["duplicates"] == 1 and counts["rollouts"] == 3


def test_deduplicate_drops_equal_words_of_other_examples_and_predictors_too():
    def run(example, *answers):
        return rollout(example, calls=[call("answer", "x", answer) for answer in answers])

    rollouts = [run("a", "y"), run("b", "y", "z"), run("c", "z")]
    rows, counts = build_rows(rollouts, render)
    assert [row["example_id"] for row in rows] == ["a", "b", "b", "c"] and counts["duplicates"] == 0
    rows, counts = build_rows(rollouts, render, deduplicate=True)
    assert [(row["example_id"], row["completion"][0]["content"]) for row in rows] == [("a", "y"), ("b", "z")]
    assert counts["duplicates"] == 2 and counts["rows"] == 2
    same_text = [rollout("a", calls=[call("plan", "x", "y"), call("answer", "x", "y")])]
    assert len(build_rows(same_text, lambda name, inputs, outputs: render("any", inputs, outputs), deduplicate=True)[0]) == 1


def test_a_row_names_its_rollout():
    rows, _ = build_rows([rollout("a", 2)], render)
    assert (rows[0]["example_id"], rows[0]["sample"]) == ("a", 2)


def test_a_call_that_did_not_parse_gives_no_row():
    rows, counts = build_rows([rollout("a", calls=[call("answer", "x", None), call("answer", "x", "y")])], render)
    assert len(rows) == 1 and counts["unparsed"] == 1


class Tokenizer:
    """One token a character; `>` ends a turn, as id 0."""

    eos_token = ">"
    eos_token_id = 0

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        assert not tokenize
        text = "".join(f"{message['role'][0]}{message['content']}>\n" for message in messages)
        return text + ("a" if add_generation_prompt else "")

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [0 if char == ">" else ord(char) for char in text]}


class ForgetfulTokenizer(Tokenizer):
    """Its template renders a past answer otherwise than one being generated."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        return super().apply_chat_template(messages, tokenize) + ("a<think>" if add_generation_prompt else "")


def chat(question="q", answer="yes", example="e1"):
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        "example_id": example,
        "predictor": "answer",
    }


def ords(text):
    return tuple(0 if char == ">" else ord(char) for char in text)


def test_the_answer_ends_with_the_end_token():
    assert tokenize_rows([chat()], Tokenizer(), 100) == [TokenRow(ords("uq>\na"), ords("yes>"))]


def test_a_template_that_rewrites_history_still_trains_what_is_generated():
    assert tokenize_rows([chat()], ForgetfulTokenizer(), 100) == [TokenRow(ords("uq>\na<think>"), ords("yes>"))]


def test_a_row_that_is_too_long_is_named_and_nothing_is_cut():
    rows = [chat(), chat("long " * 5, example="e2")]
    with pytest.raises(
        TrainingError, match=r"1 of 2 rows.*max_length = 12.*row 1 \(example 'e2', predictor 'answer'\): 33 tokens"
    ):
        tokenize_rows(rows, Tokenizer(), 12)
    assert [len(row) for row in tokenize_rows(rows, Tokenizer(), 33)] == [9, 33]


def test_a_pair_shares_its_prompt_and_both_answers_end_with_the_end_token():
    pair = {**chat(), "chosen": chat()["completion"], "rejected": chat(answer="no")["completion"]}
    tokens = tokenize_pairs([pair], Tokenizer(), 100)
    assert tokens == [TokenPair(ords("uq>\na"), ords("yes>"), ords("no>"))]
    assert len(tokens[0]) == 2 * 5 + 4 + 3  # both halves go through the model
    with pytest.raises(TrainingError, match=r"1 of 1 rows.*: 10 tokens"):
        tokenize_pairs([{**pair, "rejected": chat(answer="none")["completion"]}], Tokenizer(), 9)


def test_no_rows_are_refused():
    with pytest.raises(TrainingError, match="no row"):
        tokenize_rows([], Tokenizer(), 10)


def path_of(tree, index):
    path = []
    while index >= 0:
        path.append(tree.ids[index])
        index = tree.parents[index]
    return tuple(reversed(path))


def test_a_tree_holds_each_shared_beginning_once_and_every_target_after_its_own_path():
    rows = [TokenRow((1, 2, 3), (7, 8)), TokenRow((1, 2, 4), (7,)), TokenRow((1, 2, 3), (7, 9)), TokenRow((5,), (6,))]
    tree = pack_tree(rows)
    assert len(tree.ids) == 3 + 2 + 2 + 1 + 2  # of 17 tokens in the rows
    expected = [
        ((*row.prompt, *row.completion)[:at], (*row.prompt, *row.completion)[at])
        for row in rows
        for at in range(len(row.prompt), len(row))
    ]
    assert [(path_of(tree, source), target) for source, target in zip(tree.sources, tree.targets, strict=True)] == expected
    for index, parent in enumerate(tree.parents):
        assert parent < index
        assert tree.positions[index] == len(path_of(tree, index)) - 1
