"""Strategies and their tree. Pure: no I/O, no heavy imports.

A strategy is names joined by `->` (`p -> w -> p`); a name is a key of `steps`. Several
strategies form a trie whose root is the stage `vanilla`; shared prefixes are one node.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bt_ray.errors import ConfigError

VANILLA = "vanilla"
PAPER = ("p", "w", "p -> p", "w -> w", "p -> w", "w -> p", "p -> w -> p")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class StageNode:
    """A node of the strategy tree. `steps` is the path of step names from the root."""

    steps: tuple[str, ...]

    @classmethod
    def of(cls, stage_id: str) -> StageNode:
        """The inverse of `id`."""
        return cls(() if stage_id == VANILLA else tuple(stage_id.split(".")))

    @property
    def id(self) -> str:
        """File-safe name, unique in a tree: `vanilla`, `p`, `p.w`, `p.w.p`."""
        return ".".join(self.steps) if self.steps else VANILLA

    @property
    def path(self) -> str:
        return " -> ".join(self.steps) if self.steps else VANILLA

    @property
    def name(self) -> str:
        return self.steps[-1] if self.steps else VANILLA

    @property
    def parent(self) -> StageNode | None:
        return StageNode(self.steps[:-1]) if self.steps else None


def parse(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Step names of one strategy, `"p->w"` -> `("p", "w")`; `"vanilla"` -> `()`.

    Raises ConfigError with the reason for separators other than `->`, empty parts and
    names that are no key of `steps` (with the nearest one).
    """
    names = sorted(known)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"strategy: {text!r} is empty. Write step names joined by '->', like 'p -> w -> p'.")
    if text.strip() == VANILLA:
        return ()
    if "," in text or ";" in text or "+" in text:
        raise ConfigError(
            f"strategy: {text!r} joins steps with something other than '->'. A comma could mean two "
            "strategies or one after the other; write 'p -> w' for one, or a YAML list for several."
        )
    parts = [part.strip() for part in text.split("->")]
    for part in parts:
        if not part:
            raise ConfigError(f"strategy: {text!r} has an arrow with no step beside it. Write 'p -> w -> p'.")
        if not _NAME.fullmatch(part):
            raise ConfigError(f"strategy: {part!r} in {text!r} is no step name. Join names with '->', like 'p -> w'.")
        if part not in names:
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(
                f"strategy: {text!r} names the step {part!r}, which `steps` lacks{hint} It has: {', '.join(names)}."
            )
    return tuple(parts)


def expand(strategy: str | Sequence[str], known: Iterable[str]) -> list[tuple[str, ...]]:
    """All strategies of a config value: one text or a list of texts; the word `paper` stands for the paper's."""
    known = list(known)
    texts: Sequence[str] = [strategy] if isinstance(strategy, str) else list(strategy)
    if not texts:
        raise ConfigError("strategy: the list is empty. Name at least one strategy, like 'p -> w -> p'.")
    named = [text for given in texts for text in (PAPER if given == "paper" else (given,))]
    return list(dict.fromkeys(parse(text, known) for text in named))


def tree(strategies: Iterable[tuple[str, ...]]) -> list[StageNode]:
    """The nodes of the trie, parents before children, each once, in the order first named."""
    nodes: dict[tuple[str, ...], StageNode] = {(): StageNode(())}
    for steps in strategies:
        for depth in range(1, len(steps) + 1):
            nodes.setdefault(steps[:depth], StageNode(steps[:depth]))
    return sorted(nodes.values(), key=lambda node: len(node.steps))
