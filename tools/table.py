"""The rows of an ablation as a table: scores of evaluate.py, mean and standard deviation over seeds.

    python -m tools.table --eval out/ablation/eval.jsonl --by t_sampling t_mean t_std amalgamate

Runs that agree in the flags of training given by --by are one row; the last checkpoint of each run counts. Baselines
without a model come below. Prints Markdown.
"""

import argparse

import data
from data import InputError
from visualize import ALIKE, first_difference, mean_and_spread, read_lines

METRICS = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "mse": "MSE on [-1,1]"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=data.HelpFormatter)
    parser.add_argument("--eval", nargs="+", required=True, help="evaluate.py's --out")
    parser.add_argument(
        "--by", nargs="+", default=["t_sampling", "t_mean", "t_std", "amalgamate"], help="flags of train.py"
    )
    args = parser.parse_args()
    lines = [line for path in args.eval for line in read_lines(path) if "row" in line]
    if not lines:
        raise InputError(f"--eval {' '.join(args.eval)}: no scores of evaluate.py")
    runs = {(line["run_args"].get("out"), line["row"]): line for line in sorted(
        (line for line in lines if line.get("run_args")), key=lambda line: line["step"])}  # fmt: skip
    groups: dict[tuple, list[dict]] = {}
    for line in runs.values():
        if missing := [flag for flag in args.by if flag not in line["run_args"]]:
            raise InputError(f"--by {missing[0]}: not a flag of {line['checkpoint']}")
        groups.setdefault((*(line["run_args"][flag] for flag in args.by), line["row"]), []).append(line)
    for line in lines:
        if not line.get("run_args"):
            groups.setdefault((*("" for _ in args.by), line["row"]), [line])
    metrics = [key for key in METRICS if all(line.get(key) is not None for line in lines)]
    if differ := first_difference(list(runs.values()), ALIKE):
        raise InputError(f"--eval: the lines differ in {differ}, which don't compare")
    print("|", " | ".join([*args.by, "row", "runs", *(METRICS[key] for key in metrics)]), "|")
    print("|" + "---|" * (len(args.by) + 2 + len(metrics)))
    for key, group in groups.items():
        scores = [mean_and_spread([line[metric] for line in group]) for metric in metrics]
        cells = [f"{mean:.4g}" + (f" ± {spread:.2g}" if len(group) > 1 else "") for mean, spread in scores]
        print("|", " | ".join([*map(str, key), str(len(group)), *cells]), "|")


if __name__ == "__main__":
    data.run_script(main)
