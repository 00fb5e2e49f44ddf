"""Draw the paper's figures from what the other scripts wrote: archives, samples, logs and scores.

    python visualize.py timesteps                                                     # figure 2
    python visualize.py pca --archive out/archive --data data/shapes                  # figures 5 and 9; matching: 4
    python visualize.py trajectory --x0 out/samples/cat/x0.npz                        # figure 1 (sample.py --save_x0 8)
    python visualize.py sweep --eval out/eval.jsonl --metric lpips                    # figure 6
    python visualize.py curves base=runs/a0,runs/a1 ours=runs/b0,runs/b1 --metric val_loss_ema    # figure 7
    python visualize.py wild out/samples/cat out/samples/dog                          # figure 8 (--azimuth 90)

Each writes OUT.png and OUT.pdf. Figure 3 is a diagram in the README.
"""

import argparse
import contextlib
import itertools
import json
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

import data
import pretrained
from data import InputError
from model import TIMESTEPS, sample_timesteps, timestep_density
from precompute_dino import write_atomically
from sample import seeded, to_pil

LABELS = {"seconds": "training time (min)", "samples": "samples seen", "step": "optimiser steps", "lpips": "LPIPS ↓",
          "psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑", "mse": "MSE on [-1, 1] ↓", "loss": "training loss, t as drawn",
          "val_loss": "held-out loss, t uniform", "val_loss_ema": "held-out loss of the EMA, t uniform"}  # fmt: skip
# scores that differ in any of these don't compare: settings of the evaluation, and, in one sweep, of training
ALIKE = ["data", "split", "protocol", "pairs", "image_size", "lpips_net", "steps", "eta", "scale", "seed"]
SWEPT = [f"train.{k}" for k in ("archive", "init", "width", "amalgamate", "prediction", "steps", "global_batch", "lr")]
CYCLE = (cycler(color=["#000000", "#2c5fa8", "#d1495b", "#2a9d8f", "#e0a030"], marker=list("os^Dv"))
         + cycler(linestyle=["-", (0, (5, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (8, 2))]))  # fmt: skip
matplotlib.rcParams |= {"axes.prop_cycle": CYCLE, "font.size": 8, "axes.titlesize": 8, "legend.frameon": False,
                        "lines.linewidth": 1.2, "lines.markersize": 3.5, "figure.constrained_layout.use": True,
                        "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150}  # fmt: skip


def save(figure: Figure, out: str) -> list[Path]:
    """Writes OUT.png and OUT.pdf, the same bytes for the same figure. Raises InputError where it can't."""
    files = [Path(out.removesuffix(".png").removesuffix(".pdf") + suffix) for suffix in (".png", ".pdf")]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    for path, stamp in zip(files, ("Software", "CreationDate"), strict=True):
        write_atomically(path, partial(figure.savefig, format=path.suffix[1:], metadata={stamp: None}))
    return files


def read_lines(path: str | Path) -> list[dict]:
    """The records of a .jsonl file, but for lines torn by a crash or still being written. Raises InputError if none."""
    try:
        lines, records = Path(path).read_text(errors="replace").splitlines(), []
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    if not records or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path}: no records in it")
    return records


def read_scores(args, alike: list[str]) -> list[dict]:
    """--eval's lines on samples that fulfil --where, with training's flags as "train.*" and "samples" seen in training.

    Raises InputError when they differ in one of the keys `alike`.
    """
    lines = [line for path in args.eval for line in read_lines(path) if line.get("row") == "samples"]
    for line in lines:
        flags = line.pop("run_args", None) or {}
        line |= {"samples": line["step"] * flags["global_batch"]} if flags else {"samples": None}
        line |= {f"train.{key}": value for key, value in flags.items()}
    for key, _, value in (condition.partition("=") for condition in args.where):
        lines = [line for line in lines if str(line.get(f"train.{key}", line.get(key))) == value]
    for key in alike:
        if len(values := {json.dumps(line.get(key)) for line in lines}) > 1:
            raise InputError(f"--eval: {key} {' and '.join(sorted(values))} don't compare; choose by --where")
    return lines


def with_numbers(lines: list[dict], metric: str, x: str, source: str) -> list[dict]:
    """The lines that have numbers for the metric and x. Raises InputError that lists what there is."""
    if found := [line for line in lines if all(isinstance(line.get(key), float | int) for key in ("step", metric, x))]:
        return found
    there = sorted({key for line in lines for key, value in line.items() if isinstance(value, float)})
    raise InputError(f"--metric {metric} by {x}: not in {source}, which has: {', '.join(there) or 'nothing'}")


def mean_and_spread(values) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (over n - 1; 0 where n = 1) along the first axis."""
    values = np.asarray(values, dtype=np.float64)
    return values.mean(0), values.std(0, ddof=min(1, len(values) - 1))


def picture_grid(rows: list[list[np.ndarray | None]], columns: list[str], names: list[str]) -> Figure:
    """Rows of pictures (H,W,3) uint8 behind their names, under the columns' titles; None leaves a place empty."""
    figure = Figure(figsize=(1.2 * len(columns) + 0.4, 1.2 * len(rows) + 0.3))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for (i, row), (j, title) in itertools.product(enumerate(rows), enumerate(columns)):
        axes[i, j].set(xticks=[], yticks=[], title="" if i else title, ylabel="" if j else names[i])
        axes[i, j].spines[:].set(color="0.8", visible=row[j] is not None)
        if row[j] is not None:
            axes[i, j].imshow(row[j], interpolation="nearest")
    return figure


def condense(tokens: Tensor, fitted_on: Tensor) -> Tensor:
    """Tokens (N,K) -> (N,3), by the first principal components of `fitted_on` (M,K), M > 3."""
    mean = fitted_on.mean(0)
    basis = torch.linalg.svd(fitted_on - mean, full_matrices=False)[2][:3].T  # (K, 3)
    # a component's largest loading is made positive, so that separate fits of like views mostly agree in sign
    return (tokens - mean) @ (basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign())


def patch_colours(patch: Tensor, cover: Tensor) -> np.ndarray:
    """Figure 5: features (T,K) of a view -> RGB (g,g,3) uint8, T = g²: three components of the PCA of its foreground,
    cover (T,) bool, stretched to 0-255 each; white elsewhere."""
    points, colours = condense(patch[cover], patch[cover]), torch.full((len(patch), 3), 255, dtype=torch.uint8)
    low, high = points.amin(0), points.amax(0)
    colours[cover] = (255 * (points - low) / (high - low).clamp(min=1e-12)).round().byte()
    return colours.unflatten(0, (round(len(patch) ** 0.5), -1)).numpy()


def match_patches(a: Tensor, b: Tensor, separate: bool = False) -> Tensor:
    """A.2: for each patch of a (N,K) the nearest of b (M,K), in three principal components: indices (N,)."""
    # Deviation: one PCA is fitted on both views, as bases fitted separately, the paper's way, don't compare.
    a, b = (condense(x, x if separate else torch.cat([a, b])) for x in (a, b))
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def archived_pairs(args) -> list[tuple[str, list[dict]]]:
    """(title, two views) of each object: those with more than three foreground patches, seen from directions as near to
    --degrees apart as there are. A view: "patch" (T,K), "cover" (T,) bool (of more than half), "picture" (see picture).
    """
    data.require_positive(args, "count")
    archive, pairs = data.Archive(args.archive, "all"), []
    layers = archive.manifest["encoder"]["layers"]
    if not layers:
        raise InputError(f"--archive {args.archive}: has no patch features, its --layers are empty")
    for name in args.objects or archive.names[: args.count]:
        if name not in archive.names:
            raise InputError(f"--objects {name}: not in {args.archive}: {', '.join(archive.names[:9])}, ...")
        index, keys = archive.names.index(name), ("patch", "alpha", "pose", "latent_mean")
        views = [archive.view(index, view, keys) for view in range(archive.rows[index][2])]
        views = [view for view in views if (view["alpha"] > 127).sum() > 3]
        if len(views) < 2:
            raise InputError(f"--objects {name}: too small, {len(views)} views with more than three foreground patches")
        directions = torch.nn.functional.normalize(data.camera_centre(torch.stack([view["pose"] for view in views])))
        angles = (directions @ directions.T).clamp(-1, 1).arccos().rad2deg().fill_diagonal_(torch.inf)
        pair = sorted(divmod(int((angles - args.degrees).abs().argmin()), len(views)))
        for view in (views := [views[i] for i in pair]):
            view["cover"], view["picture"] = view["alpha"] > 127, picture(args.data, archive.manifest, name, view)
            mixed = args.layer == "all" or archive.manifest["encoder"]["pca"]  # the archive's PCA mixes layers for good
            view["patch"] = view["patch"].double().chunk(1 if mixed else len(layers), dim=1)[-1]
        pairs.append((f"{name}\n{angles[*pair]:.0f}° apart", views))
    return pairs


def picture(root: str | None, manifest: dict, name: str, view: dict) -> np.ndarray | None:
    """An archived view as an image (H,W,3) uint8: --data's of the same pose, or decoded where that takes no weights."""
    for image, npy in data.list_views(root, name) if root else ():
        if np.allclose(data.read_pose(npy), view["pose"], atol=1e-5):
            return np.asarray(to_pil(data.load_image(image, manifest["image_size"])[0]))
    if root:
        raise InputError(f"--data {root}: no view of {name} has the archived pose")
    if manifest["codec"]["name"] != "pixels":
        return None
    return np.asarray(to_pil(pretrained.SpaceToDepth(manifest["codec"]["factor"]).decode(view["latent_mean"])))


def trajectory(args) -> Figure:
    """figure 1: the predicted x0 along DDIM's steps, noisiest first, a row a view"""
    rows, names, steps = [], [], None
    for path in map(Path, args.x0):
        try:
            with np.load(path) as file:
                x0, t = file["x0"].swapaxes(0, 1), file["t"].tolist()  # (views, N, H, W, 3), (N,)
        except Exception as error:  # np.load raises nearly anything
            raise InputError(f"--x0 {path}: not from sample.py --save_x0 ({' '.join(str(error).split())})") from None
        if t != (steps := steps or t):
            raise InputError(f"--x0 {path}: its timesteps are not those of {args.x0[0]}")
        rows += list(x0)
        names += [path.absolute().parent.name + (f", {i}" if len(x0) > 1 else "") for i in range(len(x0))]
    return picture_grid(rows, [f"t = {step}" for step in steps], names)


def timesteps(args) -> Figure:
    """figure 2: the density of training's timesteps for several means and stds; marks: what the sampler draws"""
    if min(args.stds) <= 0:
        raise InputError(f"--stds {min(args.stds):g}: must be positive")
    figure, width = Figure(figsize=(7, 2.7)), TIMESTEPS // 20
    u = torch.rand(200_000, generator=seeded(0), dtype=torch.float64)
    panels = {"mean": [(mean, 200) for mean in args.means], "std": [(1000, std) for std in args.stds]}
    for ax, swept in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for (mean, std), style in zip(panels[swept], itertools.cycle(CYCLE), strict=False):
            label = f"{swept} {mean if swept == 'mean' else std:g}"
            ax.plot(timestep_density("gaussian", mean, std), **style | {"marker": ""}, label=label)
            share = torch.bincount(sample_timesteps(u, "gaussian", mean, std) // width, minlength=20) / len(u)
            ax.plot(np.arange(20) * width + width / 2, share / width, **style | {"linestyle": ""})
        ax.set(xlabel="timestep t", title="std 200" if swept == "mean" else "mean 1000")
        ax.legend()
    figure.axes[0].set(ylabel="probability of t (marks: as drawn)", ylim=(0, None))
    return figure


def pca(args) -> Figure:
    """figures 5, 9: patch features of two views as colours, by a PCA of each view's foreground"""
    names, pairs = zip(*archived_pairs(args), strict=True)
    rows = [[v["picture"] for v in pair] + [patch_colours(v["patch"], v["cover"]) for v in pair] for pair in pairs]
    rows = [[cell for cell in row if cell is not None] for row in rows]
    return picture_grid(rows, ["view 1", "view 2", "features 1", "features 2"][-len(rows[0]) :], names)


def matching(args) -> Figure:
    """figure 4: patches of a view joined to their nearest in feature space in another (A.2), foreground only"""
    pairs, gap = archived_pairs(args), 1.1
    columns, rows = min(2, len(pairs)), -(-len(pairs) // 2)
    figure = Figure(figsize=(3.4 * columns, 1.9 * rows))
    for i, (name, views) in enumerate(pairs):
        ax = figure.add_subplot(rows, columns, i + 1)
        for left, view in zip((0, gap), views, strict=True):
            shown = patch_colours(view["patch"], view["cover"]) if view["picture"] is None else view["picture"]
            ax.imshow(shown, extent=(left, left + 1, 1, 0), interpolation="nearest")
        source, target = (view["cover"].nonzero()[:, 0] for view in views)  # foreground patches in reading order
        found = match_patches(*(view["patch"][view["cover"]] for view in views), args.separate)
        ends, grid = np.stack([source, target[found]], axis=1), len(view["cover"]) ** 0.5
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, max(1, args.lines)).astype(int))]
        for end, colour in zip(ends, matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(ends))), strict=True):
            style = {"color": colour, "markersize": 2.5, "path_effects": [withStroke(linewidth=2.4, foreground="w")]}
            ax.plot((end % grid + 0.5) / grid + (0, gap), (end // grid + 0.5) / grid, "o-", **style)
        ax.set(xlim=(0, 1 + gap), ylim=(1, 0), title=name.replace("\n", ", "))
        ax.axis("off")
    return figure


def sweep(args) -> Figure:
    """figure 6: a score by the mean and the std of training's timesteps; mean and standard deviation over runs"""
    lines = [line for line in read_scores(args, ALIKE + SWEPT) if line.get("train.t_sampling") == "gaussian"]
    lines = with_numbers(lines, args.metric, "train.t_mean", f"the Gaussian runs of {', '.join(args.eval)}")
    lines = {line["train.out"]: line for line in sorted(lines, key=lambda line: line["step"])}.values()  # a run's last
    figure = Figure(figsize=(6, 2.6))
    panels = (("mean", "std", 200), ("std", "mean", 1000))
    for ax, (swept, fixed, at) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        scores = {}
        for line in lines:
            if line[f"train.t_{fixed}"] == at:
                scores.setdefault(line[f"train.t_{swept}"], []).append(line[args.metric])
        if scores:
            mean, spread = np.transpose([mean_and_spread(scores[value]) for value in sorted(scores)])
            ax.errorbar(sorted(scores), mean, spread, capsize=3, label="mean, standard deviation")
            runs = np.transpose([(value, score) for value in scores for score in scores[value]])
            ax.plot(*runs, "x", color="0.5", label="a run")
            ax.legend()
        ax.set(xlabel=f"{swept} of t ({fixed} {at})", xticks=sorted(scores))
    figure.axes[0].set_ylabel(LABELS.get(args.metric, args.metric))
    return figure


def curves(args) -> Figure:
    """figure 7: metrics along training, from log.jsonl or --eval; mean and standard deviation over a label's runs"""
    scores, records, groups = read_scores(args, ALIKE), {}, {}
    for text in args.runs:
        label, _, runs = text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text)
        groups.setdefault(label or runs, []).extend(runs.split(","))
    for run in itertools.chain(*groups.values()):
        records[run] = [s for s in scores if Path(s["weights"]).resolve().is_relative_to(Path(run).resolve())]
        if not records[run] or (Path(run) / "log.jsonl").exists():
            records[run] += read_lines(Path(run) / "log.jsonl")
    there = {key for lines in records.values() for line in lines for key in line}
    metrics = args.metric or [key for key in ("loss", "val_loss", "val_loss_ema") if key in there] or ["loss"]
    ax = Figure(figsize=(4.5, 3)).subplots()
    for (label, runs), metric in itertools.product(groups.items(), metrics):
        found = [with_numbers(records[run], metric, args.x, run) for run in runs]
        found = [{line["step"]: (line[args.x], line[metric]) for line in lines} for lines in found]
        steps = sorted(set.intersection(*map(set, found)))
        if not steps:
            raise InputError(f"{label}: no step at which all of {', '.join(runs)} have {metric}")
        (x, raw), (_, spread) = (v.T for v in mean_and_spread([[run[step] for step in steps] for run in found]))
        x, decay = x / 60 if args.x == "seconds" else x, args.smooth if metric == "loss" else 0
        y = np.array([*itertools.accumulate(raw, lambda mean, value, d=decay: d * mean + (1 - d) * value)])
        name = [label] * (len(groups) > 1 or len(metrics) == 1) + [LABELS.get(metric, metric)] * (len(metrics) > 1)
        name = ": ".join(name) + (f" ({len(runs)} runs)" if len(runs) > 1 else "")
        (line,) = ax.plot(x, y, label=name, markevery=max(1, len(x) // 10))
        style = {"color": line.get_color(), "linewidth": 0.5}
        ax.fill_between(x, y - spread, y + spread, alpha=0.15, **style)
        if decay:
            ax.plot(x, raw, alpha=0.4, marker="", linestyle="-", **style)
    ax.set(xlabel=LABELS[args.x], ylabel=LABELS.get(metric, metric) if len(metrics) == 1 else "loss")
    ax.legend()
    return ax.figure


def wild(args) -> Figure:
    """figure 8: sample.py's folders of images, the input beside its views; a row an object"""
    rows, names = [], [Path(folder).absolute().name for folder in args.folders]
    for folder in map(Path, args.folders):
        paths = [folder / "input.png", *sorted(folder.glob("[0-9][0-9][0-9].png"))]
        rows.append([np.asarray(data.open_image(path).convert("RGB")) for path in paths])
    width = max(map(len, rows))
    titles = ["input"] + [args.title + (f" {i}" if width > 2 else "") for i in range(width - 1)]
    return picture_grid([row + [None] * (width - len(row)) for row in rows], titles, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=data.HelpFormatter)
    commands, flags = parser.add_subparsers(required=True, metavar="FIGURE"), {}
    for draw in (trajectory, timesteps, pca, matching, sweep, curves, wild):
        text = {"help": draw.__doc__, "description": draw.__doc__, "formatter_class": data.HelpFormatter}
        command = commands.add_parser(draw.__name__, **text)
        command.set_defaults(draw=draw)
        command.add_argument("--out", default=f"out/{draw.__name__}", help="writes OUT.png and OUT.pdf")
        flags[draw] = command.add_argument
    flags[trajectory]("--x0", nargs="+", required=True, metavar="FILE", help="x0.npz of sample.py --save_x0")
    flags[timesteps]("--means", nargs="+", type=float, default=[1000, 700, 500, 300, 0], help="at std 200 (3.2)")
    flags[timesteps]("--stds", nargs="+", type=float, default=[100, 200, 300, 400, 500], help="at mean 1000 (3.2)")
    for draw in (pca, matching):
        flags[draw]("--archive", required=True, help="what precompute_dino.py wrote")
        flags[draw]("--data", help="the renders that it is of, for the images")
        flags[draw]("--objects", nargs="+", metavar="NAME", help="objects to draw instead of the first --count")
        flags[draw]("--count", type=int, default=4, help="objects")
        flags[draw]("--degrees", type=float, default=45, help="sought between the two views' directions")
        flags[draw]("--layer", choices=["last", "all"], default="last", help="of the archived layers")
    flags[matching]("--separate", action="store_true", help="a PCA for each view (A.2) instead of one for both")
    flags[matching]("--lines", type=int, default=12, help="matches drawn of each pair, evenly over the first view")
    flags[sweep]("--metric", default="lpips", help="score to draw")
    flags[curves]("runs", nargs="+", metavar="[LABEL=]RUN[,RUN...]", help="--out of train.py; a label's are averaged")
    flags[curves]("--metric", nargs="+", help="of log.jsonl or --eval; default: training and held-out loss")
    flags[curves]("--x", choices=["seconds", "samples", "step"], default="seconds", help="horizontal axis")
    flags[curves]("--smooth", type=float, default=0.6, help="decay of the moving average of the training loss; 0: none")
    for draw in (sweep, curves):
        flags[draw]("--eval", nargs="+", default=[], metavar="FILE", required=draw is sweep, help="evaluate.py's --out")
        flags[draw]("--where", nargs="+", default=[], metavar="KEY=VALUE", help="scores to take, by flags of training")
    flags[wild]("folders", nargs="+", metavar="FOLDER", help="an image's folder in sample.py's --out")
    flags[wild]("--title", default="view", help="over the views, such as the camera's move")
    args = parser.parse_args()
    print("wrote", *save(args.draw(args), args.out))


if __name__ == "__main__":
    data.run_script(main)
