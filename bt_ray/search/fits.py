"""Whether a proposed candidate has prompts for the predictors that the program has. Pure."""

from __future__ import annotations

from bt_ray.search.base import Candidate


def misfit(candidate: Candidate, student: Candidate) -> str | None:
    """Why the candidate is not one of the program, which has the student's predictors; None where it is."""
    theirs, ours = candidate["predictors"], student["predictors"]
    faults = [f"it lacks the predictor {name!r}" for name in ours if name not in theirs]
    faults += [f"it has prompts for {name!r}, no predictor of the program" for name in theirs if name not in ours]
    return f"{' and '.join(faults)}; give prompts for {', '.join(ours)}" if faults else None
