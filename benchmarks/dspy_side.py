"""DSPy against vLLM's OpenAI server, with the prompts, stops and constraints that our runs have.

No script of its own. DSPy's part is its own code: programs, optimisers, threads, and the HTTP client that `dspy.LM`
takes for such a server (lm15). What is added is what a DSPy adapter has no way to say to it: where an answer ends, and
the choices that it is held to.
"""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
from common import MAX_SAID
from dspy import lm15
from dspy.clients.engines.lm15_engine import LM15Engine
from dspy.clients.provider import Provider
from openai_server import SERVED, OpenAIServer

from bt_ray.config import PromptStep, RunConfig
from bt_ray.lm.adapter import CompactAdapter, make_adapter
from bt_ray.lm.call_context import CALL_SITE
from bt_ray.resources import usable_cores
from bt_ray.rollout.program import load_metric, load_program, spec_of

Row = dict[str, Any]
Metric = Callable[..., Any]
MAX_ERRORS = 10**9  # DSPy ends an optimiser after ten failing rows; ours counts such a row as 0
CONNECTIONS = 256  # more than any number of threads that is tried
WARM_UP_ROWS = 16
PLAIN_SFT = Path(__file__).parent / "plain_sft.py"


class ServerEngine:
    """DSPy's own client of the server, told by the adapter how an answer ends. Counts what it is asked."""

    def __init__(self) -> None:
        self.calls = self.prompt_tokens = self.completion_tokens = 0
        self._lock = threading.Lock()
        self._client: LM15Engine | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ServerEngine:
        return self

    def connect(self, server: OpenAIServer) -> None:
        """Ask `server` from now on; after each start, for its address changes."""
        known = {"api_keys": {"openai-chat": server.key}, "base_urls": {"openai-chat": server.url}}
        self._client = LM15Engine(lm15.RouterConfig(env={}, **known, max_connections=CONNECTIONS))

    def complete(self, request: lm15.Request) -> lm15.Response:
        if self._client is None:
            raise RuntimeError("no server was started for this engine")
        site, config = CALL_SITE.get(), request.config
        if site is not None:
            extensions = dict(config.extensions or {})
            if site.constraint is not None:
                extensions["structured_outputs"] = site.constraint
            config = replace(config, stop=(*site.stop, *config.stop), extensions=extensions or None)
        # A tuned model has a name of its own in DSPy, and one address here.
        response = self._client.complete(replace(request, model=f"openai/{SERVED}", config=config))
        with self._lock:
            self.calls += 1
            self.prompt_tokens += response.usage.input_tokens or 0
            self.completion_tokens += response.usage.output_tokens or 0
        return response

    def counts(self) -> dict[str, int]:
        return {"lm_calls": self.calls, "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}


class CompactChat(CompactAdapter, dspy.ChatAdapter):  # type: ignore[misc]
    """The compact format under a name that dspy.BootstrapFinetune accepts: it takes ChatAdapters only."""

    def __init__(self) -> None:
        dspy.ChatAdapter.__init__(self, use_json_adapter_fallback=False)


def adapter_of(config: RunConfig, finetunes: bool = False) -> Any:
    """The run's adapter. `finetunes`: one that BootstrapFinetune can make rows with (compact or chat)."""
    constrain = config.rollout.constrain
    adapter = CompactChat() if finetunes and config.adapter == "compact" else make_adapter(config.adapter, constrain)
    adapter.constrain = constrain
    return adapter


def make_lm(config: RunConfig, engine: ServerEngine, name: str = SERVED, **more: Any) -> dspy.LM:
    """Greedy, as our evaluations are; without DSPy's cache."""
    draw = {"temperature": 0.0, "max_tokens": config.rollout.max_tokens}
    return dspy.LM(f"openai/{name}", engine=engine, cache=False, num_retries=2, **draw, **more)


def settings(config: RunConfig, lm: dspy.LM, finetunes: bool = False) -> dict[str, Any]:
    """Arguments of dspy.context or dspy.configure."""
    logging.getLogger("dspy.clients.lm").setLevel(logging.ERROR)  # a warning per truncated answer
    return {"lm": lm, "adapter": adapter_of(config, finetunes), "max_errors": MAX_ERRORS, "disable_history": True}


def program_and_metric(config: RunConfig) -> tuple[dspy.Module, Metric]:
    """The config's program, anew, and its metric."""
    spec = spec_of(config)
    return load_program(spec), load_metric(spec).function


def examples(rows: Sequence[Row]) -> list[dspy.Example]:
    return [dspy.Example(**row["inputs"], **row["labels"]).with_inputs(*row["inputs"]) for row in rows]


def few_shot_search(config: RunConfig, step: PromptStep, metric: Metric, threads: int, **more: Any) -> Any:
    """DSPy's counterpart of a `random_fewshot` step, with its candidates and demos."""
    return dspy.BootstrapFewShotWithRandomSearch(
        metric=metric,
        metric_threshold=config.rollout.metric_threshold,
        max_bootstrapped_demos=step.max_bootstrapped_demos,
        max_labeled_demos=step.max_labeled_demos,
        num_candidate_programs=step.num_candidates,
        num_threads=threads,
        max_errors=MAX_ERRORS,
        **more,
    )


def score(program: dspy.Module, metric: Metric, rows: Sequence[Row], threads: int) -> dict[str, float]:
    """Score by row id of dspy.Evaluate; a row that fails scores 0."""
    evaluate = dspy.Evaluate(devset=examples(rows), metric=metric, num_threads=threads, max_errors=MAX_ERRORS)
    results = evaluate(program).results
    return {row["id"]: float(found[2]) for row, found in zip(rows, results, strict=True)}


def best_threads(config: RunConfig, rows: Sequence[Row], choices: Sequence[int]) -> dict[int, float]:
    """Seconds of one evaluation on `rows` by number of threads, the best first.

    Each number meets demos that no other had, so that none profits from cached prompts of an earlier one.
    """
    program, metric = program_and_metric(config)
    score(program, metric, rows[:WARM_UP_ROWS], max(choices))
    found = {}
    for threads in choices:
        chosen = random.Random(threads).sample(list(rows), min(4, len(rows)))
        shown = program.deepcopy()
        for predictor in shown.predictors():
            predictor.demos = examples(chosen)
        began = time.perf_counter()
        score(shown, metric, rows, threads)
        found[threads] = round(time.perf_counter() - began, 2)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def resolve_model(config: RunConfig) -> str:
    """Folder of the config's base model, prepared if it is not there yet."""
    from bt_ray.lm.models import located, resolve

    return str(Path(resolve(located(config.model, config.base_dir)).model_dir))


class SampledFinetune(dspy.BootstrapFinetune):  # type: ignore[misc]
    """BootstrapFinetune whose teacher is the program itself, sampled: `samples` runs of each row, as our rollouts."""

    def __init__(self, samples: int, temperature: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._samples, self._temperature = samples, temperature

    def compile(self, student: dspy.Module, trainset: list[dspy.Example], teacher: Any = None) -> dspy.Module:
        sampled = student.deepcopy()
        sampled.set_lm(student.predictors()[0].lm.copy(temperature=self._temperature))
        return super().compile(student, trainset=trainset * self._samples, teacher=sampled)


class PlainProvider(Provider):  # type: ignore[misc]
    """A dspy Provider of this machine: the OpenAI server for inference, `plain_sft.py` for fine-tuning.

    `folders`: weights by the name of their LM. `finetunes`: what each fine-tune did.
    """

    def __init__(self, server: OpenAIServer, engine: ServerEngine, base: str, scratch: Path, seed: int) -> None:
        super().__init__()
        self.finetunable = True
        self.folders = {"openai/base": base}
        self.finetunes: list[dict[str, Any]] = []
        self._server, self._engine, self._scratch, self._seed = server, engine, scratch, seed
        self._up: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainProvider:
        return self  # DSPy copies programs with their LMs; there is one server

    def launch(self, lm: dspy.LM, launch_kwargs: Any = None) -> None:
        if self._up != lm.model:
            self._server.start(self.folders[lm.model])
            self._engine.connect(self._server)
            self._up = lm.model

    def kill(self, lm: dspy.LM, launch_kwargs: Any = None) -> None:
        self._server.stop()
        self._up = None

    def finetune(self, job: Any, model: str, train_data: Any, train_data_format: Any, train_kwargs: Any = None) -> str:
        """Train on the rows that DSPy made, in a process of its own. Returns the name of the new LM."""
        number = len(self.folders)
        out = self._scratch / f"finetune-{number}"
        out.mkdir(parents=True)
        job_path, rows_path, result_path = out / "job.json", out / "rows.jsonl", out / "result.json"
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in train_data]
        rows_path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        wanted = {"rows_path": str(rows_path), "model_dir": self.folders[model], "out_dir": str(out), "seed": self._seed}
        job_path.write_text(json.dumps({**wanted, **train_kwargs}), encoding="utf-8")
        changes = {"OMP_NUM_THREADS": str(usable_cores()), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(PLAIN_SFT), str(job_path), str(result_path)]
        done = subprocess.run(command, env={**os.environ, **changes}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{done.stdout[-MAX_SAID:]}\n{done.stderr[-MAX_SAID:]}\nplain TRL ended with {done.returncode}")
        result = json.loads(result_path.read_text(encoding="utf-8"))
        self.finetunes.append(result)
        self.folders[f"openai/tuned-{number}"] = result["merged"]
        return f"openai/tuned-{number}"
