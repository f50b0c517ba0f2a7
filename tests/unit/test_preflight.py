"""Bad input: one clear sentence, exit code 2, no traceback, before anything starts."""

import json
import re

import dspy
import numpy
import pytest
from dspy.utils import DummyLM

from bt_ray import config_file, preflight, running
from bt_ray.cli import main
from bt_ray.errors import ConfigError
from bt_ray.preflight import probe_metric
from bt_ray.rollout.program import Metric
from bt_ray.runs.run_dir import RunDir
from tests.support.tiny_run import write_run


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("good"))


@pytest.fixture
def case(good, tmp_path, monkeypatch):
    """Copy of a good run folder that a test may spoil; `case.run()` gives the refusal's sentence."""
    monkeypatch.setenv("BT_RAY_HOME", str(good.parent / "home"))
    return Case(good, tmp_path)


class Case:
    def __init__(self, good, folder):
        self.folder = folder
        for path in good.parent.iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
        self.config = folder / "config.yaml"

    def spoil(self, name, old, new):
        path = self.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def refusal(self, capsys, *arguments):
        code = main(["run", str(self.config), "--run-dir", str(self.folder / "run"), *arguments])
        error = capsys.readouterr().err
        assert code == 2, error
        assert "Traceback" not in error
        assert not (self.folder / "run" / "run.json").exists()
        return error


# Metrics that go wrong on a wrong answer, on a later row, or on every row.
FORGETS = "if example.side == prediction.side:\n        return True"
FORGETS_LATER = "return None if 'number 6' in example.text else example.side == prediction.side"
MISSPELT = "if example.side == prediction.side:\n        return True\n    return exmple.side == 'left'"


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("config.yaml", "train: train.jsonl", "train: trian.jsonl", "there is no file"),
        ("train.jsonl", '"side"', '"side', "line 1 is no JSON"),
        ("config.yaml", "inputs: [text]", "inputs: [body]", "lacks the input 'body'"),
        ("config.yaml", "inputs: [text]", "inputs: []", "line 4: data.inputs: Tuple should have at least 1 item"),
        ("program.py", "aforward(self, text)", "aforward(self, text, topic)", "needs the input 'topic'"),
        ("program.py", "(text=text, colour=colour)", "(text=text)", "The predictor 'side' needs the input 'colour', and no call"),
        ("config.yaml", "program.py:Program", "program.py:Progam", "has no 'Progam'"),
        ("config.yaml", "program.py:Program", "nowhere:Program", "there is no module 'nowhere'"),
        ("program.py", "import dspy", "import dspyy", "fails with ModuleNotFoundError"),
        ("program.py", "def exact(example, prediction, trace=None):", "def exact(example):", "cannot take (example, prediction)"),
        ("program.py", "return example.side == prediction.side", "return float('nan')", "returned nan for train row 1"),
        ("program.py", "return example.side == prediction.side", "return None", "returned None for train row 1"),
        ("program.py", "return example.side == prediction.side", "return 'good'", "returned 'good' of type str for train row 1"),
        ("program.py", "return example.side == prediction.side", FORGETS, "returned None for train row 1"),
        ("program.py", "return example.side == prediction.side", FORGETS_LATER, "returned None for train row 7"),
        ("program.py", "return example.side == prediction.side", MISSPELT, "name 'exmple' is not defined"),
        ("config.yaml", '["p -> w -> p", "w"]', '"p, w"', "A comma could mean two"),
        ("config.yaml", '["p -> w -> p", "w"]', '"p -> v"', "names the step 'v'"),
        ("config.yaml", "random_fewshot", "random_fewshots", "did you mean 'random_fewshot'"),
        ("config.yaml", "max_model_len: 1024", "max_model_len: 20", "the context holds 20"),
        ("config.yaml", "lora_rank: 8", "lora_rank: 8, target_modules: [q_prj]", "did you mean 'q_proj'"),
        (
            "config.yaml",
            "lora_rank: 8",
            "lora_rank: 8, target_modules: q_proj",
            "steps.w.target_modules: 'q_proj' matches no layer",
        ),
        (
            "config.yaml",
            "lora_rank: 8",
            "lora_rank: 8, layers: [0, 9]",
            "steps.w.layers: [9] do not exist; the model has 2 layers",
        ),
        ("config.yaml", "seed: ", "budget: {max_lm_calls: 30}\nseed: ", "max_lm_calls: 30 cannot pay for one candidate"),
        ("config.yaml", "max_model_len: 1024", "max_model_len: 1024, tensor_parallel_size: 8", "asks for 8 GPUs"),
    ],
)
def test_spoiled_input(case, capsys, name, old, new, says):
    case.spoil(name, old, new)
    assert says in case.refusal(capsys)


def probe(function, labels=("left", "right")):
    rows = [{"id": str(number), "inputs": {"text": "x"}, "labels": {"side": side}} for number, side in enumerate(labels)]
    probe_metric(Metric.of(function, "metric"), rows)


def unassigned(example, prediction):
    if example.side == prediction.side:
        score = 1.0
    return score


@pytest.mark.parametrize(
    "metric",
    [
        lambda example, prediction: numpy.bool_(example.side == prediction.side),
        lambda example, prediction: numpy.float32(0.5),
        lambda example, prediction: numpy.int64(1),
        lambda example, prediction: dspy.Prediction(score=numpy.bool_(True), feedback="good"),
        # What follows is for the rows to say: with real predictions it may go well.
        lambda example, prediction: prediction.reasoning == "good",
        lambda example, prediction: eval(prediction.side),
        lambda example, prediction: dspy.Predict("question -> answer")(question="?").answer == "yes",
        unassigned,
    ],
)
def test_metrics_that_are_let_through(metric):
    probe(metric)


def test_the_probe_names_the_undefined_name_and_its_line():
    def metric(example, prediction):
        return exmple.side  # noqa: F821

    line = metric.__code__.co_firstlineno + 1
    with pytest.raises(ConfigError, match=rf"'exmple' is not defined.*test_preflight.py, line {line}\).*train row 1"):
        probe(metric)


def test_the_probe_asks_no_lm_that_is_configured_here():
    lm = DummyLM([{"answer": "yes"}] * 9)
    with dspy.context(lm=lm):
        probe(lambda example, prediction: dspy.Predict("question -> answer")(question="?").answer == "yes")
    assert not lm.history


def test_the_probe_leaves_the_rows_as_they_are():
    def sorts(example, prediction):
        prediction.side.sort()
        example.side.sort()
        return example.side == prediction.side

    labels = [["b", "a"], ["d", "c"]]
    probe(sorts, labels)
    assert labels == [["b", "a"], ["d", "c"]]


def test_a_slow_metric_is_tried_on_fewer_rows(monkeypatch):
    seen = []
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(preflight.time, "monotonic", lambda: next(clock))
    probe(lambda example, prediction: seen.append(1) or True, labels="ab" * 20)
    assert len(seen) == 2


def test_unknown_model_names_the_nearest(case, capsys):
    assert "smollm2-135m" in case.refusal(capsys, "--set", "model=smollm2-153m")


def test_empty_split(case, capsys):
    (case.folder / "val.jsonl").write_text("")
    assert "data.val: " in (error := case.refusal(capsys))
    assert "holds no rows" in error


def test_a_row_in_two_splits(case, capsys):
    row = (case.folder / "train.jsonl").read_text().splitlines()[0]
    with open(case.folder / "test.jsonl", "a") as file:
        file.write(row + "\n")
    assert "test row 7 has the same inputs as train row 1" in case.refusal(capsys)


def add_row(case, name, **changes):
    path = case.folder / name
    row = json.loads(path.read_text().splitlines()[0]) | changes
    path.write_text(path.read_text() + json.dumps(row) + "\n")


@pytest.mark.parametrize(("name", "split"), [("val.jsonl", "(search|select)"), ("test.jsonl", "test")])
def test_a_long_example_of_any_split_does_not_fit(case, capsys, name, split):
    add_row(case, name, text="word " * 3000, side="left")
    error = case.refusal(capsys)
    assert re.search(rf"longest prompt of 'colour' \({split} row, id \w+\) with 0 demos takes \d+ tokens", error)


def test_a_search_example_that_no_step_draws_need_not_fit(case, capsys, monkeypatch):
    def check_context(config, program, splits, weights):
        raise ConfigError(f"{len(splits['search'])} of search")

    monkeypatch.setattr(preflight, "check_context", check_context)
    assert "1 of search" in case.refusal(capsys, "--set", "steps.p.max_search_examples=1")


def test_what_fits_without_demos_and_not_with_them_names_their_number(case, capsys):
    add_row(case, "train.jsonl", text="word " * 60, side="left")
    case.spoil(
        "config.yaml", "max_bootstrapped_demos: 2, max_labeled_demos: 2", "max_bootstrapped_demos: 1, max_labeled_demos: 4"
    )
    case.spoil("config.yaml", "max_model_len: 1024", "max_model_len: 512")
    error = case.refusal(capsys)
    tokens = re.search(r"longest prompt of 'side' \(train row, id \w+\) with 4 demos takes (\d+) tokens", error)
    assert int(tokens[1]) > 512 - 8
    assert "the answer up to 8 (rollout.max_tokens), and the context holds 512" in error
    assert "lower max_bootstrapped_demos, max_labeled_demos or rollout.max_tokens" in error


def test_a_long_example_does_not_fit_and_the_three_numbers_are_named(case, capsys):
    row = json.loads((case.folder / "train.jsonl").read_text().splitlines()[0])
    with open(case.folder / "train.jsonl", "a") as file:
        file.write(json.dumps({**row, "text": "word " * 3000}) + "\n")
    error = case.refusal(capsys)
    assert "tokens, the answer up to 8 (rollout.max_tokens), and the context holds 1024" in error


@pytest.mark.parametrize(("content", "says"), [(None, "no file that there is"), ("\n", "an empty file")])
def test_a_key_file_without_a_key_is_refused_before_the_run(case, content, says, monkeypatch):
    """Before its driver; a plan needs no key."""
    named = "p: {optimizer: opro, proposer: {model: openai/x, api_key_file: keys/key},"
    case.spoil("config.yaml", "p: {optimizer: random_fewshot,", named)
    (case.folder / "keys").mkdir()
    if content:
        (case.folder / "keys" / "key").write_text(content)
    config = config_file.load(case.config)
    run, prepared = RunDir(case.folder / "run"), preflight.prepare(config)
    run.create(config, prepared.identity, prepared.splits)
    monkeypatch.setattr(running, "Driver", None)  # nothing is begun, whatever fails here
    with pytest.raises(ConfigError, match=rf"proposer\.api_key_file: it names {says}"):
        running.carry_out(run, None)


def test_unwritable_directory(case, capsys):
    (case.folder / "run").write_text("a file is in the way")
    assert main(["run", str(case.config), "--run-dir", str(case.folder / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_verbs_on_a_folder_that_is_no_run(tmp_path, capsys):
    for arguments in (["status", str(tmp_path)], ["report", str(tmp_path)], ["ask", str(tmp_path), "hello"]):
        assert main(arguments) == 2
        assert "no run directory" in capsys.readouterr().err
