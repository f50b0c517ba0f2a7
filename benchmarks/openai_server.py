"""vLLM behind its own OpenAI server, as a person without Ray would start it, with the settings that our engines get.

No script of its own: `prompt_stage.py` and `dspy_better_together.py` run DSPy against it. It listens on loopback,
behind a random key. Its context manager ends the server and its engine's process by their process group.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from common import MAX_SAID

from bt_ray.config import EngineConfig
from bt_ray.lm.engine_vllm import engine_args
from bt_ray.lm.settings import Machine, resolve_settings

SERVED = "served"  # the name under which the server answers, whatever weights it holds
START_S, STOP_S = 900.0, 60.0
# What `engine_vllm.start_llm` sets beside `engine_args`.
STRUCTURED_OUTPUTS = {"backend": "guidance", "disable_any_whitespace": True}
SHOWN = ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "chunked_prefill", "prefix_caching", "executor")


class OpenAIServer:
    """One server at a time. `start` again with another folder takes its weights: that is a restart of everything."""

    def __init__(self, config: EngineConfig, log: Path) -> None:
        self.settings = resolve_settings(config, Machine.here())
        self.key = secrets.token_hex(16)
        self.url = ""
        self.starts: list[float] = []  # seconds that each start took
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> OpenAIServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self, model_dir: str) -> None:
        """Start with the weights in `model_dir`, and wait until it answers. SystemExit, with its log, if it does not."""
        self.stop()
        began, port = time.monotonic(), free_port()
        environment = {**os.environ, **dict(self.settings.environment), "VLLM_API_KEY": self.key}
        environment |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command(engine_args(self.settings, model_dir), port),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its engine's process ends with it
            )
        self.url = f"http://127.0.0.1:{port}/v1"
        self._await(f"http://127.0.0.1:{port}/health", began + START_S)
        self.starts.append(round(time.monotonic() - began, 1))

    def stop(self) -> None:
        """End the server and the processes that it started; nothing if none runs."""
        process, self._process = self._process, None
        if process is None:
            return
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, signal_number)
            except ProcessLookupError:
                break
            try:
                process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                continue
        process.wait(timeout=STOP_S)

    def describe(self) -> dict[str, Any]:
        """The settings that count, for the figure's line."""
        known = asdict(self.settings)
        return {name: known[name] for name in (*SHOWN, "block_size", "kv_cache_bytes", "num_threads")}

    def _await(self, health: str, until: float) -> None:
        assert self._process is not None
        while time.monotonic() < until and self._process.poll() is None:
            try:
                with urllib.request.urlopen(health, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.stop()
        raise SystemExit(
            f"{self._log.read_text(errors='replace')[-MAX_SAID:]}\nthe OpenAI server did not start; its log is above."
        )


def command(args: dict[str, Any], port: int) -> list[str]:
    """vLLM's command line for the keyword arguments of its engine."""
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--served-model-name", SERVED, "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    words += ["--structured-outputs-config", json.dumps(STRUCTURED_OUTPUTS)]
    for name, value in args.items():
        flag = name.replace("_", "-")
        if value is True:
            words.append(f"--{flag}")
        elif value is False:
            words.append(f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def end_on_sigterm() -> None:
    """Let SIGTERM end the script as Ctrl-C does, so that the server ends with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
