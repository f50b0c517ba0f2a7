"""LM calls of a search with racing divided by those of full evaluation, and what the saving costs. Simulated.

    python benchmarks/racing.py --seeds 10

Candidates differ in skill, examples in difficulty: a run passes with probability sigmoid(skill - difficulty), and
each pair of candidate and example has its own luck. The ledger and the racing are the search's own. Regret: pass rate
on unseen rows of the winner of full evaluation minus that of the racing's winner.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics

from common import show

from bt_ray.config import PromptStep
from bt_ray.search.ledger import Ledger, Verdict
from bt_ray.search.racing import StopRule

T_95 = {10: 1.833, 20: 1.729, 50: 1.677, 100: 1.660}  # one-sided 95 % quantile of Student's t, by number of seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, choices=sorted(T_95))
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--unseen", type=int, default=500)
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviation of the candidates' skills, in logits")
    parser.add_argument("--rungs", type=float, nargs="+", default=list(PromptStep.model_fields["rungs"].default))
    parser.add_argument("--error", type=float, default=PromptStep.model_fields["racing_error"].default)
    parser.add_argument("--regret", type=float, default=PromptStep.model_fields["racing_regret"].default)
    args = parser.parse_args()
    ratios, regrets = zip(*(one_search(args, seed) for seed in range(args.seeds)), strict=True)
    error = statistics.stdev(regrets) / math.sqrt(args.seeds)
    show(
        "racing, simulated",
        calls_ratio=round(statistics.fmean(ratios), 3),
        calls_ratios=[round(ratio, 3) for ratio in ratios],
        regret_points=round(100 * statistics.fmean(regrets), 2),
        regret_upper_points=round(100 * (statistics.fmean(regrets) + T_95[args.seeds] * error), 2),
        candidates=args.candidates,
        examples=args.examples,
        unseen=args.unseen,
        spread=args.spread,
        rungs=args.rungs,
        error=args.error,
        regret=args.regret,
    )


def one_search(args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """(runs with racing / all runs, regret) of one simulated search."""
    draw = random.Random(seed)
    skills = [draw.gauss(0.0, args.spread) for _ in range(args.candidates)]
    names = [f"e{number}" for number in range(args.examples + args.unseen)]
    difficulty = {name: draw.gauss(0.0, 1.0) for name in names}
    scores = [{name: float(draw.random() < 1 / (1 + math.exp(difficulty[name] - skill))) for name in names} for skill in skills]
    search, unseen = names[: args.examples], names[args.examples :]
    ledger = Ledger(search, tuple(args.rungs), StopRule(args.error, args.regret))
    for number in range(args.candidates):
        entry = ledger.add({"label": str(number), "candidate": candidate(number)})
        assert entry is not None
        for rung, batch in enumerate(ledger.batches):
            if (
                ledger.record(entry.candidate_id, rung, {name: scores[number][name] for name in batch}, 0.0)
                is not Verdict.CONTINUE
            ):
                break
    best = ledger.best()
    assert best is not None
    full = max(range(args.candidates), key=lambda number: (sum(scores[number][name] for name in search), -number))
    runs = sum(len(entry.scores) for entry in ledger.entries.values())
    rate = [statistics.fmean(scores[number][name] for name in unseen) for number in (full, int(best.label))]
    return runs / (args.candidates * args.examples), rate[0] - rate[1]


def candidate(number: int) -> dict[str, dict[str, dict[str, object]]]:
    return {"predictors": {"p": {"instructions": str(number), "demos": []}}}


if __name__ == "__main__":
    main()
