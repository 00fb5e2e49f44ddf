"""Reading logs and tables of scores (log.jsonl, eval.jsonl), and refusing to compare what does not compare."""

import contextlib
import json
from pathlib import Path

import numpy as np

from tools.cli import InputError

LABELS = {"psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓", "mse": "MSE on [-1, 1] ↓"}
# scores that differ in any of these don't compare: settings of the evaluation, and, in one sweep, of training
ALIKE = "data files split protocol pairs image_size lpips_net lpips_sha256".split()
ALIKE += "sampler steps eta scale seed precision".split()
SWEPT = [f"train.{k}" for k in ("archive", "init", "width", "amalgamate", "prediction", "steps", "global_batch", "lr")]
WHERE = dict(nargs="+", default=[], metavar="KEY=VALUE", help="only lines of which this is so: evaluate.py's "
             "settings or, where it has none of the name, train.py's flags; train.KEY for the latter")  # fmt: skip


def read_lines(path: str | Path) -> list[dict]:
    """The records of a .jsonl file, but for lines torn by a crash or still being written. Raises InputError."""
    try:
        return [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unreadable ({error})") from None


def open_table(out: Path) -> dict[str, dict]:
    """{id: line} of evaluate.py's --out, which may not be there yet; makes OUT.pairs/. Raises InputError."""
    try:
        lines = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())} if out.exists() else {}
        Path(f"{out}.pairs").mkdir(parents=True, exist_ok=True)
        return lines
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"--out {out}: can't be written, or is another program's file ({error})") from None


def read_scores(args, alike: list[str], rows: tuple[str, ...] = ("samples",)) -> list[dict]:
    """--eval's lines on runs that fulfil --where, with training's flags as "train.*" and "samples" as seen in training.
    Raises InputError when they differ in one of the keys `alike`."""
    lines = [s for path in args.eval for s in read_lines(path) if s.get("run_args") and s.get("row") in rows]
    for line in lines:
        line |= {f"train.{key}": value for key, value in line["run_args"].items()}
        line["samples"] = line["step"] * line["train.global_batch"]
    for key, _, text in (condition.partition("=") for condition in args.where):
        number = text
        with contextlib.suppress(ValueError):
            number = float(text)
        lines = [s for s in lines if (v := s.get(key, s.get(f"train.{key}"))) == number or str(v) == text]
    if differ := first_difference(lines, alike):
        raise InputError(f"--eval: {differ} don't compare; choose by --where")
    return lines


def first_difference(lines: list[dict], keys: list[str]) -> str | None:
    """The first of the keys in which the lines differ, and how; None where they agree in all."""
    values = {key: sorted({json.dumps(line.get(key)) for line in lines}) for key in keys}
    return next((f"{key} {' and '.join(found)}" for key, found in values.items() if len(found) > 1), None)


def mean_and_spread(values) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (over n - 1; 0 where n = 1) along the first axis."""
    return np.mean(values, 0), np.std(values, 0, ddof=min(1, len(values) - 1))
