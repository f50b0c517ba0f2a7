"""Examples: read the splits, check them, give every row an id from its content.

Row: {"id": 12 hex digits, "inputs": {field: value}, "labels": {field: value}}. A label that is null
is one that the row lacks: tables cannot tell the two apart, and the id must not depend on the format.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from bt_ray.config import DataConfig, PromptStep, RunConfig
from bt_ray.errors import ConfigError
from bt_ray.runs.identity import content_hash, derive_seed

Row = dict[str, Any]
# `id:split` or `id:config:split`; a split may be a slice, as train[:100], whose colon parts nothing.
_HUB = re.compile(r"(?P<id>[^:]+):(?:(?P<config>[^:\[\]]+):)?(?P<split>[^:\[\]]+(\[[^\[\]]*\][^:\[\]]*)*)")
_HUB_FORMS = "`id:split` or `id:config:split` (openai/gsm8k:main:train)"
_SUFFIXES = {".jsonl": "json", ".jsonl.gz": "json", ".csv": "csv", ".parquet": "parquet"}


def load_splits(data: DataConfig, base_dir: str, seed: int) -> dict[str, list[Row]]:
    """The splits `train`, `search`, `select` and (where named) `test`, as rows with ids.

    `search` and `select` are val, cut once by the seed. Raises ConfigError for everything
    that is wrong with the files, with the file and, for a broken line, its number.
    """
    raw = {name: read_table(getattr(data, name), base_dir, name) for name in ("train", "val", "test") if getattr(data, name)}
    return split_rows(raw, data, seed)


def split_rows(raw: dict[str, list[dict[str, Any]]], data: DataConfig, seed: int) -> dict[str, list[Row]]:
    """As `load_splits`, from rows that are in memory."""
    rows = {name: _with_ids(table, data.inputs, name) for name, table in raw.items()}
    for name, table in rows.items():
        limit = data.limit.get(name)  # type: ignore[call-overload]
        if limit and limit < len(table):
            kept = set(random.Random(derive_seed(seed, "limit", name)).sample(range(len(table)), limit))
            rows[name] = [row for index, row in enumerate(table) if index in kept]
    _refuse_shared(rows)
    val = rows.pop("val")
    if len(val) < 2:
        raise ConfigError(f"data.val has {len(val)} row; it is cut into `search` and `select`, so it needs 2 or more.")
    order = list(range(len(val)))
    random.Random(derive_seed(seed, "split")).shuffle(order)
    cut = min(max(1, round(len(val) * data.search_share)), len(val) - 1)
    rows["search"] = [val[index] for index in order[:cut]]
    rows["select"] = [val[index] for index in order[cut:]]
    return rows


def subsample(examples: list[Row], number: int | None, seed: int, name: str) -> list[Row]:
    """`number` of the examples at random, in their order; all of them where they are no more, or it is None. Pure.

    The same for equal seeds and names. A smaller draw lies within a larger one, so that they share what is run on them.
    """
    if number is None or number >= len(examples):
        return examples
    order = list(range(len(examples)))
    random.Random(derive_seed(seed, "subsample", name)).shuffle(order)
    return [examples[index] for index in sorted(order[:number])]


def step_examples(step: PromptStep, split: Literal["train", "search"], examples: list[Row], seed: int) -> list[Row]:
    """Those of the split's examples that a prompt step uses: the same for all steps of a run with equal numbers. Pure."""
    number = step.max_train_examples if split == "train" else step.max_search_examples
    return subsample(examples, number, seed, split)


def used_splits(config: RunConfig, splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The splits without the examples of `search` that no prompt step draws. Pure."""
    draws = [
        step_examples(step, "search", splits["search"], config.seed)
        for step in config.steps.values()
        if isinstance(step, PromptStep)
    ]
    return {**splits, "search": max(draws, key=len, default=splits["search"])}  # smaller draws lie within it


def read_table(source: str, base_dir: str, name: str) -> list[dict[str, Any]]:
    """The rows of one file or hub split as dicts.

    Tables and the hub are read by the `datasets` library. JSON lines are not: each says its own fields and types,
    and one schema for all of them would fill up missing fields, turn whole numbers into fractions where another
    row has one, and make dates of texts that look like some.
    """
    path = Path(source) if Path(source).is_absolute() else Path(base_dir) / source
    kind = next((kind for suffix, kind in _SUFFIXES.items() if path.name.endswith(suffix)), None)
    if kind is None and ":" in source and not path.exists():
        return _read_hub(source, name)
    if not path.is_file():
        raise ConfigError(f"data.{name}: there is no file {path}. Paths start at the config's folder.")
    if kind is None:
        raise ConfigError(
            f"data.{name}: {path.name} is none of {', '.join(_SUFFIXES)}. Convert it, or name a split of the hub as {_HUB_FORMS}."
        )
    rows = _read_lines(path, name) if kind == "json" else _read_file(path, kind, name)
    if not rows:
        raise ConfigError(f"data.{name}: {path} holds no rows. Every split needs at least one.")
    return rows


def _read_file(path: Path, kind: str, name: str) -> list[dict[str, Any]]:
    if path.stat().st_size == 0:
        return []
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils import logging as noise

    noise.disable_progress_bar()
    before = noise.get_verbosity()
    noise.set_verbosity(noise.CRITICAL)  # it logs what it raises
    reader = {"csv": Dataset.from_csv, "parquet": Dataset.from_parquet}[kind]
    with tempfile.TemporaryDirectory(prefix="bt_ray-data-") as cache:
        try:
            return list(reader(str(path), cache_dir=cache, keep_in_memory=True))
        except (DatasetGenerationError, ValueError, OSError) as error:
            cause = " ".join(str(error.__cause__ or error).split()).rstrip(".")
            raise ConfigError(f"data.{name}: {path} cannot be read as {kind}: {cause}. Rewrite the file.") from None
        finally:
            noise.set_verbosity(before)


def _read_hub(source: str, name: str) -> list[dict[str, Any]]:
    parts = _HUB.fullmatch(source)
    if parts is None:
        raise ConfigError(f"data.{name}: {source!r} is no file and no split of the hub. Name one as {_HUB_FORMS}.")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return list(load_dataset(parts["id"], parts["config"], split=parts["split"]))
    except (OSError, ValueError, DatasetsError) as error:
        of_config = f", config {parts['config']!r}" if parts["config"] else ""
        raise ConfigError(
            f"data.{name}: the hub's {parts['id']!r}{of_config}, split {parts['split']!r}, cannot be read: "
            f"{str(error).rstrip('.')}. Name it as {_HUB_FORMS}."
        ) from None


def _read_lines(path: Path, name: str) -> list[dict[str, Any]]:
    """The JSON object of each line. Raises ConfigError with the number of the first line that is none."""
    rows = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"data.{name}: {path}, line {number} is no JSON ({error.msg}). Mend that line.") from None
                if not isinstance(value, dict):
                    raise ConfigError(f"data.{name}: {path}, line {number} is no JSON object. Each line is one {{...}}.")
                rows.append(value)
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"data.{name}: {path} is no UTF-8 text ({error}). Rewrite the file.") from None
    return rows


def _with_ids(table: list[dict[str, Any]], inputs: tuple[str, ...], name: str) -> list[Row]:
    if not table:
        raise ConfigError(f"data.{name} holds no rows. Every split needs at least one.")
    seen: Counter[str] = Counter()
    rows = []
    for number, raw in enumerate(table, 1):
        missing = [field for field in inputs if raw.get(field) is None]
        if missing:
            has = ", ".join(sorted(raw))
            raise ConfigError(
                f"data.{name}: row {number} lacks the input {missing[0]!r}. It has: {has}. Mend data.inputs or the file."
            )
        values = {key: raw[key] for key in sorted(raw) if raw[key] is not None}
        try:
            digest = content_hash(values)[:12]
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"data.{name}: row {number} holds a value that JSON cannot ({error}). Write it as text or a finite number."
            ) from None
        seen[digest] += 1
        suffix = f"-{seen[digest]}" if seen[digest] > 1 else ""
        labels = {key: value for key, value in values.items() if key not in inputs}
        rows.append({"id": digest + suffix, "inputs": {key: values[key] for key in inputs}, "labels": labels})
    return rows


def label_fields(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the labels that any of the rows has: a label that is null in one is there in others."""
    return list(dict.fromkeys(name for row in rows for name in row["labels"]))


def _refuse_shared(rows: dict[str, list[Row]]) -> None:
    """No split may share inputs with another: the score would count what was learned by heart."""
    owners: dict[str, tuple[str, int]] = {}
    for name, table in rows.items():
        for number, row in enumerate(table, 1):
            key = content_hash(row["inputs"])
            other = owners.setdefault(key, (name, number))
            if other[0] != name:
                raise ConfigError(
                    f"data: {name} row {number} has the same inputs as {other[0]} row {other[1]}. Take it out of one of the two."
                )
