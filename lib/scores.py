"""Reading logs and tables of scores (log.jsonl, eval.jsonl), and refusing to compare what does not compare."""

import contextlib
import json
from pathlib import Path

import numpy as np

from lib.cli import InputError
from lib.files import read_lines

LABELS = {"psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓", "mse": "MSE on [-1, 1] ↓"}
# scores that differ in any of these don't compare: settings of the evaluation, and, in one sweep, of training
ALIKE = "data files split protocol pairs image_size lpips_net lpips_sha256".split()
ALIKE += "sampler steps eta scale seed samples precision".split()
SWEPT = [
    f"train.{k}"
    for k in ("archive", "init", "width", "amalgamate", "prediction", "steps", "global_batch", "lr")
]
WHERE = dict(nargs="+", default=[], metavar="KEY=VALUE", help="only lines of which this is so: evaluate.py's "
             "settings or, where it has none of the name, train.py's flags; train.KEY for the latter")  # fmt: skip


def open_table(out: Path) -> dict[str, dict]:
    """{id: line} of evaluate.py's --out, which may not be there yet; makes OUT.pairs/. Raises InputError."""
    try:
        lines = (
            {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
            if out.exists()
            else {}
        )
        Path(f"{out}.pairs").mkdir(parents=True, exist_ok=True)
        return lines
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"--out {out}: can't be written, or is another program's file ({error})"
        ) from None


def read_scores(args, alike: list[str], rows: tuple[str, ...] = ("samples",)) -> list[dict]:
    """--eval's lines on runs that fulfil --where, with training's flags as "train.*" and "samples_seen" by then.
    Raises InputError when they differ in one of the keys `alike`."""
    lines = [
        s
        for path in args.eval
        for s in read_lines(path)
        if s.get("run_args") and s.get("row") in rows
    ]
    for line in lines:
        line |= {f"train.{key}": value for key, value in line["run_args"].items()}
        line["samples_seen"] = line["step"] * line["train.global_batch"]
    for key, _, text in (condition.partition("=") for condition in args.where):
        number = text
        with contextlib.suppress(ValueError):
            number = float(text)
        lines = [
            s for s in lines if (v := s.get(key, s.get(f"train.{key}"))) == number or str(v) == text
        ]
    check_alike(lines, alike)
    return lines


def check_alike(lines, keys: list[str]) -> None:
    """Raises InputError naming the first of the keys in which the lines of --eval differ, and how."""
    for key in keys:
        if len(found := sorted({json.dumps(line.get(key)) for line in lines})) > 1:
            raise InputError(
                f"--eval: {key} {' and '.join(found)} don't compare; choose by --where"
            )


def read_curves(args) -> list[tuple]:
    """(label, metric, number of runs, (x, mean, spread)) by label and metric, at the steps that a label's runs share.

    Raises InputError naming the flag.
    """
    if args.where and not args.eval:
        raise InputError(f"--where {args.where[0]}: chooses lines of --eval, which is not given")
    at = "samples_seen" if args.eval and args.x == "samples" else args.x
    usual = ["lpips", "psnr"] if args.eval else ["loss", "val_loss_ema"]
    scores, found, curves = read_scores(args, ALIKE), {}, []
    labels = [(text.split("=", 1)[0], text.split("=", 1)[-1].split(",")) for text in args.runs]
    for run in (run for _, runs in labels for run in runs):
        parts = Path(run).absolute().parts  # training may have had it relative
        lines = [s for s in scores if parts[-len(out := Path(s["train.out"]).parts) :] == out]
        lines, found[run] = lines if args.eval else read_lines(Path(run, "log.jsonl")), {}
        for metric in args.metric or usual:
            points = {
                s["step"]: (s[at], s[metric]) for s in lines if type(s.get(metric)) in (int, float)
            }
            found[run] |= {metric: points} if points else {}
    there = [metric for metric in usual if all(metric in each for each in found.values())]
    metrics = (
        args.metric or there[: 1 if args.eval else 2] or usual[:1]
    )  # two scores on one axis would flatten one
    for label, runs in labels:
        for metric in metrics:
            if lacking := [run for run in runs if metric not in found[run]]:
                raise InputError(f"--metric {metric}: {lacking[0]} has no such metric")
            points = [found[run][metric] for run in runs]  # {step: (x, y)} of each run
            if not (steps := sorted(set.intersection(*map(set, points)))):
                raise InputError(f"--metric {metric}: {','.join(runs)} have it at no common step")
            (x, y), (_, spread) = (
                v.T for v in mean_and_spread([[run[step] for step in steps] for run in points])
            )
            curves.append((label, metric, len(runs), (x, y, spread)))
    return curves


def mean_and_spread(values) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (over n - 1; 0 where n = 1) along the first axis."""
    return np.mean(values, 0), np.std(values, 0, ddof=min(1, len(values) - 1))
