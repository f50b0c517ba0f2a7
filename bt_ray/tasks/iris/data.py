"""Cut Fisher's iris data into 50 / 50 / 50 rows: `python -m bt_ray.tasks.iris.data OUT`.

The rows come from scikit-learn's copy, which needs no network. Fisher 1936; UCI Machine Learning
Repository id 53, CC BY 4.0.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

from bt_ray.tasks.files import SPLITS, Row, cut_command

FEATURES = ("sepal_length", "sepal_width", "petal_length", "petal_width")
# 50 flowers a species do not divide by 3: one of the splits gets 16 of a species, another one for each.
QUOTAS = {"setosa": (17, 17, 16), "versicolor": (17, 16, 17), "virginica": (16, 17, 17)}


def split(rows: list[Row], seed: int = 3) -> dict[str, list[Row]]:
    """Stratified train, val and test of 50 rows each, fixed by `seed`.

    `rows` are the 150 flowers with the fields FEATURES and "species". Flowers with equal
    measurements stay in one split, so that nothing in val or test has been seen in train.
    """
    rng = random.Random(seed)
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for species, quota in QUOTAS.items():
        twins: dict[tuple[float, ...], list[Row]] = defaultdict(list)
        for row in rows:
            if row["species"] == species:
                twins[tuple(row[name] for name in FEATURES)].append(row)
        groups = list(twins.values())
        rng.shuffle(groups)
        groups.sort(key=len, reverse=True)  # the largest first: none of them then meets a boundary
        flat = [row for group in groups for row in group]
        start = 0
        for name, size in zip(SPLITS, quota, strict=True):
            splits[name] += flat[start : start + size]
            start += size
    for part in splits.values():
        rng.shuffle(part)
    return splits


def build(seed: int = 3) -> dict[str, list[Row]]:
    """The three splits from scikit-learn's copy. Lengths in cm. Raises ImportError without scikit-learn."""
    from sklearn.datasets import load_iris  # type: ignore[import-untyped, unused-ignore]

    bunch = load_iris()
    rows = [
        {**dict(zip(FEATURES, map(float, values), strict=True)), "species": str(bunch.target_names[target])}
        for values, target in zip(bunch.data, bunch.target, strict=True)
    ]
    return split(rows, seed)


def main(argv: list[str] | None = None) -> None:
    cut_command(Path(__file__).parent, lambda _: build(), None, argv)


if __name__ == "__main__":
    main()
