"""Bad input: one clear sentence, exit code 2, no traceback, before anything starts."""

import json

import pytest

from bt_ray.cli import main
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


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("config.yaml", "train: train.jsonl", "train: trian.jsonl", "there is no file"),
        ("train.jsonl", '"side"', '"side', "line 1 is no JSON"),
        ("config.yaml", "inputs: [text]", "inputs: [body]", "lacks the input 'body'"),
        ("program.py", "aforward(self, text)", "aforward(self, text, topic)", "needs the input 'topic'"),
        ("config.yaml", "program.py:Program", "program.py:Progam", "has no 'Progam'"),
        ("config.yaml", "program.py:Program", "nowhere:Program", "there is no module 'nowhere'"),
        ("program.py", "import dspy", "import dspyy", "fails with ModuleNotFoundError"),
        ("program.py", "def exact(example, prediction, trace=None):", "def exact(example):", "cannot take (example, prediction)"),
        ("program.py", "return example.side == prediction.side", "return float('nan')", "returned nan for train row 1"),
        ("program.py", "return example.side == prediction.side", "return None", "returned None for train row 1"),
        ("program.py", "return example.side == prediction.side", "return 'good'", "returned 'good' for train row 1"),
        ("config.yaml", '["p -> w -> p", "w"]', '"p, w"', "A comma could mean two"),
        ("config.yaml", '["p -> w -> p", "w"]', '"p -> v"', "names the step 'v'"),
        ("config.yaml", "random_fewshot", "random_fewshots", "did you mean 'random_fewshot'"),
        ("config.yaml", "max_model_len: 1024", "max_model_len: 20", "the context holds 20"),
        ("config.yaml", "lora_rank: 8", "lora_rank: 8, target_modules: [q_prj]", "did you mean 'q_proj'"),
        ("config.yaml", "max_model_len: 1024", "max_model_len: 1024, tensor_parallel_size: 8", "asks for 8 GPUs"),
    ],
)
def test_spoiled_input(case, capsys, name, old, new, says):
    case.spoil(name, old, new)
    assert says in case.refusal(capsys)


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


def test_a_long_example_does_not_fit_and_the_three_numbers_are_named(case, capsys):
    row = json.loads((case.folder / "train.jsonl").read_text().splitlines()[0])
    with open(case.folder / "train.jsonl", "a") as file:
        file.write(json.dumps({**row, "text": "word " * 3000}) + "\n")
    error = case.refusal(capsys)
    assert "tokens, the answer up to 8 (rollout.max_tokens), and the context holds 1024" in error


def test_unwritable_directory(case, capsys):
    (case.folder / "run").write_text("a file is in the way")
    assert main(["run", str(case.config), "--run-dir", str(case.folder / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_verbs_on_a_folder_that_is_no_run(tmp_path, capsys):
    for arguments in (["status", str(tmp_path)], ["report", str(tmp_path)], ["ask", str(tmp_path), "hello"]):
        assert main(arguments) == 2
        assert "no run directory" in capsys.readouterr().err
