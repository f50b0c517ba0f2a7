"""The canary: does an engine answer as plain transformers does with the same weights?

An engine that reloads weights in place can be silently wrong (a packed copy of the old head, an
adapter in the wrong slot). So whoever makes weights computes, with transformers in float32, the
greedy continuation of three fixed prompts, and every engine that takes these weights must give
the same tokens before anything it answers is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bt_ray.errors import ModelError
from bt_ray.lm.types import CanaryCase
from bt_ray.lm.weights import ONLY_DATA

ANSWER_TOKENS = 12
# Different in subject and in length, so that a fault of one position or one topic shows.
PROMPTS = (
    "Name the capital of France.",
    "Sort these words: pear, apple, fig. Answer with the sorted words and nothing else.",
    "A train leaves at 9:40 and arrives at 11:05. How long does the journey take? Think step by step.",
)
# Logits differ between kernels by rounding. float32: about 1e-4 for logits of size 20. bfloat16
# keeps 8 bits of a logit of size 16 to 32 (steps of 0.125), float16 keeps 11 (0.016).
MARGIN_NOISE = 4.0  # a margin is a difference of two logits at every token, so it strays further than one tie
_TIE_MARGINS = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}


def tie_margin(dtype: str) -> float:
    """Logit difference below which two tokens count as equally good in `dtype`."""
    if dtype not in _TIE_MARGINS:
        raise ModelError(f"canary: no tie margin is known for dtype {dtype!r}; known are {', '.join(_TIE_MARGINS)}.")
    return _TIE_MARGINS[dtype]


def compare(case: CanaryCase, token_ids: Sequence[int], tie_margin: float, margins: Sequence[float] | None = None) -> str | None:
    """None if `token_ids` are the case's greedy tokens, else what differs, in words.

    At the first difference the case's own margin decides: below `tie_margin` (logits) both tokens
    were equally good, and what follows a tie cannot be compared, so the case passes up to there.
    An answer that is too short is a difference. Given the engine's own `margins` (logits, per token),
    each must be within `MARGIN_NOISE` ties of the case's: weights that were not swapped often give
    the same tokens, but not the same margins.
    """
    for position, expected in enumerate(case.token_ids):
        got = token_ids[position] if position < len(token_ids) else None
        margin = case.margins[position]
        if got is None or (got != expected and margin >= tie_margin):
            return (
                f"token {position} is {got}, transformers gives {expected} "
                f"with a margin of {margin:.4g} (ties end at {tie_margin:g})"
            )
        if got != expected:
            return None
        if margins is not None and abs(margins[position] - margin) > MARGIN_NOISE * tie_margin:
            return (
                f"token {position} is {got} as expected, but with a margin of {margins[position]:.4g} "
                f"where transformers has {margin:.4g}"
            )
    return None


def render(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Token ids of chat `messages` through the model's template, ready for the answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the model has no chat template; take an instruction-tuned model, or save one with its tokenizer.")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself; the tokenizer must not add them again.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def compute_from(model: Any, tokenizer: Any) -> tuple[CanaryCase, ...]:
    """The canary of a loaded transformers model; it runs as it is (dtype, device), in eval mode.

    End-of-sequence tokens do not end an answer: every case has `ANSWER_TOKENS` tokens.
    """
    import torch

    was_training = bool(model.training)
    model.eval()
    try:
        with torch.inference_mode():
            prompts = [render(tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS]
            return tuple(_greedy(model, prompt) for prompt in prompts)
    finally:
        model.train(was_training)


def compute(model_dir: str, dtype: str = "float32") -> tuple[CanaryCase, ...]:
    """The canary of the model in `model_dir`, loaded with transformers on the CPU in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype), **ONLY_DATA)
    return compute_from(model, tokenizer)


def _greedy(model: Any, prompt: list[int]) -> CanaryCase:
    """Greedy tokens and their margins by plain forward passes, without `generate` and its settings."""
    import torch

    device = next(model.parameters()).device
    ids, past = torch.tensor([prompt], device=device), None
    tokens: list[int] = []
    margins: list[float] = []
    for _ in range(ANSWER_TOKENS):
        out = model(input_ids=ids, past_key_values=past, use_cache=True)
        best = torch.topk(out.logits[0, -1].float(), 2)
        tokens.append(int(best.indices[0]))
        margins.append(round(float(best.values[0] - best.values[1]), 6))
        past, ids = out.past_key_values, best.indices[:1].view(1, 1)
    return CanaryCase(tuple(prompt), tuple(tokens), tuple(margins))
