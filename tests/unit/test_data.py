import gzip
import json
from types import SimpleNamespace

import pytest

from bt_ray.config import DataConfig, PromptStep
from bt_ray.data import label_fields, load_splits, read_table, split_rows, step_examples, subsample, used_splits
from bt_ray.errors import ConfigError
from bt_ray.runs.identity import content_hash
from bt_ray.stages.context import StageContext
from tests.support.plans import config


def rows(start, count):
    return [{"text": f"row {number}", "label": number % 2} for number in range(start, start + count)]


def raw(**changes):
    return {"train": rows(0, 4), "val": rows(10, 8), "test": rows(20, 4), **changes}


DATA = DataConfig(train="train.jsonl", val="val.jsonl", test="test.jsonl", inputs=("text",))


def write(folder, name, table):
    text = "".join(json.dumps(row) + "\n" for row in table)
    if name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress(text.encode()))
    else:
        (folder / name).write_text(text)


def test_splits_from_files(tmp_path):
    for name, table in raw().items():
        write(tmp_path, f"{name}.jsonl", table)
    splits = load_splits(DATA, str(tmp_path), seed=0)
    assert {name: len(table) for name, table in splits.items()} == {"train": 4, "test": 4, "search": 4, "select": 4}
    assert splits["train"][0]["inputs"] == {"text": "row 0"}
    assert splits["train"][0]["labels"] == {"label": 0}
    assert splits == split_rows(raw(), DATA, seed=0)


def test_ids_follow_from_content_and_equal_rows_differ():
    first = split_rows(raw(), DATA, seed=0)
    again = split_rows(raw(train=list(reversed(rows(0, 4)))), DATA, seed=0)
    assert {row["id"] for row in first["train"]} == {row["id"] for row in again["train"]}
    double = split_rows(raw(train=[*rows(0, 1), *rows(0, 1)]), DATA, seed=0)["train"]
    assert len({row["id"] for row in double}) == 2


def test_the_cut_of_val_follows_the_seed():
    cuts = [[row["id"] for row in split_rows(raw(), DATA, seed=seed)["search"]] for seed in (0, 0, 1)]
    assert cuts[0] == cuts[1] != cuts[2]


def test_a_draw_keeps_the_order_and_follows_from_seed_and_name():
    table = split_rows(raw(train=rows(100, 40)), DATA, seed=0)["train"]
    draws = [subsample(table, 10, *of) for of in ((0, "train"), (0, "train"), (1, "train"), (0, "search"))]
    assert draws[0] == draws[1] and draws[0] not in draws[2:] and draws[2] != draws[3]
    for draw in draws:
        places = [table.index(row) for row in draw]
        assert len(places) == 10 and places == sorted(set(places)) and places != list(range(10))
    assert [row for row in subsample(table, 25, 0, "train") if row in draws[0]] == draws[0], "a smaller draw lies in a larger one"
    assert all(subsample(table, number, 0, "train") == table for number in (None, 40, 41))


def test_a_prompt_step_draws_from_either_split_by_its_own_number():
    table = split_rows(raw(train=rows(100, 40)), DATA, seed=0)["train"]
    step = PromptStep(optimizer="labeled", max_train_examples=3, max_search_examples=5)
    assert step_examples(step, "train", table, 7) == subsample(table, 3, 7, "train")
    assert step_examples(step, "search", table, 7) == subsample(table, 5, 7, "search")
    assert step_examples(PromptStep(optimizer="labeled"), "search", table, 7) == table


def test_search_examples_that_no_step_draws_are_not_used():
    splits = split_rows(raw(val=rows(100, 40)), DATA, seed=0)

    def used(*numbers):
        steps = {f"p{index}": {"optimizer": "labeled", "max_search_examples": number} for index, number in enumerate(numbers)}
        found = used_splits(config(steps={**steps, "w": {"method": "sft"}}, strategy="w"), splits)
        assert {**found, "search": splits["search"]} == splits
        return found["search"]

    assert used(3, 5) == used(5, 3) == subsample(splits["search"], 5, 0, "search") and len(used(5)) == 5
    assert used(3, None) == used() == splits["search"]


def test_limit_keeps_the_order():
    data = DATA.model_copy(update={"limit": {"train": 2}})
    kept = [row["inputs"]["text"] for row in split_rows(raw(), data, seed=3)["train"]]
    assert len(kept) == 2
    assert kept == sorted(kept)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_plain_and_packed(tmp_path, name):
    write(tmp_path, name, rows(0, 3))
    assert read_table(name, str(tmp_path), "train") == rows(0, 3)


def test_csv_and_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.csv").write_text("text,label\nrow 0,0\nrow 1,1\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(0, 2)), tmp_path / "a.parquet")
    assert read_table("a.csv", str(tmp_path), "train") == rows(0, 2) == read_table("a.parquet", str(tmp_path), "train")


def test_bad_files(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "data.txt").write_text("x")
    for name, says in [
        ("none.jsonl", "there is no file"),
        ("broken.jsonl", "line 2 is no JSON"),
        ("list.jsonl", "line 1 is no JSON object"),
        ("empty.jsonl", "holds no rows"),
        ("binary.jsonl", "no UTF-8"),
        ("data.txt", "is none of .jsonl"),
    ]:
        with pytest.raises(ConfigError) as error:
            read_table(name, str(tmp_path), "train")
        assert says in str(error.value)
        assert "data.train" in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cut.parquet", "cannot be read as parquet: Parquet magic bytes not found in footer"),
        (
            "uneven.csv",
            "cannot be read as csv: Error tokenizing data. C error: Expected 2 fields in line 3, saw 4. Rewrite the file.",
        ),
        ("open.csv", "cannot be read as csv: Error tokenizing data. C error: EOF inside string starting at row 1"),
        ("binary.csv", "cannot be read as csv: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(tmp_path, capfd, name, says):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(0, 50)), tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:600])
    (tmp_path / "uneven.csv").write_text("text,label\nrow 0,0\nrow 1,1,2,3\n")
    (tmp_path / "open.csv").write_text('text,label\n"row 0,0\nrow 1,1\n')
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as error:
        read_table(name, str(tmp_path), "train")
    assert str(error.value).startswith(f"data.train: {tmp_path / name} {says}")
    assert "\n" not in str(error.value) and ".." not in str(error.value) and str(error.value).endswith(". Rewrite the file.")
    assert capfd.readouterr() == ("", "")


UNEVEN = [{"q": "x", "a": 1}, {"q": "y", "a": 2.5, "note": "n"}, {"q": "z", "a": 3, "note": None}]


def uneven(form, folder):
    """Splits of the same uneven rows: read from files of a form, and given from Python."""
    import pyarrow
    import pyarrow.parquet

    tables = {name: [{**row, "q": f"{row['q']} {name}"} for row in UNEVEN] for name in ("train", "val")}
    for name, table in tables.items():
        if form == "parquet":
            table = [{**row, "a": float(row["a"])} for row in table]  # a column has one type
            tables[name] = table
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table, schema_of(pyarrow)), folder / f"{name}.parquet")
        else:
            write(folder, f"{name}.{form}", table)
    data = DataConfig(train=f"train.{form}", val=f"val.{form}", inputs=("q",))
    return load_splits(data, str(folder), seed=0), split_rows(tables, data, seed=0)


def schema_of(pyarrow):
    return pyarrow.schema([("q", pyarrow.string()), ("a", pyarrow.float64()), ("note", pyarrow.string())])


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
def test_uneven_rows_of_a_file_are_those_from_python(tmp_path, form):
    read, given = uneven(form, tmp_path)
    assert content_hash(read) == content_hash(given)
    assert [sorted(row["labels"]) for row in read["train"]] == [["a"], ["a", "note"], ["a"]]
    if form != "parquet":
        assert [repr(row["labels"]["a"]) for row in read["train"]] == ["1", "2.5", "3"]


def test_dates_in_json_lines_stay_text(tmp_path):
    table = [{"text": f"2024-01-0{day}", "at": f"2024-01-0{day}T10:00:00", "on": "2024-01-01"} for day in range(1, 7)]
    for name, part in (("train", table[:3]), ("val", table[3:])):
        write(tmp_path, f"{name}.jsonl", part)
    data = DataConfig(train="train.jsonl", val="val.jsonl", inputs=("text",))
    first = load_splits(data, str(tmp_path), seed=0)["train"][0]
    assert (first["inputs"], first["labels"]) == ({"text": "2024-01-01"}, {"at": "2024-01-01T10:00:00", "on": "2024-01-01"})


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/x:train", ("org/x", None, "train")),
        ("org/x:train[:100]", ("org/x", None, "train[:100]")),
        ("org/x:train[10:20]+test[:5%]", ("org/x", None, "train[10:20]+test[:5%]")),
        ("openai/gsm8k:main:train", ("openai/gsm8k", "main", "train")),
        ("openai/gsm8k:main:train[:100]", ("openai/gsm8k", "main", "train[:100]")),
    ],
)
def test_a_split_of_the_hub(tmp_path, monkeypatch, source, asked):
    calls = []

    def load_dataset(path, name=None, split=None):
        calls.append((path, name, split))
        return iter(rows(0, 2))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_table(source, str(tmp_path), "train") == rows(0, 2)
    assert calls == [asked]


def test_a_split_of_the_hub_that_cannot_be_read(tmp_path, monkeypatch):
    from datasets.exceptions import DatasetGenerationError

    def load_dataset(path, name=None, split=None):
        raise ValueError("Config name is missing.") if name is None else DatasetGenerationError("broken")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for source, says in [
        (
            "org/x:train",
            "'org/x', split 'train', cannot be read: Config name is missing. Name it as `id:split` or `id:config:split`",
        ),
        ("org/x:main:train", "'org/x', config 'main', split 'train', cannot be read: broken"),
        ("org/x:", "'org/x:' is no file and no split of the hub"),
        ("org/x:a:b:c", "no split of the hub"),
    ]:
        with pytest.raises(ConfigError) as error:
            read_table(source, str(tmp_path), "val")
        assert says in str(error.value) and "data.val" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": [{"label": 1}]}, "row 1 lacks the input 'text'. It has: label"),
        ({"train": []}, "data.train holds no rows"),
        ({"test": rows(12, 1)}, "test row 1 has the same inputs as val row 3"),
        ({"val": rows(10, 1)}, "needs 2 or more"),
    ],
)
def test_bad_rows(changes, says):
    with pytest.raises(ConfigError) as error:
        split_rows(raw(**changes), DATA, seed=0)
    assert says in str(error.value)


def test_a_label_that_is_null_in_one_row_is_a_label(tmp_path):
    rows = [{"text": "a", "side": None}, {"text": "b", "side": "left"}, {"text": "c", "side": "right", "why": "it is"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": name, "side": "left"}) + "\n" for name in "xy"))
    config = DataConfig.model_validate({"train": "train.jsonl", "val": "val.jsonl", "inputs": ["text"]})
    train = load_splits(config, str(tmp_path), 0)["train"]
    assert train[0]["labels"] == {} and label_fields(train) == ["side", "why"]
    identity = {"signatures": {"one": {"inputs": ["text"], "outputs": ["side"]}}}
    ctx = SimpleNamespace(examples=lambda split: train, identity=identity)
    assert StageContext.labelled_outputs(ctx) == {"one": ["side"]}
