"""A run from its plan to its end, in front of whoever watches: what `bt-ray run` and `compile` share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bt_ray.config import PromptStep, RunConfig
from bt_ray.driver import Driver
from bt_ray.errors import ConfigError, StageFailedError
from bt_ray.preflight import Prepared, prepare
from bt_ray.report.facts import collect, estimates
from bt_ray.report.live import LiveView
from bt_ray.report.memory import memory_here
from bt_ray.report.states import Watcher
from bt_ray.report.text import render_plan
from bt_ray.runs.bucket import Bucket, is_url, place_of
from bt_ray.runs.identity import content_hash
from bt_ray.runs.lock import RunLock
from bt_ray.runs.mirror import Mirror
from bt_ray.runs.opening import is_complete
from bt_ray.runs.run_dir import IN_MEMORY, PICKLED, RunDir


def make_console(plain: bool = False) -> Console:
    """A console of the terminal's width; wide enough for the table where there is no terminal."""
    if plain or not sys.stdout.isatty():
        return Console(width=120, no_color=True, force_terminal=False)
    return Console()


@contextmanager
def placed(run_dir: str | Path) -> Iterator[Path]:
    """The folder in which a run is carried out: `run_dir` itself, or this machine's copy of what a bucket holds.

    While the block lasts, the bucket is kept up with the copy. Raises RunDirError where another driver holds that run,
    StorageError where the bucket cannot be used.
    """
    if not is_url(run_dir):
        yield Path(run_dir)
        return
    bucket = Bucket(place_of(str(run_dir)))
    with Mirror(bucket, copy_home(bucket)) as mirror:
        yield mirror.folder


def copy_home(bucket: Bucket) -> Path:
    """Folder of this machine's copy of the run in a bucket: the same place in another store is another run."""
    from bt_ray.lm.models import home

    return home() / "buckets" / content_hash([bucket.endpoint, bucket.place.url])


def carry_out(run: RunDir, console: Console | None) -> None:
    """Do what the run lacks. The plan and the live view go to `console`; without one it is done in silence.

    A stage that fails is no error here: it is in the facts, see `raise_if_failed`. Raises what the driver raises, and
    ConfigError for a file of a key that is not there.
    """
    if is_complete(run):
        return
    _check_keys(run.config())
    keep_plan(run)
    if console is None:
        Driver(run, lambda states: None).execute()
        return
    config = run.config()
    console.print(f"Task {config.program}, metric {config.metric}, model {config.model}", highlight=False, markup=False)
    render_plan(collect(run), console)
    with LiveView(console) as view:
        watcher = Watcher(run)
        Driver(run, lambda states: view.update(watcher.states(states))).execute()


def _check_keys(config: RunConfig) -> None:
    # Here, and not in `prepare`: a plan is made where no key need be, as on the machine that a run is submitted from.
    from bt_ray.lm.endpoint import key_in_file

    for step in config.steps.values():
        if isinstance(step, PromptStep) and step.proposer:
            key_in_file(step.proposer, config.base_dir)


def raise_if_failed(facts: Mapping[str, Any]) -> None:
    """Raise StageFailedError where a stage of the run failed."""
    failed = [stage for stage in facts["stages"] if stage["status"] == "failed"]
    if failed:
        raise StageFailedError(
            f"{len(failed)} of {len(facts['stages'])} stages failed: {failed[0]['error']} Mend the cause and run the same "
            f"again; what is committed in {facts['run_dir']} is kept."
        )


def keep_plan(run: RunDir) -> None:
    """Write down what the run is expected to cost, from its sizes, before it begins. A stage that a longer
    strategy adds later is added; the others keep the estimate that they began with."""
    if _planned(run).keys() - (run.plan() or {}).keys():
        with RunLock(run.root):  # of two that begin at once neither loses the other's entries
            run.write_plan({**(run.plan() or {}), **_planned(run)})


def _planned(run: RunDir) -> dict[str, Any]:
    config, identity = run.config(), run.header()["identity"]
    return estimates(run, config, identity, memory_here(config, identity["weights"]))


def prepare_in(config: RunConfig, run: RunDir) -> Prepared:
    """`prepare` for a config that may name rows or a program from Python: these are taken from `run`, which holds them.

    Raises ConfigError where it does not hold what the config asks for.
    """
    data = config.data
    in_memory = IN_MEMORY in (data.train, data.val, data.test)
    pickled = {config.program.startswith(PICKLED), config.metric.startswith(PICKLED)}
    if not in_memory and True not in pickled:
        return prepare(config)
    if not run.exists():
        raise ConfigError(
            f"the rows or the program of this config are in memory of a Python process; {run.root} does not hold them."
        )
    known, identity = run.config(), run.header()["identity"]
    if in_memory and data != known.data:
        raise ConfigError(
            "data: the rows of this run came from Python and stay as they are. Name files for train, val and test, or leave "
            "data as it is."
        )
    if len(pickled) > 1:
        raise ConfigError("program and metric of this run were pickled together. Name both as module:attr, or neither.")
    splits = {name: rows for name in identity["splits"] if (rows := run.examples(name))} if in_memory else None
    pickle_path = identity["pickle_path"] if True in pickled else None
    prepared = prepare(config, splits, pickle_path, _as_given(config, run, pickle_path))
    if not pickle_path:
        return prepared
    # The same pickle is the same program, but what this process reads as the source of a script's class is another file.
    same = {name: identity[name] for name in ("program", "metric", "code")}
    return Prepared(config, prepared.splits, {**prepared.identity, **same})


def _as_given(config: RunConfig, run: RunDir, pickle_path: str | None) -> Any:
    """The program with the prompts that it was given in Python with; None where the config names another program."""
    from bt_ray.rollout.candidates import apply
    from bt_ray.rollout.program import load_program, spec_of

    if config.program != run.config().program:
        return None
    return apply(load_program(spec_of(config, pickle_path)), run.header()["identity"]["vanilla"])
