"""What a submitted run takes along: the folder that holds all that its config names by a relative path.

Ray copies that folder to every node and starts the job in it. A path that is absolute is one of the cluster's own
storage and stays as it is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bt_ray.config import PromptStep, RunConfig
from bt_ray.config_steps import ProposerConfig
from bt_ray.errors import ConfigError
from bt_ray.lm.models import located

# Left out beside what Ray leaves out by itself (.git, .venv, venv, __pycache__, and what .gitignore and .rayignore name):
# the default place of run directories, and files that hold keys.
EXCLUDES = ("/runs", ".env", ".env.*")
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
NUM_NAMED = 3
MIB = 1 << 20


@dataclass(frozen=True)
class Package:
    """A folder as it is sent. `config`: the config's path in it. `elsewhere`: absolute paths that the config names."""

    folder: Path
    config: str
    num_files: int
    num_bytes: int
    elsewhere: tuple[str, ...]


def pack(config_path: Path, config: RunConfig) -> Package:
    """The folder to send for a config. Raises ConfigError where it lacks something, or is too large for the job server."""
    path = config_path.resolve()
    named = named_paths(config)
    inside = {key: os.path.normpath(path.parent / name) for key, name in named.items() if not _is_absolute(name)}
    folder = choose_folder(path, config, inside.values())
    sizes = packed_files(folder)
    keys = key_files(config)
    if problem := (
        sent_key(folder, keys, sizes)
        or lacking(folder, {"the config": str(path), **inside}, sizes)
        or too_large(folder, sizes, size_limit())
    ):
        raise ConfigError(problem)
    elsewhere = tuple(sorted({name for name in [*named.values(), *keys.values()] if _is_absolute(name)}))
    return Package(folder, path.relative_to(folder).as_posix(), len(sizes), sum(sizes.values()), elsewhere)


def named_paths(config: RunConfig) -> dict[str, str]:
    """Files and folders that the config names, by their key, as they are written there."""
    found = {key: value.rpartition(":")[0] for key, value in _references(config).items()}
    found = {key: where for key, where in found.items() if where.endswith(".py")}
    for name in ("train", "val", "test"):
        source = getattr(config.data, name)
        if source and (source.endswith(DATA_SUFFIXES) or Path(config.base_dir, source).exists()):
            found[f"data.{name}"] = source
    for key, model in _models(config).items():
        if located(model, config.base_dir) != model or _is_absolute(model):
            found[key] = model
    return found


def _references(config: RunConfig) -> dict[str, str]:
    optimizers = {
        f"steps.{name}.optimizer": step.optimizer for name, step in config.steps.items() if isinstance(step, PromptStep)
    }
    return {"program": config.program, "metric": config.metric, **optimizers}


def _models(config: RunConfig) -> dict[str, str]:
    found = {"model": config.model, **{f"models.{name}": model.model for name, model in config.models.items()}}
    for name, step in config.steps.items():
        if isinstance(step, PromptStep):
            if step.proposer and step.proposer.engine:
                found[f"steps.{name}.proposer"] = step.proposer.model
            if not isinstance(step.teacher, str):
                found[f"steps.{name}.teacher"] = step.teacher.model
    return found


def key_variables(config: RunConfig) -> list[str]:
    """Environment variables that hold keys of the run's endpoints: the config has their names, and never the keys."""
    return sorted({proposer.api_key_env for proposer in _proposers(config).values() if proposer.api_key_env})


def key_files(config: RunConfig) -> dict[str, str]:
    """Files that hold keys of the run's endpoints, by their key, as they are written in the config. They are never sent."""
    named = {f"{name}.api_key_file": proposer.api_key_file for name, proposer in _proposers(config).items()}
    return {name: path for name, path in named.items() if path is not None}


def _proposers(config: RunConfig) -> dict[str, ProposerConfig]:
    return {
        f"steps.{name}.proposer": step.proposer
        for name, step in config.steps.items()
        if isinstance(step, PromptStep) and step.proposer
    }


def sent_key(folder: Path, keys: Mapping[str, str], sizes: Mapping[str, int]) -> str | None:
    """Why files that hold keys forbid to send `folder`, in words; None where none does. A working directory is no secret."""
    for key, name in keys.items():
        if not _is_absolute(name):
            why = "is a path in the config's folder, and a key is not sent along"
        elif any(os.path.realpath(folder / sent) == os.path.realpath(os.path.expanduser(name)) for sent in sizes):
            why = f"names a file in {folder}, which would be sent to the job server"
        else:
            continue
        return f"{key}: it {why}. Give the absolute path at which the cluster's nodes have it, outside of that folder."
    return None


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "~"))


def choose_folder(config_path: Path, config: RunConfig, inside: Iterable[str]) -> Path:
    """The deepest folder that holds the config's folder and every path in `inside`. Raises ConfigError."""
    if Path(config.base_dir) != config_path.parent:
        raise ConfigError(
            f"base_dir: {config.base_dir} is a folder of this machine. Leave the key out: in a submitted run, paths start from the "
            "config's folder."
        )
    folder = Path(os.path.commonpath([str(config_path.parent), *map(os.path.dirname, inside)]))
    home = Path.home().resolve()
    if folder == home or folder in home.parents:
        raise ConfigError(
            f"{config_path}: the folder that holds the config and all that it names by relative paths is {folder}, which is more "
            "than a run can take along. Move them into one project folder, or name what lies elsewhere by absolute paths of the "
            "cluster's storage."
        )
    return folder


def packed_files(folder: Path) -> dict[str, int]:
    """Sizes, in bytes, of the files that Ray would send, by their path in the folder. Ray's own walk, so that nothing differs."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    sizes: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size

    excludes = [*ray_constants.get_runtime_env_default_excludes(), *EXCLUDES]
    with_gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    packaging._dir_travel(folder, [packaging._get_excludes(folder, excludes)], add, include_gitignore=with_gitignore)
    return sizes


def size_limit() -> int:
    """Bytes that the job server takes: Ray sends the files uncompressed, in one request."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    return min(int(ray_constants.DASHBOARD_CLIENT_MAX_SIZE), int(packaging.GCS_STORAGE_MAX_SIZE))


def too_large(folder: Path, sizes: Mapping[str, int], limit: int) -> str | None:
    """Why a folder cannot be sent, with its largest entries; None where it can. Pure."""
    total = sum(sizes.values())
    if total < limit:
        return None
    entries: dict[str, int] = {}
    for name, size in sizes.items():
        top, slash, _ = name.partition("/")
        entries[top + slash] = entries.get(top + slash, 0) + size
    largest = sorted(entries.items(), key=lambda entry: -entry[1])[:NUM_NAMED]
    named = ", ".join(f"{name} ({size / MIB:.1f} MiB)" for name, size in largest)
    return (
        f"{folder} holds {total / MIB:.1f} MiB, and Ray's job server takes less than {limit / MIB:.0f} MiB; the largest entries are "
        f"{named}: name what the run does not need in {folder / '.rayignore'}, or put it on storage that all nodes reach and "
        "give its absolute path in the config."
    )


def lacking(folder: Path, needed: Mapping[str, str], sizes: Mapping[str, int]) -> str | None:
    """What the config needs and the sent files lack, in words; None where nothing is missing."""
    for key, path in needed.items():
        name = Path(path).relative_to(folder).as_posix()
        if not Path(path).exists():
            return f"{key}: there is no file {path}. Paths start at the config's folder."
        if name != "." and name not in sizes and not any(one.startswith(f"{name}/") for one in sizes):
            return (
                f"{key}: {path} would not reach the cluster: a .gitignore or .rayignore names it, or it is one of {', '.join(EXCLUDES)}. "
                "Take it out there (RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1 passes over .gitignore), or name another file."
            )
    return None
