"""Keys are named, never written: a canary value is looked for in all that a run writes, sends and says. Logs hold no prompts."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bt_ray import config_file, running
from bt_ray.cluster import stage_runtime_env
from bt_ray.config import ProposerConfig, RunConfig
from bt_ray.config_base import SECRET_NAME
from bt_ray.driver import Driver
from bt_ray.errors import ConfigError, PoolError, PromptTooLongError
from bt_ray.lm.endpoint import EndpointPool
from bt_ray.lm.replica import EngineReplica, Refused
from bt_ray.lm.types import LMCall, Sampling
from bt_ray.report.build import build_report
from bt_ray.report.facts import collect
from bt_ray.report.html import render_html
from bt_ray.rollout.candidates import extract
from bt_ray.rollout.program import ProgramSpec
from bt_ray.rollout.rows import SegmentWriter
from bt_ray.rollout.runner import ProgramRunner
from bt_ray.rollout.tasks import RolloutTask
from bt_ray.runs.commit import Cost, Step, StepKey
from bt_ray.runs.files import write_atomic
from bt_ray.runs.run_dir import RunDir
from tests.support import plans, programs
from tests.support.stub_pool import BASE, StubPool

CANARY = "sk-canary-5f2c9b7e"
VARIABLE = "MY_API_KEY"
PROPOSER = {"model": "openai/x", "base_url": "http://127.0.0.1:9/v1", "api_key_env": VARIABLE}
CALL = LMCall(BASE, Sampling(), ({"role": "user", "content": "the prompt's own words"},))


def keyed(proposer: dict[str, str]) -> RunConfig:
    step = {"optimizer": "opro", "proposer": proposer}
    return plans.config(steps={"p": step, "w": {"method": "sft"}}, strategy="p")


async def rows_of(run: RunDir) -> list[dict[str, Any]]:
    """The program on the stub pool, row by row, as a worker has them."""
    runner = ProgramRunner(
        ProgramSpec("tests.support.programs:TwoModules", "tests.support.programs:exact", "compact"), StubPool(programs.answer)
    )
    tasks = [RolloutTask(programs.example(number), 0, extract(programs.TwoModules()), BASE, 0.0, 16, 0) for number in range(3)]
    return [await runner.run(task) for task in tasks]


def whole_run(root: Path, proposer: dict[str, str]) -> RunDir:
    """A run directory with all that a run leaves: header, plan, rows, records, an error of the endpoint, a pick."""
    run = RunDir(root)
    examples = [programs.example(number) for number in range(3)]
    signatures = {name: {"inputs": ["message"], "outputs": ["intent"]} for name in ("route", "classify")}
    identity = {"follow": examples[0]["id"], "weights": {**BASE.to_json(), "model_dir": str(root)}, "signatures": signatures}
    run.create(keyed(proposer), identity, dict.fromkeys(("train", "search", "select"), examples))
    write_atomic(root / "plan.json", json.dumps(running._planned(run)))
    step = Step(root, StepKey("evaluate", {"of": "vanilla"}))
    step.begin()
    writer = SegmentWriter(str(step.rows / "one.jsonl"))
    for row in asyncio.run(rows_of(run)):
        writer.write(row)
    writer.close()
    record = step.commit("vanilla", {"passed": 1}, Cost(1, 1, 1, 0, 1.0))
    scores = {row["id"]: 1.0 for row in examples}
    done = {"id": "vanilla", "path": "vanilla", "kind": "vanilla", "status": "done", "note": None, "hash": "h"}
    done |= {
        "candidate": extract(programs.TwoModules()),
        "evaluate": record.name,
        "steps": [record.name],
        "cost": record.cost.to_json(),
    }
    write_atomic(run.stage("vanilla") / "record.json", json.dumps({**done, "select_scores": scores, "row_errors": 0}))
    Driver(run, lambda seen: None)._note_error("p", "failed", asked(proposer))
    write_atomic(
        root / "pick.json", json.dumps({"id": "vanilla", "best_id": "vanilla", "why": "one", "stages": {"vanilla": "h"}})
    )
    return run


def asked(proposer: dict[str, str] = PROPOSER) -> str:
    """What is said of an endpoint that repeats the key which it refuses."""
    pool = EndpointPool(ProposerConfig.model_validate(proposer), ".")
    with pytest.raises(PoolError) as error:
        asyncio.run(pool.generate(CALL))
    assert error.value.__cause__ is None, "a chain of errors is printed whole"
    return str(error.value)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"401: Incorrect API key provided: {self.kwargs.get('api_key')}")

    monkeypatch.setenv(VARIABLE, CANARY)
    monkeypatch.setattr("dspy.LM.acall", refuse)


@pytest.fixture(params=[VARIABLE, "key.txt"])
def proposer(request: pytest.FixtureRequest, key: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A proposer whose key is in a variable, or in a file."""
    if request.param == VARIABLE:
        return PROPOSER
    monkeypatch.delenv(VARIABLE)
    (tmp_path / "key.txt").write_text(f"{CANARY}\n")
    return {"model": PROPOSER["model"], "base_url": PROPOSER["base_url"], "api_key_file": str(tmp_path / "key.txt")}


def test_a_key_is_in_nothing_that_a_run_writes_or_says(
    tmp_path: Path, proposer: dict[str, str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    run = whole_run(tmp_path / "run", proposer)
    facts = collect(run)
    report = build_report(facts)
    (run.root / "report.json").write_text(json.dumps(report))
    (run.root / "report.html").write_text(render_html(report, facts))
    files = [path for path in run.root.rglob("*") if path.is_file()]
    assert {"run.json", "plan.json", "error.json", "record.json", "one.jsonl", "report.html"} <= {path.name for path in files}
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    said = capfd.readouterr()
    assert CANARY not in caplog.text + said.out + said.err
    told = json.loads((run.stage("p") / "error.json").read_text())["message"]
    assert "Incorrect API key provided: ***" in told
    reference = proposer.get("api_key_env") or proposer["api_key_file"]
    assert reference in (run.root / "run.json").read_text(), "the reference is kept"


def test_a_stage_job_is_sent_no_secret() -> None:
    own = {"env_vars": {VARIABLE: CANARY, "HF_TOKEN": CANARY, "PASSWORD": CANARY, "MINE": "1", "RAY_AUTH_TOKEN_PATH": "/t"}}
    sent = stage_runtime_env(own)
    assert CANARY not in json.dumps(sent)
    assert sent["env_vars"]["MINE"] == "1" and sent["env_vars"]["RAY_AUTH_TOKEN_PATH"] == "/t"


@pytest.mark.parametrize("name", ["api_key", "apikey", "OPENAI_API_KEY", "token", "HF_TOKEN", "db_password", "client_secret"])
def test_names_of_secrets(name: str) -> None:
    assert SECRET_NAME.search(name)
    assert not SECRET_NAME.search(f"{name}_path") and not SECRET_NAME.search("max_tokens") and not SECRET_NAME.search("monkey")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (f"steps.p.proposer.api_key_env={CANARY}", "no name of an environment variable"),
        (f"steps.p.proposer.base_url=https://me:{CANARY}@host/v1", "base_url holds a password"),
        (f"steps.p.proposer.api_key={CANARY}", "unknown key"),
        (f"steps.p.options.api_key={CANARY}", "would be written down"),
        (f"steps.p.proposer.base_url=[{CANARY}]", "valid string"),
        (f"steps.p.proposer={CANARY}", "valid dictionary"),
    ],
)
def test_a_key_in_the_config_is_refused_and_not_repeated(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        config_file.with_overrides(keyed(PROPOSER), (override,))
    assert CANARY not in str(error.value)


def test_a_key_in_place_of_its_files_path_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_key_file: it names no file") as error:
        EndpointPool(ProposerConfig(model="openai/x", api_key_file=CANARY), str(tmp_path))
    assert CANARY not in str(error.value)


# -- prompts -------------------------------------------------------------------------------------


class Talkative:
    """An engine that meets each end of a call."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    async def answer(self) -> Any:
        if self.error:
            raise self.error
        return "an answer"


@pytest.mark.parametrize("error", [None, PromptTooLongError("99 tokens"), PoolError("gone"), RuntimeError("a kernel failed")])
def test_a_replicas_log_has_no_prompt(error: Exception | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    replica = SimpleNamespace()  # of a replica the guard alone: the whole would watch its lease in a cluster
    found = asyncio.run(EngineReplica._guarded(replica, Talkative(error).answer()))  # type: ignore[arg-type]
    assert isinstance(found, Refused) == (error is not None)
    assert "own words" not in caplog.text and "an answer" not in caplog.text
    assert ("a call failed" in caplog.text) == isinstance(error, RuntimeError)


def test_what_a_program_asks_and_is_answered_is_in_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows hold prompts, tokens and answers: they are data. A log of any level has none of them."""
    caplog.set_level(logging.DEBUG)
    rows = asyncio.run(rows_of(RunDir(tmp_path)))
    words = [example["inputs"]["message"] for example in (programs.example(number) for number in range(3))]
    assert [row for row in rows if row["calls"]] and all(words)
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith(("bt_ray", "dspy")))
    assert not [word for word in words if word in ours]


def test_a_program_workers_dspy_says_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bt_ray.rollout.worker.end_with_parent", lambda: None)  # that is for a process of its own
    import dspy  # sets its logger up, which a worker quietens

    from bt_ray.rollout.worker import ProgramWorker

    lines = logging.getLogger(f"{dspy.__name__}.predict.react")
    logging.getLogger(dspy.__name__).setLevel(logging.INFO)
    lines.warning("a control: said")
    ProgramWorker(ProgramSpec("tests.support.programs:TwoModules", "tests.support.programs:exact"), StubPool(programs.answer))
    lines.error("Ending the trajectory: own words")
    said = capfd.readouterr()
    assert "a control: said" in said.err and "own words" not in said.out + said.err


@pytest.mark.usefixtures("key")
def test_an_endpoints_failure_is_told_without_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert "own words" not in asked() + caplog.text
