"""The exceptions of the project: one base, so that a caller can catch what is ours.

Every message says what happened, where, and what to do next. All of them are
built from one string, so they survive pickling across Ray processes.
"""

from __future__ import annotations


class BtRayError(Exception):
    """Base of all errors that bt_ray raises on purpose. `exit_code` is the CLI's."""

    exit_code = 1


class ConfigError(BtRayError):
    """The user's input cannot be run as written: config, data, program, metric, strategy."""

    exit_code = 2


class ModelError(ConfigError):
    """A model cannot be used: unknown name, no chat template, pickle-only weights, bad hash."""


class RunDirError(ConfigError):
    """The run directory cannot be used: another config, another owner, not writable."""


class CommitError(BtRayError):
    """A step's record could not be published: a newer attempt owns the step, or data is damaged."""


class StorageError(BtRayError):
    """A file cannot be written: the disk is full, its quota used up, or it gives errors. What was committed stays."""


class PoolError(BtRayError):
    """The LM pool cannot answer: replicas do not start or keep dying. Never a score."""


class CanaryError(BtRayError):
    """An engine's greedy tokens differ from plain transformers: the weights must not be used."""


class CandidateError(BtRayError):
    """A candidate does not fit the program: a predictor or a field is missing or new. A fault of that candidate."""


class PromptTooLongError(BtRayError):
    """One prompt plus its answer does not fit the context. A fault of one row."""


class TrainingError(BtRayError):
    """A fine-tune failed: a NaN loss, a worker that keeps dying, rows that cannot be used."""


class StageFailedError(BtRayError):
    """A stage job ended without its record."""


class BudgetError(BtRayError):
    """The budget is used up; everything committed so far stays usable."""
