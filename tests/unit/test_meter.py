import json

from bt_ray.report.meter import RowMeter


def add(path, *tokens, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps({"calls": [{"token_ids": [0] * count} for count in tokens]}) + end)


def test_calls_and_rate_of_a_growing_step(tmp_path):
    meter = RowMeter()
    add(tmp_path / "a" / "one.jsonl", 5, 5)  # an earlier attempt's: counted as calls, not into the rate
    assert meter.read("p", tmp_path / "a", now_s=10.0) == (2, None)
    add(tmp_path / "a" / "two.jsonl", 30)
    assert meter.read("p", tmp_path / "a", now_s=20.0) == (3, 3.0)
    assert meter.read("p", tmp_path / "a", now_s=40.0) == (3, 1.0)  # read once


def test_rows_that_an_earlier_step_paid_for_do_not_count(tmp_path):
    add(tmp_path / "one.jsonl", 5)
    (tmp_path / "reused.jsonl").write_text(json.dumps({"calls": [{"token_ids": [0]}], "reused": True}) + "\n")
    assert RowMeter().read("p", tmp_path, now_s=0.0)[0] == 1


def test_a_stage_goes_on_counting_over_its_steps(tmp_path):
    meter = RowMeter()
    add(tmp_path / "a" / "one.jsonl", 1)
    add(tmp_path / "b" / "deep" / "one.jsonl", 1, 1)
    meter.read("p", tmp_path / "a", now_s=0.0)
    assert meter.read("p", tmp_path / "b", now_s=1.0)[0] == 3
    assert meter.read("p", None, now_s=2.0) == (3, None)
    assert meter.read("w", None, now_s=2.0) == (0, None)


def test_a_torn_line_waits_for_its_end(tmp_path):
    meter = RowMeter()
    path = tmp_path / "one.jsonl"
    path.write_text('{"calls": [{"token')
    assert meter.read("p", tmp_path, now_s=0.0)[0] == 0
    with open(path, "a") as file:
        file.write('_ids": [1]}]}\n')
    assert meter.read("p", tmp_path, now_s=1.0) == (1, 1.0)
