from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import tracemalloc

import pytest

from bt_ray.errors import CommitError
from bt_ray.lm.types import Weights
from bt_ray.rollout.rows import SegmentWriter, StoredRows, done_keys, read_rows
from bt_ray.rollout.tasks import RolloutPlan, chunks, write_tasks
from bt_ray.runs.identity import content_hash, hash_of_items

BASE = Weights(id="base0000", kind="base", model_dir="/none", base_dir="/none")


def row(example_id, sample=0, **more):
    return {"example_id": example_id, "sample": sample, "accept": False, "error": None, **more}


def test_rows_are_on_disk_as_they_are_written(tmp_path):
    writer = SegmentWriter(str(tmp_path / "deep" / "a.jsonl"))
    writer.write(row("1", accept=True))
    writer.write(row("1", 1, error={"kind": "parse", "message": "ü"}))
    rows = read_rows(str(tmp_path / "deep"))  # the writer is still open
    assert set(rows) == {("1", 0), ("1", 1)}
    assert rows["1", 1]["error"]["message"] == "ü"
    assert [rows["1", sample]["accept"] for sample in (0, 1)] == [True, False]


def test_numbers_come_back_as_they_were_written(tmp_path):
    """Also integers that a model makes by repeating a digit."""
    written = row("1", prediction={"long": 10**30 + 1, "longer": 10**400, "share": 0.1 + 0.2, "small": 5e-324, "minus": -(2**64)})
    writer = SegmentWriter(str(tmp_path / "a.jsonl"))
    writer.write(written)
    assert read_rows(tmp_path) == {("1", 0): written}


def test_a_torn_last_line_is_not_a_row_and_the_next_writer_cuts_it_off(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row("1")) + "\n" + json.dumps(row("2"))[:20])
    assert done_keys(str(tmp_path)) == {("1", 0)}
    writer = SegmentWriter(str(path))
    writer.write(row("3"))
    assert done_keys(str(tmp_path)) == {("1", 0), ("3", 0)}


def test_a_file_that_is_one_torn_line_is_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"example_id"')
    assert read_rows(str(tmp_path)) == {}
    SegmentWriter(str(tmp_path / "a.jsonl")).close()
    assert (tmp_path / "a.jsonl").read_text() == ""


def test_damage_in_the_middle_is_said_with_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row("1")) + "\nxx\n" + json.dumps(row("2")) + "\n")
    with pytest.raises(CommitError, match=r"a\.jsonl, line 2"):
        read_rows(str(tmp_path))


def test_the_first_of_two_equal_rows_counts(tmp_path):
    for name, score in (("a", 1.0), ("b", 0.0)):
        SegmentWriter(str(tmp_path / f"{name}.jsonl")).write(row("1", score=score))
    assert read_rows(str(tmp_path))["1", 0]["score"] == 1.0


def test_no_folder_means_no_rows(tmp_path):
    assert read_rows(str(tmp_path / "none")) == {}


def test_tasks_file_and_chunks(tmp_path):
    examples = [{"id": i, "inputs": {"q": f"ü{i}"}, "labels": {}} for i in range(3)]
    path = str(tmp_path / "x" / "tasks.parquet")
    plan = RolloutPlan(path, "", {"predictors": {}}, BASE, 1.0, 9, 3, chunk_size=2, timeout_s=9.0)
    write_tasks(path, iter(examples), samples=2, group_size=plan.group_size)
    tasks = plan.read_tasks()
    assert [(task.example, task.sample) for task in tasks] == [(example, sample) for example in examples for sample in (0, 1)]
    assert [task.key for task in tasks[:3]] == [("0", 0), ("0", 1), ("1", 0)]
    assert (tasks[0].temperature, tasks[0].max_tokens, tasks[0].seed) == (1.0, 9, 3)
    assert [len(part) for part in chunks(tasks, 4)] == [4, 2]
    assert plan.num_groups() == 2 and plan.read_group(1) == tasks[4:]


def test_writing_tasks_takes_the_memory_of_one_group(tmp_path):
    import pyarrow.parquet  # noqa: F401 - its own memory is not the file's

    tracemalloc.start()
    peaks = []
    for count in (200, 20_000):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[1]
        write_tasks(str(tmp_path / f"{count}.parquet"), ({"id": str(i), "inputs": {"q": "x" * 100}} for i in range(count)), 1, 64)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] + 200_000, peaks


def test_what_comes_after_the_seal_is_not_looked_at_and_what_changed_is_found(tmp_path):
    writer = SegmentWriter(str(tmp_path / "b.jsonl"))
    writer.write(row("1", score=1.0))
    sealed = StoredRows(tmp_path, [("1", 0)]).sealed
    late = SegmentWriter(str(tmp_path / "a.jsonl"))  # a name that comes first
    late.write(row("1", score=0.0))
    writer.write(row("1", score=0.5))
    assert [one["score"] for one in StoredRows(tmp_path, [("1", 0)], sealed)] == [1.0]
    assert [one["score"] for one in StoredRows(tmp_path, [("1", 0)])] == [0.0]
    assert [one["score"] for one in read_rows(tmp_path, sealed).values()] == [1.0]
    path = tmp_path / "b.jsonl"
    path.write_text(path.read_text().replace("1.0", "0.0"))
    with pytest.raises(CommitError, match=r"b\.jsonl is gone, or differs"):
        StoredRows(tmp_path, [("1", 0)], sealed)
    path.write_text("")
    with pytest.raises(CommitError, match=r"b\.jsonl is gone, or differs"):
        StoredRows(tmp_path, [("1", 0)], sealed)
    path.unlink()
    with pytest.raises(CommitError, match=r"b\.jsonl is gone, or differs from its record"):
        StoredRows(tmp_path, [("1", 0)], sealed)


def test_stored_rows_stay_on_the_disk_and_come_in_the_order_asked_for(tmp_path):
    first, second = (SegmentWriter(str(tmp_path / name)) for name in ("b.jsonl", "a.jsonl"))
    for number in range(100):
        (first if number % 3 else second).write(row(f"ü{number}", text="x" * 1000))
    second.write(row("ü4", text="written again"))
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"torn')
    keys = [(f"ü{number}", 0) for number in reversed(range(100))]
    rows = StoredRows(tmp_path, keys)
    assert len(rows) == 100 and [(one["example_id"], one["sample"]) for one in rows] == keys
    whole = read_rows(tmp_path)
    assert list(rows) == [whole[key] for key in keys] == [rows[index] for index in range(100)]
    assert rows[95]["text"] == "written again" and rows[-1] == rows[99] and rows[3:5] == [rows[3], rows[4]]
    assert len(pickle.dumps(rows)) < 5_000
    with pytest.raises(CommitError, match="lacks 1 of 2 rows, the first of them example 'other', sample 1"):
        StoredRows(tmp_path, [keys[0], ("other", 1)])


def test_the_hash_of_items_is_that_of_their_list():
    for items in ([], [1], [["a", 0, None], {"ü": [1.5]}]):
        assert hash_of_items(iter(items)) == content_hash(items)


def test_the_driving_side_loads_neither_dspy_nor_ray_nor_torch():
    code = "import bt_ray.rollout.pipeline, sys; print([m for m in ('dspy', 'ray', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_weights_survive_json(tmp_path):
    assert Weights.from_json(json.loads(json.dumps(BASE.to_json()))) == BASE


@pytest.mark.asyncio
async def test_a_batch_that_wants_to_be_alone_is_and_those_that_come_later_wait():
    from bt_ray.rollout.worker import Turns

    turns, seen, inside = Turns(), [], []

    async def batch(name, alone):
        async with turns.take(alone):
            inside.append(name)
            seen.append((name, tuple(inside)))
            await asyncio.sleep(0.01)
            inside.remove(name)

    first = [asyncio.create_task(batch(name, False)) for name in "ab"]
    await asyncio.sleep(0)
    later = [
        asyncio.create_task(batch("alone", True)),
        asyncio.create_task(batch("c", False)),
        asyncio.create_task(batch("d", False)),
    ]
    await asyncio.gather(*first, *later)
    assert seen == [("a", ("a",)), ("b", ("a", "b")), ("alone", ("alone",)), ("c", ("c",)), ("d", ("c", "d"))]
