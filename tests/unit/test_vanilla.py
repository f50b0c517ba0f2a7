"""The first evaluation: faults of the user's code on every row are no score."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from bt_ray.errors import ConfigError
from bt_ray.stages import vanilla


def rows(*kinds):
    return [
        {"example_id": f"e{number}", "error": kind and {"kind": kind, "message": f"KeyError:\n'{kind} {number}'."}}
        for number, kind in enumerate(kinds)
    ]


class Context:
    """Of a stage, what `vanilla` touches; the evaluation gives `found`."""

    run = SimpleNamespace(root=Path("/runs/one"))
    incoming = staticmethod(lambda: SimpleNamespace(candidate={}, weights=None))
    relative = staticmethod(lambda weights: {"id": "base"})
    publish = staticmethod(lambda outcome, records: outcome)


@pytest.fixture
def evaluated(monkeypatch):
    def run(*kinds):
        record = SimpleNamespace(name="evaluate-1", result={"errors": {}})
        monkeypatch.setattr(vanilla.steps, "evaluate", lambda *what: SimpleNamespace(record=record, rows=rows(*kinds)))
        monkeypatch.setattr(vanilla.steps, "scores", lambda *what: {})
        return vanilla.run(Context())

    return run


@pytest.mark.parametrize("kind", ["program", "metric"])
def test_code_that_fails_on_every_row_fails_the_stage_in_one_line(evaluated, kind):
    with pytest.raises(ConfigError) as error:
        evaluated(kind, kind, kind)
    said = str(error.value)
    assert f"the {kind} fails on all 3 rows of the first evaluation, on 'e0' with KeyError: '{kind} 0'. The rows are in" in said
    assert "/runs/one/steps/evaluate-1/rows. Mend" in said and "remove /runs/one/steps/evaluate-1 and run" in said
    assert "\n" not in said  # the driver shows the last line of a job that failed


@pytest.mark.parametrize("kinds", [("program", "program", None), ("metric", "program"), ("parse", "parse"), (None, None)])
def test_other_faults_cost_their_rows(evaluated, kinds):
    assert evaluated(*kinds)["status"] == "done"
