"""BM25 over a file of passages. One index per process and file, built at the first search."""

from __future__ import annotations

import functools
import gzip
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Programs run in many threads at once; the second one must wait for the index, not build another.
_BUILDING = threading.Lock()


def default_corpus() -> Path:
    """Where the data command installs the corpus: BT_RAY_HOME, or ~/.cache/bt_ray, then data/hotpotqa."""
    home = Path(os.environ.get("BT_RAY_HOME") or Path.home() / ".cache" / "bt_ray")
    return home / "data" / "hotpotqa" / "corpus.jsonl.gz"


@dataclass(frozen=True)
class Retriever:
    """The `k` passages of `corpus` that share most with a query. Small: safe to copy and pickle.

    `corpus` is a jsonl or jsonl.gz file with the fields `title` and `text`, one passage a line.
    """

    corpus: str
    k: int = 3

    def search(self, query: str) -> list[str]:
        """Up to `k` passages as "title | text", best first; none of them without a word of the query.

        Raises FileNotFoundError if the corpus is missing and ValueError if it holds no passage.
        """
        import bm25s

        with _BUILDING:
            ranker, passages = _index(self.corpus)
        tokens = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)
        found = ranker.retrieve(tokens, k=min(self.k, len(passages)), show_progress=False, backend_selection="numpy")
        # BM25 fills up with passages of score 0, which are just the first and last of the file.
        ranked = zip(found.documents[0], found.scores[0], strict=True)
        return [passages[place] for place, score in ranked if score > 0]


@functools.lru_cache(maxsize=2)
def _index(corpus: str) -> tuple[Any, tuple[str, ...]]:
    """The ranker over a corpus file and its passages. Seconds for 30 000 passages."""
    import bm25s

    opener: Any = gzip.open if corpus.endswith(".gz") else open
    with opener(corpus, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{corpus} holds no passage")
    tokens = bm25s.tokenize([f"{row['title']} {row['text']}" for row in rows], stopwords="en", show_progress=False)
    ranker = bm25s.BM25(backend="numpy")
    ranker.index(tokens, show_progress=False)
    return ranker, tuple(f"{row['title']} | {row['text']}" for row in rows)
