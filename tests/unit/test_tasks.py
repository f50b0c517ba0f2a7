"""The shipped tasks: their data, their programs against a scripted LM, their data commands, their configs."""

from __future__ import annotations

import asyncio
import copy
import gzip
import importlib
import itertools
import json
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import dspy
import pytest
from dspy.utils import DummyLM

from bt_ray import config_file
from bt_ray.tasks import banking8, files, gsm8k, helpdesk, hotpotqa, iris
from bt_ray.tasks.banking8 import data as banking8_data
from bt_ray.tasks.gsm8k import data as gsm8k_data
from bt_ray.tasks.hotpotqa import data as hotpotqa_data
from bt_ray.tasks.hotpotqa import retrieval
from bt_ray.tasks.iris import data as iris_data

REPO = Path(__file__).resolve().parents[2]
TASKS = REPO / "bt_ray" / "tasks"
SOURCES = REPO.parent / "shared" / "data"


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")] for name in files.SPLITS}


def source(name: str) -> Path:
    """A source folder that not every checkout has."""
    folder = SOURCES / name
    if not folder.is_dir():
        pytest.skip(f"no source data {folder}")
    return folder


def run_both(program: dspy.Module, answers: list[dict[str, str]], inputs: dict[str, Any]) -> tuple[dspy.Prediction, int]:
    """Run forward and aforward on scripted answers; they must agree. Returns the prediction and the LM calls of one run."""
    results = []
    for run in (lambda: program(**inputs), lambda: asyncio.run(program.acall(**inputs))):
        lm = DummyLM(list(answers))
        with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False), disable_history=False):
            results.append((run(), len(lm.history)))
    assert results[0][0].toDict() == results[1][0].toDict()
    assert results[0][1] == results[1][1]
    return results[0]


# --- data ---------------------------------------------------------------------------------------


def test_helpdesk_rows_are_balanced_and_labelled() -> None:
    labels = {label for pair in helpdesk.DEPARTMENTS.values() for label in pair}
    for name, per_intent in (("train", 8), ("val", 8), ("test", 12)):
        rows = rows_of(TASKS / "helpdesk")[name]
        assert all(set(row) == {"message", "intent"} for row in rows)
        assert Counter(row["intent"] for row in rows) == dict.fromkeys(labels, per_intent)
        assert all(10 <= len(row["message"]) <= 200 and row["message"] == row["message"].strip() for row in rows)


def test_helpdesk_messages_do_not_straddle_splits() -> None:
    splits = rows_of(TASKS / "helpdesk")
    words = {name: [set(re.findall(r"[\w']+", row["message"].lower())) for row in rows] for name, rows in splits.items()}
    for one, other in itertools.combinations(words, 2):
        nearest = max(len(a & b) / len(a | b) for a in words[one] for b in words[other])
        assert nearest < 0.5, f"{one} and {other} share a message"
    messages = [row["message"].lower() for rows in splits.values() for row in rows]
    assert len(set(messages)) == len(messages) == 224


def test_helpdesk_labels_rarely_stand_in_the_message() -> None:
    rows = [row for part in rows_of(TASKS / "helpdesk").values() for row in part]
    given_away = [row for row in rows if all(word in row["message"].lower() for word in re.findall(r"\w+", row["intent"]))]
    assert len(given_away) < len(rows) / 8


def test_iris_rows_are_the_command_s(tmp_path: Path) -> None:
    iris_data.main([str(tmp_path)])
    for name in files.SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (TASKS / "iris" / f"{name}.jsonl").read_bytes()
    assert (tmp_path / "config.yaml").read_bytes() == (TASKS / "iris" / "config.yaml").read_bytes()


def test_iris_rows_are_stratified_and_whole() -> None:
    splits = rows_of(TASKS / "iris")
    total = Counter(row["species"] for rows in splits.values() for row in rows)
    assert total == {"setosa": 50, "versicolor": 50, "virginica": 50}
    for rows in splits.values():
        assert len(rows) == 50
        assert set(Counter(row["species"] for row in rows).values()) <= {16, 17}
    seen = {name: {tuple(row.values()) for row in rows} for name, rows in splits.items()}
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]
    assert sum(map(len, seen.values())) == 149  # two of the flowers are equal, and stay together


def test_banking8_command(tmp_path: Path) -> None:
    banking8_data.main([str(source("banking77")), str(tmp_path)])
    labels = {label for pair in banking8.DEPARTMENTS.values() for label in pair}
    for name, per_intent in (("train", 10), ("val", 4), ("test", 10)):
        rows = rows_of(tmp_path)[name]
        assert Counter(row["intent"] for row in rows) == dict.fromkeys(labels, per_intent)
        assert all(set(row) == {"message", "intent"} and row["message"] for row in rows)
    assert config_file.load(tmp_path / "config.yaml").data.train == "train.jsonl"


def test_banking8_names_the_intent_that_a_source_lacks(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        files.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "Where is my card?", "answer": "card_arrival"}])
    with pytest.raises(ValueError, match=r"train\.jsonl has no row of automatic_top_up"):
        banking8_data.build(tmp_path)


def test_gsm8k_command(tmp_path: Path) -> None:
    gsm8k_data.main([str(source("gsm8k")), str(tmp_path)])
    splits = rows_of(tmp_path)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1000, "val": 500, "test": 1319}
    questions = [row["question"] for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)
    assert all(gsm8k.last_number_matches(dspy.Example(row), dspy.Prediction(row)) == 1.0 for row in splits["test"])


def test_gsm8k_reads_the_official_files(tmp_path: Path) -> None:
    worked = [{"question": f"q{i}", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>\n#### 1,{i:03}"} for i in range(1503)]
    files.write_jsonl(tmp_path / "train.jsonl", worked)
    files.write_jsonl(tmp_path / "test.jsonl", worked[:2])
    splits = gsm8k_data.build(tmp_path)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1000, "val": 500, "test": 2}
    assert splits["test"] == [{"question": "q0", "answer": "1000"}, {"question": "q1", "answer": "1001"}]
    assert not {row["question"] for row in splits["train"]} & {row["question"] for row in splits["val"]}


def test_hotpotqa_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source("hotpotqa")
    monkeypatch.setenv("BT_RAY_HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError, match=r"bt_ray\.tasks\.hotpotqa\.data"):
        hotpotqa.HotpotQA()
    hotpotqa_data.main([str(folder), str(tmp_path / "out")])
    assert {name: len(rows) for name, rows in rows_of(tmp_path / "out").items()} == {"train": 1000, "val": 356, "test": 1500}
    assert hotpotqa.HotpotQA().retriever.corpus == str(tmp_path / "home/data/hotpotqa/corpus.jsonl.gz")


def test_a_bad_source_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl"):
        files.read_jsonl(path, ("text",))
    path.write_text('{"text": "a"}\n\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match="line 3: the field 'text' is missing"):
        files.read_jsonl(path, ("text",))
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2: no valid JSON"):
        files.read_jsonl(path, ("text",))


def test_an_edited_config_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    iris_data.main([str(tmp_path)])
    assert (tmp_path / "config.yaml").read_text() == "mine"


# --- programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task, build", [(helpdesk, helpdesk.Helpdesk), (banking8, banking8.Banking8)])
def test_two_step_programs(task: Any, build: Any) -> None:
    program = build()
    department, (intent, _) = list(task.DEPARTMENTS.items())[2]
    answers = [{"department": department}, {"intent": intent}]
    prediction, calls = run_both(program, answers, {"message": "Hello"})
    assert prediction.toDict() == {"department": department, "intent": intent}
    assert calls == 2
    outputs = {name: module.signature.output_fields for name, module in program.named_predictors()}
    assert list(outputs) == ["department", "intent"]
    assert set(get_args(outputs["department"]["department"].annotation)) == set(task.DEPARTMENTS)
    assert get_args(outputs["intent"]["intent"].annotation) == tuple(itertools.chain(*task.DEPARTMENTS.values()))


def test_the_second_step_sees_the_first() -> None:
    lm = DummyLM([{"department": "loan"}, {"intent": "loan: pay back"}])
    with dspy.context(lm=lm, disable_history=False):
        helpdesk.Helpdesk()(message="How much is left?")
    assert "loan" in lm.history[1]["messages"][-1]["content"].split("[[ ## department ## ]]")[1]


def test_iris_program() -> None:
    row = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
    prediction, calls = run_both(iris.Iris(), [{"reasoning": "short petals", "species": "setosa"}], row)
    assert prediction.species == "setosa" and calls == 1


def test_gsm8k_program() -> None:
    prediction, calls = run_both(gsm8k.GSM8K(), [{"reasoning": "2 + 2", "answer": "4"}], {"question": "2 + 2?"})
    assert prediction.answer == "4" and calls == 1


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl.gz"
    passages = [
        ("Alaska Railroad", "The Alaska Railroad runs from Seward to Fairbanks and passes an army post."),
        ("Fort Wainwright", "Fort Wainwright is an army post near Fairbanks."),
        ("Seward", "Seward is a harbour town."),
        ("Iris", "Iris is a genus of flowering plants."),
        ("Bath", "Bath is a town in Somerset with Roman baths."),
    ]
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"title": title, "text": text}) + "\n" for title, text in passages)
    return str(path)


def test_hotpotqa_program_calls_three_times_and_retrieves_twice(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queries: list[str] = []
    search = retrieval.Retriever.search
    monkeypatch.setattr(retrieval.Retriever, "search", lambda self, query: queries.append(query) or search(self, query))
    answers = [
        {"reasoning": "r", "search_query": "Alaska Railroad Seward"},
        {"reasoning": "r", "search_query": "army post Fairbanks"},
        {"reasoning": "r", "answer": "Fort Wainwright"},
    ]
    program = hotpotqa.HotpotQA(corpus=corpus, k=2)
    prediction, calls = run_both(program, answers, {"question": "Through which army post does it pass?"})
    assert calls == 3
    assert queries == ["Alaska Railroad Seward", "army post Fairbanks"] * 2  # forward, then aforward
    assert prediction.answer == "Fort Wainwright"
    assert [hop["query"] for hop in prediction.hops] == queries[:2]
    assert prediction.hops[0]["titles"] == ["Alaska Railroad", "Seward"]
    assert sorted(prediction.hops[1]["titles"]) == ["Alaska Railroad", "Fort Wainwright"]
    assert len(program.predictors()) == 3


def test_hotpotqa_answers_from_the_passages_of_both_hops(corpus: str) -> None:
    lm = DummyLM([
        {"reasoning": "r", "search_query": "Seward harbour"},
        {"reasoning": "r", "search_query": "Somerset"},
        {"reasoning": "r", "answer": "x"},
    ])  # fmt: skip
    with dspy.context(lm=lm, disable_history=False):
        copy.deepcopy(hotpotqa.HotpotQA(corpus=corpus))(question="Q?")
    shown = [entry["messages"][-1]["content"] for entry in lm.history]
    assert "Seward is a harbour town" not in shown[0]
    assert "Seward is a harbour town" in shown[1] and "Roman baths" not in shown[1]
    assert shown[2].count("Seward is a harbour town") == 1 and "Roman baths" in shown[2]


def test_retriever_gives_only_what_shares_a_word(corpus: str) -> None:
    retriever = retrieval.Retriever(corpus, k=3)
    assert retriever.search("flowering") == ["Iris | Iris is a genus of flowering plants."]
    assert retriever.search("") == retriever.search("the of") == retriever.search("zyzzyva") == []


def test_index_is_built_once_for_many_threads(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    opened = gzip.open

    def slow_open(path: str, *rest: Any, **more: Any) -> Any:
        built.append(path)
        threading.Event().wait(0.1)  # long enough for the other threads to arrive
        return opened(path, *rest, **more)

    monkeypatch.setattr(retrieval.gzip, "open", slow_open)
    threads = [threading.Thread(target=retrieval.Retriever(corpus, k).search, args=("town",)) for k in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [corpus]


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.parent.name for path in TASKS.glob("*/config.yaml")))
def test_shipped_config_parses_and_names_what_exists(name: str) -> None:
    run = config_file.load(TASKS / name / "config.yaml")
    module, attr = run.program.split(":")
    assert module == f"bt_ray.tasks.{name}"
    task = importlib.import_module(module)
    assert issubclass(getattr(task, attr), dspy.Module)
    assert callable(getattr(task, run.metric.split(":")[1]))
    assert ("p", "w", "p") in run.strategy_steps()


@pytest.mark.parametrize("name", sorted(path.parent.name for path in TASKS.glob("*/test.jsonl")))
def test_data_in_the_repository_is_where_the_config_says(name: str) -> None:
    run = config_file.load(TASKS / name / "config.yaml")
    for path in (run.data.train, run.data.val, run.data.test):
        assert path and (Path(run.base_dir) / path).is_file()
