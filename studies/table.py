"""The rows of an ablation as a table: evaluate.py's scores, mean and deviation over seeds.

    python -m studies.table --eval out/ablation/eval.jsonl --by t_sampling t_mean t_std amalgamate

Runs that agree in the flags of training given by --by are one row. They must be repetitions of one
experiment: of equal length, and with the same flags apart from seed and folder. The last checkpoint
of each run counts. What was not trained here, such as the baselines, comes below, if it was scored
on the same pairs. Prints Markdown.
"""

from lib.cli import ArgumentParser, InputError, hint, run_script
from lib.files import read_lines
from lib.scores import (
    ALIKE,
    LABELS,
    add_where_flag,
    check_same_training,
    last_of_each_run,
    mean_and_spread,
    read_scores,
)


def group_runs(lines: list[dict], by: list[str]) -> dict[tuple, list[dict]]:
    """{(the values of the flags `by`, row): the lines, of `read_scores`, that have them}.

    Raises InputError where a flag is unknown, or where the lines of a group do not compare.
    """
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        for flag in by:
            if flag not in line["run_args"]:
                raise InputError(f"--by {flag}: not a flag of {line['checkpoint']}")
        values = [str(line[f"train.{flag}"]) for flag in by]
        groups.setdefault((*values, line["row"]), []).append(line)
    for group in groups.values():
        with hint(", or give flags of training their own rows by --by"):
            check_same_training(group)
    return groups


def lines_without_run(paths: list[str], like: dict) -> dict[str, dict]:
    """{name: line} of the baselines and foreign checkpoints that are scored as the line `like`."""
    found = {}
    for path in paths:
        for line in read_lines(path):
            if not line.get("row") or line.get("run_args"):
                continue
            if all(line[key] == like.get(key) for key in ALIKE if key in line):
                name = line["row"]
                if "checkpoint" in line:
                    name += f" of {line['checkpoint']}"
                found[name] = line
    return found


def print_row(cells: list[str]) -> None:
    print("|", " | ".join(cells), "|")


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--eval", nargs="+", required=True, help="evaluate.py's --out")
    parser.add_argument(
        "--by",
        nargs="+",
        default=["t_sampling", "t_mean", "t_std", "amalgamate"],
        help="flags of train.py",
    )
    add_where_flag(parser)
    args = parser.parse_args()
    lines = read_scores(args.eval, args.where, ALIKE, ("samples", "poses shuffled"))
    if not lines:
        condition = " that fulfil --where" if args.where else ""
        raise InputError(f"--eval {' '.join(args.eval)}: no scores of runs{condition}")

    groups = group_runs(last_of_each_run(lines), args.by)
    for name, line in lines_without_run(args.eval, lines[0]).items():
        groups[(*[""] * len(args.by), name)] = [line]
    everything = [line for group in groups.values() for line in group]
    metrics = [key for key in LABELS if all(line.get(key) is not None for line in everything)]

    print_row([*args.by, "row", "runs", *(LABELS[metric] for metric in metrics)])
    print("|" + "---|" * (len(args.by) + 2 + len(metrics)))
    for key, group in groups.items():
        cells = [*key, str(len(group))]
        for metric in metrics:
            mean, spread = mean_and_spread([line[metric] for line in group])
            several = len(group) > 1
            cells.append(f"{mean:.4g} ± {spread:.2g}" if several else f"{mean:.4g}")
        print_row(cells)


if __name__ == "__main__":
    run_script(main)
