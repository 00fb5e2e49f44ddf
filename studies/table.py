"""The rows of an ablation as a table: scores of evaluate.py, mean and standard deviation over seeds.

    python -m studies.table --eval out/ablation/eval.jsonl --by t_sampling t_mean t_std amalgamate

Runs that agree in the flags of training given by --by are one row, and must have been trained equally long; the last
checkpoint of each run counts. What has no flags of training, the baselines above all, comes below, where it is of the
same pairs. Prints Markdown.
"""

import argparse

from lib.cli import HelpFormatter, InputError, run_script
from lib.scores import ALIKE, LABELS, WHERE, check_alike, mean_and_spread, read_lines, read_scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument("--eval", nargs="+", required=True, help="evaluate.py's --out")
    parser.add_argument(
        "--by",
        nargs="+",
        default=["t_sampling", "t_mean", "t_std", "amalgamate"],
        help="flags of train.py",
    )
    parser.add_argument("--where", **WHERE)
    args = parser.parse_args()
    lines = sorted(
        read_scores(args, ALIKE, ("samples", "poses shuffled")), key=lambda line: line["step"]
    )
    if not lines:
        raise InputError(
            f"--eval {' '.join(args.eval)}: no scores of runs{' that fulfil --where' * bool(args.where)}"
        )
    groups: dict[tuple, list[dict]] = {}
    for line in {(line["train.out"], line["row"]): line for line in lines}.values():
        if missing := [flag for flag in args.by if flag not in line["run_args"]]:
            raise InputError(f"--by {missing[0]}: not a flag of {line['checkpoint']}")
        groups.setdefault(
            (*(str(line["run_args"][flag]) for flag in args.by), line["row"]), []
        ).append(line)
    for group in groups.values():
        check_alike(group, ["step", "train.steps", "train.global_batch"])
    for other in (line for path in args.eval for line in read_lines(path) if line.get("row")):
        if not other.get("run_args") and all(
            other[key] == lines[0].get(key) for key in ALIKE if key in other
        ):
            row = " of ".join(other[key] for key in ("row", "checkpoint") if key in other)
            groups[(*("" for _ in args.by), row)] = [other]
    metrics = [
        key
        for key in LABELS
        if all(line.get(key) is not None for group in groups.values() for line in group)
    ]
    print("|", " | ".join([*args.by, "row", "runs", *(LABELS[key] for key in metrics)]), "|")
    print("|" + "---|" * (len(args.by) + 2 + len(metrics)))
    for key, group in groups.items():
        scores = [mean_and_spread([line[metric] for line in group]) for metric in metrics]
        cells = [
            f"{mean:.4g}" + (f" ± {spread:.2g}" if len(group) > 1 else "")
            for mean, spread in scores
        ]
        print("|", " | ".join([*key, str(len(group)), *cells]), "|")


if __name__ == "__main__":
    run_script(main)
