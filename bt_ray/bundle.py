"""The picked program, ready to be called: its prompts, its weights, an engine in this process."""

from __future__ import annotations

from typing import Any

from bt_ray.errors import ConfigError, RunDirError
from bt_ray.lm.types import Weights
from bt_ray.lm.weights import from_record
from bt_ray.runs.run_dir import RunDir


def outcome(run: RunDir, stage_id: str | None = None) -> dict[str, Any]:
    """Record of the picked stage, or of the one named. Raises RunDirError where there is none yet."""
    if stage_id is None:
        pick = run.pick()
        if pick is None:
            raise RunDirError(f"{run.root} has no pick yet. Let the run end: bt-ray run CONFIG --run-dir {run.root}")
        stage_id = pick["id"]
    record = run.stage_record(stage_id)
    if record is None or record["status"] != "done":
        done = sorted(path.parent.name for path in (run.root / "stages").glob("*/record.json"))
        raise RunDirError(f"{run.root}: stage {stage_id!r} has no outcome. Stages with one: {', '.join(done) or 'none'}.")
    return record


def weights_of(run: RunDir, record: dict[str, Any]) -> Weights:
    """Weights of a stage record, with paths on this machine."""
    return from_record(record["weights"], run.root, Weights.from_json(run.header()["identity"]["weights"]))


def load(run: RunDir, stage_id: str | None = None) -> Any:
    """The program of a stage as a dspy module that answers by itself. The engine starts on the first call."""
    from bt_ray.lm.adapter import make_adapter
    from bt_ray.lm.dspy_engine import Binding, BoundProgram, LoopThread
    from bt_ray.lm.local import LocalPool
    from bt_ray.rollout.candidates import apply
    from bt_ray.rollout.program import load_program, spec_of

    record = outcome(run, stage_id)
    config, identity = run.config(), run.header()["identity"]
    program = apply(load_program(spec_of(config, identity.get("pickle_path"))), record["candidate"])
    binding = Binding(
        pool=LocalPool(config.engine),
        weights=weights_of(run, record),
        adapter=make_adapter(config.adapter, config.rollout.constrain),
        max_tokens=config.rollout.max_tokens,
    )
    return BoundProgram(program, binding, LoopThread())


def answer(run: RunDir, texts: list[str], stage_id: str | None = None) -> dict[str, Any]:
    """Fields of the answer to one input: the text itself where the program takes one field, else key=value texts."""
    names = list(run.config().data.inputs)
    inputs = read_inputs(names, texts)
    prediction = load(run, stage_id)(**inputs)
    return dict(prediction.items())


def read_inputs(names: list[str], texts: list[str]) -> dict[str, str]:
    """Input fields from the command line. Raises ConfigError for a missing or unknown field."""
    if len(names) == 1 and not (len(texts) == 1 and texts[0].startswith(f"{names[0]}=")):
        return {names[0]: " ".join(texts)}
    inputs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in names:
            raise ConfigError(f"ask: {text!r} is not of the form key=value with a key of {', '.join(names)}.")
        inputs[name] = value
    missing = [name for name in names if name not in inputs]
    if missing:
        raise ConfigError(f"ask: the program also needs {', '.join(missing)}; add {missing[0]}=...")
    return inputs
