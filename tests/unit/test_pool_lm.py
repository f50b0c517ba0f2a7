"""The short way of PoolLM says to the pool, and to the program, what DSPy's own way does."""

from __future__ import annotations

import asyncio

import dspy
import pytest
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import ContextWindowExceededError, LMUnexpectedError

from bt_ray.errors import PoolError, PromptTooLongError
from bt_ray.lm.call_context import SETTINGS_KEY, CallContext
from bt_ray.lm.dspy_engine import make_lm
from tests.support.stub_pool import BASE, StubPool

MESSAGES = [
    {"role": "system", "content": "Name the animal."},
    {"role": "user", "content": "It barks."},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "It mews."},
]
SHORT = {"disable_history": True, "callbacks": []}
LONG = {"disable_history": True, "callbacks": [BaseCallback()]}


def ask(pool, settings, messages=MESSAGES, awaited=True, **kwargs):
    """Answers of one call, and the rollout's context; the call is made on the pool's loop or in a thread."""

    async def run():
        context = CallContext(pool, BASE, asyncio.get_running_loop(), temperature=0.5, max_tokens=9, seed=3)
        lm = make_lm()
        with dspy.context(**settings, **{SETTINGS_KEY: context}):
            if awaited:
                return await lm.acall(messages=messages, **kwargs), context
            return await asyncio.to_thread(lm, messages=messages, **kwargs), context

    return asyncio.run(run())


@pytest.mark.parametrize("awaited", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0}, {"temperature": 1, "max_tokens": 4, "top_p": 0.5}])
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:], [{"role": "user", "content": ""}]])
def test_both_ways_make_the_same_call_and_record(awaited, kwargs, messages):
    pools = [StubPool(lambda _: "cat"), StubPool(lambda _: "cat")]
    found = [ask(pool, settings, messages, awaited, **kwargs) for pool, settings in zip(pools, (SHORT, LONG), strict=True)]
    assert pools[0].calls == pools[1].calls and len(pools[0].calls) == 1
    assert found[0][0] == found[1][0] == ["cat"]
    assert found[0][1].finished_calls() == found[1][1].finished_calls() != []


@pytest.mark.parametrize("awaited", [True, False])
@pytest.mark.parametrize(
    ("raised", "seen"), [(PromptTooLongError("900 tokens"), ContextWindowExceededError), (PoolError("gone"), LMUnexpectedError)]
)
def test_both_ways_raise_the_same_error(awaited, raised, seen):
    def fail(_):
        raise raised

    texts = []
    for settings in (SHORT, LONG):
        with pytest.raises(seen) as caught:
            ask(StubPool(fail), settings, awaited=awaited)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_the_short_way_uses_no_thread(monkeypatch):
    def thread(*_args, **_kwargs):
        raise AssertionError("a thread was used")

    monkeypatch.setattr(asyncio, "to_thread", thread)
    assert ask(StubPool(lambda _: "cat"), SHORT)[0] == ["cat"]
    with pytest.raises(AssertionError):
        ask(StubPool(lambda _: "cat"), LONG)


def test_what_asks_for_more_goes_dspys_way():
    pool = StubPool(lambda _: "cat")
    assert ask(pool, SHORT, n=2)[0] == ["cat", "cat"] and len(pool.calls) == 2
    assert ask(pool, SHORT, rollout_id=1, temperature=1.0)[0] == ["cat"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "It mews."}]}]
    assert ask(pool, SHORT, parts)[0] == ["cat"] and pool.calls[-1].messages[-1]["content"] == "It mews."
    for content, message in (("\ud800", r"U\+D800"), ("", "system cannot be empty")):
        with pytest.raises(ValueError, match=message):
            ask(pool, SHORT, [{"role": "system", "content": content}, *MESSAGES[1:]])


def test_history_usage_and_copies_are_dspys():
    lm = make_lm()
    assert type(lm.copy(temperature=1.0)) is type(lm)

    async def run():
        context = CallContext(StubPool(lambda _: "cat"), BASE, asyncio.get_running_loop())
        with dspy.context(disable_history=False, **{SETTINGS_KEY: context}):
            await lm.acall(messages=MESSAGES)
        with dspy.context(disable_history=True, **{SETTINGS_KEY: context}), dspy.track_usage() as usage:
            await lm.acall(messages=MESSAGES)
        return usage.get_total_tokens()

    usage = asyncio.run(run())
    assert len(lm.history) == 1 and usage[lm.model]["completion_tokens"] == 1
