"""Reading logs and tables of scores (log.jsonl, eval.jsonl), and refusing what does not compare."""

import contextlib
import json
from pathlib import Path

import numpy as np

from lib.cli import InputError
from lib.files import read_lines

LABELS = {
    "psnr": "PSNR (dB) ↑",
    "ssim": "SSIM ↑",
    "lpips": "LPIPS ↓",
    "mse": "MSE on [-1, 1] ↓",
}
# Settings of the evaluation. Scores that differ in one of them do not compare.
ALIKE = (
    "data",
    "files",
    "split",
    "protocol",
    "pairs",
    "image_size",
    "lpips_net",
    "lpips_sha256",
    "sampler",
    "steps",
    "eta",
    "scale",
    "seed",
    "samples",
    "precision",
)
# What runs of train.py may differ in and still be repetitions of one experiment.
MAY_DIFFER = (
    "seed",
    "out",
    # Paths: train.py records what lies there as "training_objects" and "frozen_ids".
    "archive",
    "data",
    "weights",
    "vae",
    # How the work is done: "global_batch" says what it comes to.
    "batch_size",
    "accumulate",
    "processes",
    "device",
    "workers",
    "compile",
    "checkpointing",
    "deterministic",
    # What is written.
    "log_every",
    "val_every",
    "val_pairs",
    "preview_every",
    "save_every",
    "keep",
    "keep_every",
)


def add_where_flag(parser) -> None:
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="only lines with this value. KEY is a setting of evaluate.py or, where it has none of "
        "this name, a flag of train.py; train.KEY is always the latter",
    )


def open_table(out: Path) -> dict[str, dict]:
    """{id: line} of evaluate.py's --out, which may not be there yet. Makes OUT.pairs/.

    Raises InputError where OUT is another program's file or can't be written.
    """
    lines = {}
    try:
        if out.exists():
            for text in out.read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                lines[line["id"]] = line
        Path(f"{out}.pairs").mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"--out {out}: can't be written, or is another program's file ({error})"
        ) from None
    return lines


def read_scores(
    paths: list[str], where: list[str], alike: tuple[str, ...], rows: tuple[str, ...] = ("samples",)
) -> list[dict]:
    """The lines of evaluate.py's files that score runs of train.py and fulfil --where.

    Each has the flags of training as "train.FLAG", and "samples_seen" in training. Raises
    InputError where the lines differ in one of the keys `alike`.
    """
    lines = []
    for path in paths:
        for line in read_lines(path):
            if line.get("row") in rows and line.get("run_args"):
                lines.append(with_flags(line))
    for condition in where:
        lines = [line for line in lines if fulfils(line, condition)]
    check_alike(lines, alike)
    check_told_apart(lines)
    return lines


def check_told_apart(lines: list[dict]) -> None:
    """Raises InputError where two runs were trained with one --out: they would count as one."""
    seen = {}
    for line in lines:
        key = line["train.out"], line["step"], line["row"]
        other = seen.setdefault(key, line)
        if other.get("weights_sha256") != line.get("weights_sha256"):
            names = " and ".join(
                f"{found['checkpoint']} (weights_sha256={found['weights_sha256']})"
                for found in (other, line)
            )
            raise InputError(
                f"--eval: {names} are both of --out {key[0]}, step {key[1]}, and cannot be told "
                "apart; choose by --where"
            )


def with_flags(line: dict) -> dict:
    """The line of a run, with its flags as "train.FLAG" and the samples seen in training."""
    flags = {}
    for flag, value in line["run_args"].items():
        # A default of 1000 and a given 1000.0 are the same number.
        whole = isinstance(value, float) and value.is_integer()
        flags[f"train.{flag}"] = int(value) if whole else value
    return {**line, **flags, "samples_seen": line["step"] * flags["train.global_batch"]}


def fulfils(line: dict, condition: str) -> bool:
    """Whether the line has the value that a condition KEY=VALUE asks for."""
    key, _, text = condition.partition("=")
    value = line.get(key, line.get(f"train.{key}"))
    with contextlib.suppress(ValueError):
        if value == float(text):
            return True
    return str(value) == text


def check_alike(lines: list[dict], keys) -> None:
    """Raises InputError naming the first of the keys in which the lines differ, and how."""
    for key in keys:
        values = sorted({json.dumps(line.get(key)) for line in lines})
        if len(values) > 1:
            raise InputError(
                f"--eval: {key} {' and '.join(values)} don't compare; choose by --where"
            )


def check_same_training(lines: list[dict], except_for: tuple[str, ...] = ()) -> None:
    """Raises InputError where the runs are not repetitions of one experiment.

    lines: of `read_scores`. They may differ in MAY_DIFFER and in the flags `except_for`.
    """
    flags: set[str] = set()
    for line in lines:
        flags.update(line["run_args"])
    fixed = sorted(flags.difference(MAY_DIFFER, except_for))
    check_alike(lines, ["step", *(f"train.{flag}" for flag in fixed)])


def last_of_each_run(lines: list[dict]) -> list[dict]:
    """For each run and row, the line of its last checkpoint."""
    last = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        last[line["train.out"], line["row"]] = line
    return list(last.values())


def read_curves(args) -> list[tuple]:
    """(label, metric, number of runs, (x, mean, spread)) for each label and metric of figure 7.

    args: the flags of `visualize.py curves`. x, mean and spread are arrays over the steps that all
    runs of the label have. Raises InputError naming the flag.
    """
    if args.where and not args.eval:
        raise InputError(f"--where {args.where[0]}: chooses lines of --eval, which is not given")
    usual = ["lpips", "psnr"] if args.eval else ["loss", "val_loss_ema"]
    # A line of evaluate.py has "samples", too: the number that was drawn for a pair.
    x_key = "samples_seen" if args.eval and args.x == "samples" else args.x
    scores = read_scores(args.eval, args.where, ALIKE)
    runs_of = [split_label(text) for text in args.runs]

    points = {}  # run: {metric: {step: (x, y)}}
    for _, runs in runs_of:
        for run in runs:
            if args.eval:
                lines = [line for line in scores if is_run(line["train.out"], run)]
            else:
                lines = read_lines(Path(run, "log.jsonl"))
            points[run] = metric_points(lines, args.metric or usual, x_key)

    metrics = args.metric
    if not metrics:
        common = [metric for metric in usual if all(metric in found for found in points.values())]
        # Of scores only one is drawn: a second one on the same axis would flatten the first.
        metrics = common[: 1 if args.eval else 2] or usual[:1]
    curves = []
    for label, runs in runs_of:
        for metric in metrics:
            curves.append((label, metric, len(runs), mean_curve(metric, runs, points)))
    return curves


def split_label(text: str) -> tuple[str, list[str]]:
    """`LABEL=RUN,RUN` -> (label, runs). Without a label the runs' text is the label."""
    label, equals, runs = text.partition("=")
    return label, (runs if equals else text).split(",")


def is_run(out: str, run: str) -> bool:
    """Whether a run of train.py, whose --out may have been relative, is the folder `run`."""
    out_parts = Path(out).parts
    run_parts = Path(run).absolute().parts
    return run_parts[-len(out_parts) :] == out_parts


def metric_points(lines: list[dict], metrics: list[str], x_key: str) -> dict[str, dict]:
    """{metric: {step: (x, y)}} of a run's lines, for the metrics that they have numbers of."""
    points = {}
    for metric in metrics:
        of_metric = {}
        for line in lines:
            if type(line.get(metric)) in (int, float):
                of_metric[line["step"]] = (line[x_key], line[metric])
        if of_metric:
            points[metric] = of_metric
    return points


def mean_curve(metric: str, runs: list[str], points: dict) -> tuple:
    """(x, mean, spread) of a metric, arrays over the steps that all of the runs have.

    points: {run: {metric: {step: (x, y)}}}. Raises InputError naming the run without the metric.
    """
    for run in runs:
        if metric not in points[run]:
            raise InputError(f"--metric {metric}: {run} has no such metric")
    steps = sorted(set.intersection(*(set(points[run][metric]) for run in runs)))
    if not steps:
        raise InputError(f"--metric {metric}: {','.join(runs)} have it at no common step")
    values = [[points[run][metric][step] for step in steps] for run in runs]
    mean, spread = mean_and_spread(values)  # (steps, 2) each, of x and y
    return mean[:, 0], mean[:, 1], spread[:, 1]


def mean_and_spread(values) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (over n - 1; 0 where n = 1) along the first axis."""
    return np.mean(values, 0), np.std(values, 0, ddof=min(1, len(values) - 1))
