"""Which of the rows are trained on, which measure the loss, which are left out. Pure, and by seed.

The order of the choices: examples are held out, the rows of the others are balanced over the
predictors, and the token limit cuts what is left. So nothing that measures is ever trained on, no
held-out row is repeated, and the limit holds whatever came before it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bt_ray.config import WeightStep
from bt_ray.errors import TrainingError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """Indices of rows. `train` is in the order of the rows and may name one several times
    (upsampling); `left_out` counts those beyond `max_train_tokens`."""

    train: list[int]
    held_out: list[int]
    left_out: int

    def counts(self) -> dict[str, int]:
        return {"trained": len(self.train), "held_out": len(self.held_out), "left_out": self.left_out}


def choose_rows(rows: Sequence[Row], lengths: Sequence[int], step: WeightStep, seed: int) -> Choice:
    """Choose among `rows` (`example_id`, `predictor`, and `sample` where a rollout has several),
    whose `lengths` are in tokens. Raises TrainingError where no row would be left to train on."""
    held = hold_out([row["example_id"] for row in rows], step.validation_share, seed)
    held_out = [index for index, row in enumerate(rows) if row["example_id"] in held]
    others = [index for index, row in enumerate(rows) if row["example_id"] not in held]
    train = [others[index] for index in balance([rows[index]["predictor"] for index in others], step.balance, seed)]
    if step.max_train_tokens is None:
        return Choice(train, held_out, 0)
    rollouts = [(rows[index]["example_id"], rows[index].get("sample")) for index in train]
    fitting = first_rows(rollouts, [lengths[index] for index in train], step.max_train_tokens)
    return Choice(train[:fitting], held_out, len(train) - fitting)


def hold_out(example_ids: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """The examples that are kept from training: `share` of the distinct ids, drawn by seed; at least
    one, and at least one stays. By example and not by row, for the calls of an example resemble each
    other. Raises TrainingError where there is only one example."""
    if not share:
        return frozenset()
    distinct = list(dict.fromkeys(example_ids))
    if len(distinct) < 2:
        raise TrainingError(
            f"fine-tune: validation_share {share:g} needs two examples with rows, there is {len(distinct)}. "
            "Collect more passing rollouts, or set validation_share: 0."
        )
    count = min(len(distinct) - 1, max(1, round(share * len(distinct))))
    return frozenset(random.Random(f"{seed}/validation").sample(distinct, count))


def balance(predictors: Sequence[str], how: str, seed: int) -> list[int]:
    """Indices of the rows to take, given the predictor of each row; sorted, so copies stand together.

    `none`: each once. `downsample`: of each predictor as many rows as the rarest has, drawn without
    replacement. `upsample`: of each as many as the most frequent has: every row equally often, and
    the remainder drawn without replacement. A predictor's draw does not depend on the others' names.
    """
    if how == "none" or not predictors:
        return list(range(len(predictors)))
    places: dict[str, list[int]] = {}
    for index, predictor in enumerate(predictors):
        places.setdefault(predictor, []).append(index)
    sizes = [len(indices) for indices in places.values()]
    wanted = min(sizes) if how == "downsample" else max(sizes)
    chosen: list[int] = []
    for predictor, indices in places.items():
        times, remainder = divmod(wanted, len(indices))
        chosen += indices * times + random.Random(f"{seed}/balance/{predictor}").sample(indices, remainder)
    return sorted(chosen)


def first_rows(rollouts: Sequence[tuple[Any, Any]], lengths: Sequence[int], max_tokens: int) -> int:
    """How many of the first rows fit into `max_tokens`, whole rollouts at a time.

    `rollouts` names the rollout of each row, whose rows stand together. It stops at the first
    rollout that does not fit, so that no choice by length is made among the later ones. Raises
    TrainingError where the first one is too long already.
    """
    taken = tokens = 0
    for _, group in groupby(range(len(rollouts)), key=lambda index: rollouts[index]):
        indices = list(group)
        tokens += sum(lengths[index] for index in indices)
        if tokens > max_tokens:
            break
        taken += len(indices)
    if not taken:
        raise TrainingError(
            f"fine-tune: the first rollout alone has {tokens} tokens, max_train_tokens is {max_tokens}. Raise max_train_tokens."
        )
    return taken
