"""HotPotQA questions and their corpus: `python -m bt_ray.tasks.hotpotqa.data SOURCE OUT`.

SOURCE holds train.jsonl, dev.jsonl and test.jsonl (`question`, `answer`) and corpus.jsonl.gz (`title`,
`text`, one passage a line). HotPotQA: Yang et al. 2018, CC BY-SA 4.0.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from bt_ray.tasks.files import Row, cut_command, read_jsonl
from bt_ray.tasks.hotpotqa.retrieval import default_corpus

# Split here, file of the source, rows at most: the paper's sizes.
SPLIT_SIZES = {"train": ("train", 1000), "val": ("dev", 500), "test": ("test", 1500)}


def build(source: str | Path, seed: int = 0) -> dict[str, list[Row]]:
    """Rows {"question", "answer"}, at most 1000 / 500 / 1500, drawn and ordered by `seed`.

    Raises FileNotFoundError or ValueError for a source that cannot be read.
    """
    splits: dict[str, list[Row]] = {}
    for name, (source_name, size) in SPLIT_SIZES.items():
        rows = read_jsonl(Path(source) / f"{source_name}.jsonl", ("question", "answer"))
        random.Random(seed).shuffle(rows)
        splits[name] = rows[:size]
    return splits


def install_corpus(source: str | Path, target: Path) -> None:
    """Copy the source's corpus.jsonl.gz to `target`, whole or not at all. Raises FileNotFoundError."""
    corpus = Path(source) / "corpus.jsonl.gz"
    if not corpus.is_file():
        raise FileNotFoundError(f"there is no file {corpus}; the source folder must hold it")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    shutil.copyfile(corpus, part)
    os.replace(part, target)


def build_with_corpus(source: str | Path) -> dict[str, list[Row]]:
    """The splits; the corpus goes to its folder of this user."""
    splits = build(source)
    install_corpus(source, default_corpus())
    print(f"corpus in {default_corpus()}")
    return splits


def main(argv: list[str] | None = None) -> None:
    cut_command(
        Path(__file__).parent, build_with_corpus, "folder with train, dev and test.jsonl and corpus.jsonl.gz of HotPotQA", argv
    )


if __name__ == "__main__":
    main()
