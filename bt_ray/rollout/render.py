"""Chat messages of a program without running it: training rows, and the longest prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bt_ray.lm.adapter import make_adapter, render_row
from bt_ray.lm.tokenize import ChatTokenizer
from bt_ray.rollout.program import ProgramSpec, load_program, predictor_signatures

Render = Callable[[str, dict[str, Any], dict[str, Any]], dict[str, Any]]


def row_renderer(spec: ProgramSpec, candidate: dict[str, Any]) -> Render:
    """A function (predictor, inputs, outputs) -> chat row, under the prompts of `candidate`."""
    adapter = make_adapter(spec.adapter, spec.constrain)
    signatures = predictor_signatures(load_program(spec))

    def render(predictor: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        return render_row(adapter, signatures[predictor], candidate["predictors"][predictor], inputs, outputs)

    return render


class ContextCheck:
    """Whether a candidate's prompts fit the context, on the longest inputs that are known of each predictor.

    Known are those that `rollouts` gave it, and of `examples`, on which candidates will be scored, the inputs of predictors
    that read nothing else. `context_of`: by predictor, the folder of its model and the tokens of its context. `max_tokens`:
    of the answer. A predictor of which nothing is known is not checked.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        rollouts: Sequence[dict[str, Any]],
        context_of: Callable[[str], tuple[str, int]],
        max_tokens: int,
        examples: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._adapter = make_adapter(spec.adapter, spec.constrain)
        self._signatures = predictor_signatures(load_program(spec))
        self._tokenizer = functools.cache(ChatTokenizer)
        self._context_of, self._max_tokens = context_of, max_tokens
        self._longest: dict[str, dict[str, Any]] = {}
        for row in rollouts:  # one after another: they may be on the disk
            for call in row["calls"]:
                self._note(call["predictor"], call["inputs"])
        for name, signature in self._signatures.items():
            reads = list(signature.input_fields)
            for example in examples:
                if example["inputs"].keys() >= set(reads):
                    self._note(name, {field: example["inputs"][field] for field in reads})

    def _note(self, name: str, inputs: dict[str, Any]) -> None:
        if name in self._signatures and len(str(inputs)) >= len(str(self._longest.get(name, ""))):
            self._longest[name] = inputs

    def refuse(self, candidate: dict[str, Any]) -> str | None:
        """Why the candidate cannot be run, with the three numbers; None where it fits."""
        answer = self._max_tokens
        for name, inputs in self._longest.items():
            state = candidate["predictors"].get(name)
            if state is None:
                continue
            signature = self._signatures[name].with_instructions(state["instructions"])
            model_dir, context = self._context_of(name)
            tokens = self._tokenizer(model_dir).count(
                self._adapter.format(signature, [dict(demo) for demo in state["demos"]], inputs)
            )
            if tokens + answer > context:
                return f"the prompt of {name!r} takes {tokens} tokens and its answer {answer}, the context holds {context}"
        return None


@dataclass(frozen=True)
class LongPrompt:
    """The messages of a predictor's longest call, and the row whose inputs they hold."""

    predictor: str
    split: str
    row_id: str
    messages: list[dict[str, Any]]


def longest_prompts(
    spec: ProgramSpec, program: Any, splits: Mapping[str, Sequence[dict[str, Any]]], num_demos: int
) -> list[LongPrompt]:
    """For each predictor its longest call as far as the data tells: on the longest inputs of any split, with `num_demos` demos.

    Of other splits than train only the inputs are read. Fields that come from other modules are taken
    from the labels of the longest train row, or stay empty: the prompt without demos is an estimate,
    too short where they are empty. Each demo repeats the longest train row that has a label of it, which real ones do not:
    labelled demos take at most as much as is counted here, mostly less; demos of rollouts may take
    more, as they hold outputs that no label does.
    """
    adapter = make_adapter(spec.adapter, spec.constrain)
    train = sorted(splits["train"], key=_size, reverse=True)
    rows = [(split, row) for split, found in splits.items() for row in found]
    split, asked = max(rows, key=lambda item: _size(item[1]))
    fields = {**train[0]["labels"], **asked["inputs"]}
    prompts = []
    for name, predictor in program.named_predictors():
        signature = predictor.signature
        inputs = {field: fields.get(field, "") for field in signature.input_fields}
        labelled = next((row for row in train if row["labels"].keys() & signature.output_fields.keys()), None)
        shown = {**labelled["labels"], **labelled["inputs"]} if labelled else {}
        demo = {field: shown[field] for field in signature.fields if field in shown}
        demos = [demo] * num_demos if demo else []
        messages = adapter.format(signature, [*predictor.demos, *demos], inputs)
        prompts.append(LongPrompt(name, split, asked["id"], messages))
    return prompts


def _size(row: Mapping[str, Any]) -> int:
    return len(str(row["inputs"]))
