"""The paper's headline: how much sooner is our recipe as good as the baseline at its end?

    python -m studies.time_to_score --eval eval.jsonl --base runs/a0,runs/a1 --ours runs/b0,runs/b1

The runs go in pairs, the first of --base with the first of --ours. Their checkpoints were scored
by evaluate.py (train.py --save_every 50 --keep 99; evaluate.py --ckpt RUN/step_*). Time is that
of training, as log.jsonl has it; archiving comes on top. Between checkpoints scores are
interpolated. In the paper the ratio is 14 (section 4.2, figure 7).
"""

import numpy as np

from lib.cli import ArgumentParser, InputError, run_script
from lib.scores import (
    ALIKE,
    LABELS,
    add_where_flag,
    is_run,
    mean_and_spread,
    metric_points,
    read_scores,
)


def score_curve(lines: list[dict], run: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, score) of a run's checkpoints in the order of their steps. Raises InputError."""
    own = [line for line in lines if is_run(line["train.out"], run)]
    points = metric_points(own, [metric], "seconds").get(metric)
    if not points:
        raise InputError(f"--eval: no {metric} of {run}")
    seconds, scores = zip(*(points[step] for step in sorted(points)), strict=True)
    return np.array(seconds), np.array(scores)


def time_to_reach(seconds: np.ndarray, scores: np.ndarray, target: float) -> float | None:
    """When a falling score first is at most the target, linearly between points; None if never.

    The first point's time where it is there already: then it is an upper bound.
    """
    reached = np.flatnonzero(scores <= target)
    if not len(reached):
        return None
    i = reached[0]
    if i == 0:
        return float(seconds[0])
    share = (scores[i - 1] - target) / (scores[i - 1] - scores[i])
    return float(seconds[i - 1] + share * (seconds[i] - seconds[i - 1]))


def main() -> None:
    parser = ArgumentParser(__doc__, prog="python -m studies.time_to_score")
    flag = parser.add_argument
    flag("--eval", nargs="+", required=True, metavar="FILE", help="evaluate.py's --out")
    flag("--base", required=True, metavar="RUN,RUN", help="the baseline's runs")
    flag("--ours", required=True, metavar="RUN,RUN", help="as many runs, each for one of --base")
    flag("--metric", choices=list(LABELS), default="lpips", help="which score")
    add_where_flag(parser)
    args = parser.parse_args()
    base_runs = args.base.split(",")
    our_runs = args.ours.split(",")
    if len(base_runs) != len(our_runs):
        raise InputError(f"--ours: {len(our_runs)} runs; --base has {len(base_runs)}")
    lines = read_scores(args.eval, args.where, ALIKE)
    sign = 1 if LABELS[args.metric].endswith("↓") else -1

    ratios = []
    for base, ours in zip(base_runs, our_runs, strict=True):
        base_seconds, base_scores = score_curve(lines, base, args.metric)
        seconds, scores = score_curve(lines, ours, args.metric)
        target = base_scores[-1]
        reached = time_to_reach(seconds, sign * scores, sign * target)
        print(f"{base}: {args.metric} {target:.4g} after {base_seconds[-1]:.0f} s of training")
        if reached is None:
            print(
                f"{ours}: not reached in {seconds[-1]:.0f} s, best {sign * min(sign * scores):.4g}"
            )
            continue
        at_once = " or less: at its first scored checkpoint" if reached == seconds[0] else ""
        print(f"{ours}: the same after {reached:.0f} s{at_once}")
        ratios.append(base_seconds[-1] / reached)
    if ratios:
        mean, spread = mean_and_spread(ratios)
        print(f"ratio: {mean:.3g} ± {spread:.2g} over {len(ratios)} of {len(base_runs)} pairs")


if __name__ == "__main__":
    run_script(main)
