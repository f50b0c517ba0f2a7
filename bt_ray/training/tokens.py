"""Chat rows as token ids, and batches of them packed as a tree. No torch in the signatures.

Rows of one predictor begin with the same instruction. Packed as a tree, a batch computes each
shared beginning once: a token attends to its ancestors only, and its position is its depth, so
every row sees exactly what it would see alone. Loss and gradient are those of the padded batch
(up to rounding), at a half to a third of the work for short rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bt_ray.errors import TrainingError

MAX_NAMED_ROWS = 5


@dataclass(frozen=True)
class TokenRow:
    """One training row: the loss is on `completion` alone."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class TokenPair:
    """One preference pair: two answers to the same prompt. Its length counts the prompt twice, as training does."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    def __len__(self) -> int:
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Tree:
    """A batch as one sequence. `parents[i]` is the index of token i's predecessor (-1: none),
    `positions[i]` its place in its row. Target k is the token that follows index `sources[k]`."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    parents: tuple[int, ...]
    sources: tuple[int, ...]
    targets: tuple[int, ...]


def tokenize_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> list[TokenRow]:
    """Token ids of chat rows through the model's own template.

    The prompt is rendered as for generation and the answer follows it up to and with the end
    token, so training sees what the engine will see. Raises TrainingError naming the rows that
    are longer than `max_length` tokens (nothing is ever cut) and when there is no row.
    """
    if not rows:
        raise TrainingError("fine-tune: there is no row to train on. Collect more passing rollouts, or lower metric_threshold.")
    tokens = [_tokenize(row, tokenizer) for row in rows]
    too_long = [
        f"row {index} (example {row.get('example_id')!r}, predictor {row.get('predictor')!r}): {len(ids)} tokens"
        for index, (row, ids) in enumerate(zip(rows, tokens, strict=True))
        if len(ids) > max_length
    ]
    if too_long:
        more = f" and {len(too_long) - MAX_NAMED_ROWS} more" if len(too_long) > MAX_NAMED_ROWS else ""
        raise TrainingError(
            f"fine-tune: {len(too_long)} of {len(rows)} rows are longer than max_length = {max_length} tokens: "
            f"{'; '.join(too_long[:MAX_NAMED_ROWS])}{more}. Raise max_length, or shorten the prompts or inputs."
        )
    return tokens


def tokenize_pairs(pairs: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> list[TokenPair]:
    """Token ids of preference pairs (`prompt`, `chosen`, `rejected`), each half as `tokenize_rows` does it.

    Raises TrainingError naming the pairs with a half longer than `max_length` tokens, and when there is none.
    """
    chosen, rejected = (
        tokenize_rows([{**pair, "completion": pair[half]} for pair in pairs], tokenizer, max_length)
        for half in ("chosen", "rejected")
    )
    halves = zip(chosen, rejected, strict=True)
    return [TokenPair(better.prompt, better.completion, worse.completion) for better, worse in halves]


def _tokenize(row: Mapping[str, Any], tokenizer: Any) -> TokenRow:
    prompt, completion = list(row["prompt"]), list(row["completion"])
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    # Some templates render an answer in the history otherwise than an answer being generated (they drop the
    # reasoning, say). Then the plain answer and the end token follow the prompt, as when generating.
    answer = whole[len(asked) :] if whole.startswith(asked) else completion[-1]["content"] + tokenizer.eos_token
    answer_ids = _ids(tokenizer, answer)
    end = tokenizer.eos_token_id
    if end in answer_ids:  # a template's line break after the end token is never generated
        answer_ids = answer_ids[: len(answer_ids) - answer_ids[::-1].index(end)]
    return TokenRow(tuple(_ids(tokenizer, asked)), tuple(answer_ids))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def pack_tree(rows: Sequence[TokenRow]) -> Tree:
    """The rows of one batch as a tree of their shared beginnings."""
    ids: list[int] = []
    positions: list[int] = []
    parents: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    children: dict[tuple[int, int], int] = {}
    for row in rows:
        node = -1
        for position, token in enumerate((*row.prompt, *row.completion)):
            if position >= len(row.prompt) and node >= 0:
                sources.append(node)
                targets.append(token)
            child = children.get((node, token))
            if child is None:
                child = children[(node, token)] = len(ids)
                ids.append(token)
                positions.append(position)
                parents.append(node)
            node = child
    return Tree(tuple(ids), tuple(positions), tuple(parents), tuple(sources), tuple(targets))
