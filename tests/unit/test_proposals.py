"""What Tune is offered when the processes of its trials die, without any process."""

import json
from types import SimpleNamespace

import pytest

from bt_ray.errors import PoolError
from bt_ray.search import room
from bt_ray.search.conduct import Answer
from bt_ray.search.experiment import LOST_PROCESSES, _Proposals
from bt_ray.search.ledger import Entry
from bt_ray.search.room import START_TIMEOUT_S, Starts


def proposals(count):
    entries = [Entry(number, f"c{number}", {"number": number}, f"id{number}") for number in range(count)]
    answers = iter([*entries, *[Answer.END] * 9])
    conduct = SimpleNamespace(failure=None, next=lambda: next(answers))
    return _Proposals(conduct, Starts(conduct)), conduct


def offered(found):
    return json.loads(found["candidate"])["number"]


def test_a_candidate_whose_process_died_is_offered_again_though_the_searcher_has_ended():
    found, conduct = proposals(1)
    assert offered(found.suggest("a")) == 0
    found.on_trial_complete("a", error=True)
    assert offered(found.suggest("b")) == 0
    found._slow = True  # Tune asks while the trial runs
    assert found.suggest("c") is None, "with it alive the search is not over"
    found.on_trial_complete("b", error=True)
    assert offered(found.suggest("d")) == 0
    found.on_trial_complete("d")
    assert found.suggest("e") == _Proposals.FINISHED and conduct.failure is None


def test_deaths_are_counted_by_candidate_and_too_many_fail_the_search():
    found, conduct = proposals(2)
    for number in range(LOST_PROCESSES):
        assert offered(found.suggest(f"first {number}")) == 0
        found.on_trial_complete(f"first {number}", error=True)
    assert offered(found.suggest("first at last")) == 0
    found.on_trial_complete("first at last")
    for number in range(LOST_PROCESSES + 1):
        assert conduct.failure is None
        assert offered(found.suggest(f"second {number}")) == 1
        found.on_trial_complete(f"second {number}", error=True)
    assert "'c1' died 3 times" in str(conduct.failure)
    assert found.suggest("more") == _Proposals.FINISHED


def test_trials_that_find_no_room_fail_the_search_and_a_slow_one_does_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    conduct = SimpleNamespace(failure=None)
    starts = Starts(conduct)

    def after(seconds, *states):
        now[0] += seconds
        starts.on_step_begin(0, [SimpleNamespace(status=state) for state in states])

    after(1, "PENDING", "PENDING")
    after(START_TIMEOUT_S - 1, "TERMINATED", "PENDING")
    after(2, "RUNNING", "PENDING")  # it came late; from now on the wait for others is bounded by its rows
    after(2 * START_TIMEOUT_S, "RUNNING", "PENDING")
    after(1)
    after(1, "PENDING")
    with pytest.raises(PoolError, match=r"no process for a candidate could start within 600 s; each needs 0\.25 logical CPUs"):
        after(START_TIMEOUT_S + 1, "PENDING")
    assert isinstance(conduct.failure, PoolError)
