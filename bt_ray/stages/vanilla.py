"""The root of every strategy: the program as written, on the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bt_ray.errors import ConfigError
from bt_ray.stages import steps
from bt_ray.stages.context import StageContext


def run(ctx: StageContext) -> dict[str, Any]:
    """Evaluate on `select` and publish the stage's record."""
    start = ctx.incoming()
    found = steps.evaluate(ctx, start.candidate, start.weights)
    if reason := systemic_fault(found.rows, ctx.run.root / "steps" / found.record.name):
        raise ConfigError(reason)
    outcome = {
        "kind": "vanilla",
        "status": "done",
        "note": None,
        "candidate": start.candidate,
        "weights": ctx.relative(start.weights),
        "evaluate": found.record.name,
        "select_scores": steps.scores(ctx, found),
        "row_errors": sum(found.record.result["errors"].values()),
    }
    return ctx.publish(outcome, [found.record])


def systemic_fault(rows: Sequence[Mapping[str, Any]], folder: Path) -> str | None:
    """Why no row can be scored, as one line: the program, or the metric, raises on every one. None otherwise.

    An answer that does not parse is the model's, which stages mend; these two are the user's code,
    and a score of zero would hide that. `folder` is the step's, whose rows hold each reason.
    """
    kinds = {row["error"]["kind"] if row["error"] else None for row in rows}
    if kinds not in ({"program"}, {"metric"}):
        return None
    (kind,) = kinds
    first = rows[0]
    return (
        f"the {kind} fails on all {len(rows)} rows of the first evaluation, on {first['example_id']!r} with "
        f"{' '.join(first['error']['message'].split()).rstrip('.')}. The rows are in {folder / 'rows'}. Mend the {kind} and start a "
        f"new run; if the fault was outside its file (a package, a service), mend that, remove {folder} and run the same again."
    )
