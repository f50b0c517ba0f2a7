"""The adapters' parsers and the readers of a run directory under random input: an error of theirs, or a value."""

from __future__ import annotations

import enum
import functools
import json
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import dspy
import pydantic
import pytest
from dspy.utils.exceptions import AdapterParseError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bt_ray.errors import CommitError, RunDirError
from bt_ray.lm.adapter import make_adapter
from bt_ray.rollout.rows import SegmentWriter, read_rows
from bt_ray.runs.commit import Cost, Step, StepKey, first_attempt, read_record
from bt_ray.runs.files import read_json, read_lines, write_atomic
from bt_ray.runs.lock import RunLock, is_held
from bt_ray.runs.run_dir import RunDir
from tests.support import plans

FUZZ = settings(derandomize=True, deadline=None, max_examples=200, suppress_health_check=list(HealthCheck), database=None)


class Colour(enum.Enum):
    RED = "red"
    TWO = 2


class Order(pydantic.BaseModel):
    item: str
    count: int = 1


SIGNATURES = {
    annotation: dspy.Signature("question -> answer").with_updated_fields("answer", type_=annotation)
    for annotation in (
        str,
        int,
        float,
        bool,
        Literal["yes", "no"],
        Colour,
        list[int],
        dict[str, Any],
        Order,
        int | None,
        dspy.Code,
    )
}
SEVERAL = dspy.Signature("question -> reasoning, answer: int, tags: list[str]")
ADAPTER = make_adapter("compact", constrain=False)
# How an answer of one field is written in each format; what stands there may be anything.
FORMATS: dict[str, Callable[[str], str]] = {
    "compact": lambda text: text,
    "chat": lambda text: f"[[ ## answer ## ]]\n{text}\n\n[[ ## completed ## ]]",
    "json": lambda text: f'{{"answer": {text}}}',
    "xml": lambda text: f"<answer>{text}</answer>",
}
ADAPTERS = {name: make_adapter(name, constrain=False) for name in FORMATS}
TEXTS = (
    st.text(max_size=40)
    | st.text(st.sampled_from('0123456789.eE+-_ []{}",:\\u\nTrueFalseNonyan'), max_size=40)
    | st.sampled_from(
        ["9" * 5000, "[" * 20_000, '{"item": "x", "count": ' + "9" * 5000 + "}", "1e999", "NaN", "٣", "1_0", '"\\ud800"']
    )
)


def parsed(signature: Any, text: str) -> dict[str, Any] | None:
    try:
        return ADAPTER.parse(signature, text)
    except AdapterParseError:
        return None


@FUZZ
@given(st.sampled_from(list(SIGNATURES)), TEXTS)
@example(int, "9" * 5000)
@example(list[int], "[" * 20_000)
@example(list[int], "9" * 5000)
@example(Order, '{"item": "\\ud800"}')
@example(float, "1e999")
def test_one_answer(annotation: Any, text: str) -> None:
    found = parsed(SIGNATURES[annotation], text)
    if found is not None:
        assert set(found) == {"answer"}
    if found is not None and annotation in (str, int, float, bool, list[int]):  # what was read can be written, and read again
        written = ADAPTER.format_assistant_message_content(SIGNATURES[annotation], found)
        assert parsed(SIGNATURES[annotation], written) == found


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_in_each_format_is_a_value_or_a_parse_error(name: str) -> None:
    @settings(FUZZ, max_examples=60, deadline=timedelta(seconds=10))
    @given(st.sampled_from(list(SIGNATURES)), TEXTS, st.sampled_from([FORMATS[name], str, json.dumps]))
    @example(list[int], "[" * 20_000, FORMATS[name])
    @example(int, "9" * 5000, FORMATS[name])
    @example(Colour, '{"item": "x"}', FORMATS[name])
    def one(annotation: Any, text: str, write: Callable[[str], str]) -> None:
        try:
            found = ADAPTERS[name].parse(SIGNATURES[annotation], write(text))
        except AdapterParseError:
            return
        assert set(found) == {"answer"}

    one()


@FUZZ
@given(
    st.lists(
        st.sampled_from(["reasoning: ", "answer: ", "tags: ", "answer:", "\n", "1", "[]", " ", "x"]) | st.text(max_size=8),
        max_size=12,
    )
)
@example(["answer: ", "9" * 5000])
def test_several_answers(parts: list[str]) -> None:
    found = parsed(SEVERAL, "".join(parts))
    assert found is None or (set(found) == {"reasoning", "answer", "tags"} and type(found["answer"]) is int)


# -- files ---------------------------------------------------------------------------------------

Damage = Callable[[bytes], bytes]


def _flip(at: int, bits: int) -> Damage:
    return lambda data: data[: at % len(data)] + bytes([data[at % len(data)] ^ bits]) + data[at % len(data) + 1 :]


def _put(at: int, what: bytes) -> Damage:
    return lambda data: data[: at % len(data)] + what + data[at % len(data) :]


WHERE = st.integers(0, 5000)
DAMAGES = st.lists(
    st.builds(_flip, WHERE, st.integers(1, 255))
    | st.builds(lambda at: lambda data: data[: at % len(data)] or b" ", WHERE)
    | st.builds(
        _put, WHERE, st.sampled_from([b"9" * 5000, b"[" * 20_000, b"null", b"NaN", b"\n", b"\0", b"\xff", b'"', b"\\ud800"])
    ),
    min_size=1,
    max_size=3,
)
WHOLE = (
    b"3", b"null", b"[]", b"{}", b"[" * 50_000, b"9" * 5000, b'{"name": "x"}', b'"\\ud800"',
    b'{"result": "\\ud800", "result_hash": "", "name": "", "stage": "", "attempt": 1, "files": {}, "rows": {}, "cost": {}}',
    b'{"example_id": [], "sample": 0, "accept": true, "error": null}\n', b'{"example_id": "x", "sample": 0}\n',
    b'{"example_id": "x", "sample": 0, "accept": true, "error": {}}\n', b'{"a":' * 50_000 + b"\n",
)  # fmt: skip


@functools.cache
def good_files() -> dict[str, bytes]:
    """What a run writes, by path: a step's attempt, record and file, its rows, a stage's record, the pick, the lock, the header."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(folder)
        run.create(plans.config(), {"follow": "a", "weights": {}}, {})
        step = Step(run.root, StepKey("rollout", {"a": 1}))
        step.begin()
        (step.files / "file").write_text("x")
        writer = SegmentWriter(str(step.rows / "one.jsonl"))
        for sample, error in enumerate([None, {"kind": "parse", "message": "no"}]):
            writer.write(
                {"example_id": "x", "sample": sample, "accept": error is None, "error": error, "calls": [], "score": 1.0}
            )
        writer.close()
        step.commit("p", {"passed": 1}, Cost(1, 2, 3, 4, 5.0))
        write_atomic(run.stage("p") / "record.json", json.dumps({"id": "p", "status": "done", "hash": "h"}))
        write_atomic(run.root / "pick.json", json.dumps({"id": "p", "best_id": "p", "why": "one", "stages": {"p": "h"}}))
        with RunLock(run.root):
            return {str(path.relative_to(run.root)): path.read_bytes() for path in run.root.rglob("*") if path.is_file()}


def endings(folder: Path) -> list[tuple[bool, str | None]]:
    """How each row ended: whether it counts, and the kind of its error."""
    return [(bool(row["accept"]), row["error"]["kind"] if row["error"] else None) for row in read_rows(folder).values()]


def read_all(root: Path, record: Path, rows: Path) -> None:
    """Everything that reads these files; a refusal of ours is fine."""

    def header() -> Any:
        return RunDir(root).config().strategy_steps()

    def hold() -> None:
        with RunLock(root):
            pass

    def pick() -> Any:
        found = RunDir(root).pick()
        return found and (RunDir(root).stage_record(found["id"]), found["stages"].items())

    readers: list[Callable[[], Any]] = [header, lambda: RunDir(root).stage_record("p"), lambda: read_record(record.parent)]
    readers += [pick, lambda: first_attempt(record.parent)["inputs"].items(), lambda: is_held(root), hold]
    for read in [*readers, lambda: endings(rows.parent), lambda: read_json(record), lambda: read_lines(rows)]:
        try:
            read()
        except (CommitError, RunDirError) as error:
            assert str(error)


READ = ("record.json", "run.json", "one.jsonl", "attempt-0001.json", "pick.json", "lock.json")


def spoiled(change: Damage) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in good_files().items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            is_read = path.name in READ
            path.write_bytes(change(data) if is_read else data)
        (record,) = Path(folder, "steps").glob("*/record.json")
        read_all(Path(folder), record, record.parent / "rows" / "one.jsonl")


@FUZZ
@given(DAMAGES)
@example([_put(3716, b"\\ud800")])
@example([_put(3716, b"9" * 5000)])
def test_files_with_bytes_that_were_flipped_cut_or_put_in(damages: list[Damage]) -> None:
    spoiled(lambda data: functools.reduce(lambda found, damage: damage(found), damages, data))


@settings(FUZZ, max_examples=50)
@given(st.sampled_from(WHOLE) | st.binary(min_size=1, max_size=60))
def test_files_with_other_content(content: bytes) -> None:
    spoiled(lambda _: content)


def test_each_known_bad_content() -> None:
    for content in WHOLE:
        spoiled(functools.partial(lambda whole, _: whole, content))


def test_undamaged_files_are_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in good_files().items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_bytes(data)
        (record,) = Path(folder, "steps").glob("*/record.json")
        assert read_record(record.parent) and len(endings(record.parent / "rows")) == 2
        assert RunDir(folder).config() and RunDir(folder).stage_record("p") and RunDir(folder).pick()
        assert first_attempt(record.parent)["inputs"] == {"a": 1} and is_held(Path(folder))
