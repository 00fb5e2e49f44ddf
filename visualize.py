"""Draw the paper's figures from what the other scripts wrote.

Each command writes OUT.png and OUT.pdf; figure 3 is a diagram in the README:
    python visualize.py trajectory --x0 out/samples/cat/x0.npz                        # figure 1 (sample.py --save_x0 8)
    python visualize.py timesteps                                                     # figure 2
    python visualize.py pca --archive out/archive --objects 00001 00003               # figures 5 and 9; matching: 4
    python visualize.py sweep --eval out/eval.jsonl --metric lpips                    # figure 6
    python visualize.py curves base=runs/a0,runs/a1 ours=runs/b0,runs/b1 --metric val_loss_ema    # figure 7
    python visualize.py wild out/samples/cat out/samples/dog                          # figure 8 (--azimuth 90)
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import data
import pretrained
from data import seeded
from lib.cli import HelpFormatter, InputError, run_script
from lib.files import write_atomically
from lib.images import open_image, to_pil
from lib.scores import (
    ALIKE,
    LABELS,
    SWEPT,
    WHERE,
    check_alike,
    mean_and_spread,
    read_curves,
    read_scores,
)
from model import TIMESTEPS, sample_timesteps, timestep_density

CYCLE = matplotlib.cycler(
    color=list("kbrgm"), marker=list("os^Dv"), linestyle=["-", "--", "-.", ":", (0, (8, 2))]
)
matplotlib.rcParams.update(
    {"axes.prop_cycle": CYCLE, "figure.constrained_layout.use": True, "font.size": 8}
)
matplotlib.rc("lines", linewidth=1.2, markersize=3.5)


def save(figure: Figure, out: str) -> list[Path]:
    """Writes OUT.png and OUT.pdf. Raises InputError where it can't."""
    files = [Path(f"{out}.png"), Path(f"{out}.pdf")]
    for path in files:
        write_atomically(
            path,
            lambda temporary, form=path.suffix[1:]: figure.savefig(temporary, format=form, dpi=150),
        )
    return files


def picture_grid(rows: list[list[np.ndarray]], columns: list[str], names: list[str]) -> Figure:
    """Rows of pictures (H,W,3) uint8 behind their names, under the columns' titles; a row may be short."""
    figure = Figure(figsize=(1.2 * len(columns) + 0.4, 1.2 * len(rows) + 0.3))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            ax = figure.add_subplot(
                len(rows), len(columns), i * len(columns) + j + 1, xticks=[], yticks=[]
            )
            ax.set(title="" if i else columns[j], ylabel="" if j else textwrap.fill(names[i], 20))
            ax.imshow(picture, interpolation="nearest")
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
    points, colours = (
        condense(patch[cover], patch[cover]),
        torch.full((len(patch), 3), 255, dtype=torch.uint8),
    )
    low, high = points.amin(0), points.amax(0)
    colours[cover] = (255 * (points - low) / (high - low).clamp(min=1e-12)).round().byte()
    return colours.unflatten(0, (round(len(patch) ** 0.5), -1)).numpy()


def match_patches(a: Tensor, b: Tensor, separate: bool = False) -> Tensor:
    """A.2: for each patch of a (N,K) the nearest of b (M,K), in three principal components: indices (N,)."""
    # Deviation: one PCA is fitted on both views, as bases fitted separately, the paper's way, don't compare.
    a, b = (condense(x, x if separate else torch.cat([a, b])) for x in (a, b))
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def archived_pairs(args) -> list[tuple[str, list[dict]]]:
    """(title, two views) of each object, seen from directions as near to 45 degrees apart as there are. A view has its
    decoded "picture" (H,W,3) uint8, "patch" (T,K) of the deepest layer, "cover" (T,) bool. Raises InputError."""
    archive, pairs = data.Archive(args.archive, "all"), []
    encoder, codec = (
        archive.manifest["encoder"],
        pretrained.open_codec(archive.manifest["codec"], args.vae),
    )
    if not encoder["feature_dim"]:
        raise InputError(
            f"--archive {args.archive}: holds no patch features (its --layers were empty)"
        )
    layers = (
        1 if encoder["pca"] else len(encoder["layers"])
    )  # the archive's PCA mixes its layers for good
    indices, keys = (
        {name: i for i, name in enumerate(archive.names)},
        ("patch", "alpha", "pose", "latent_mean"),
    )
    for name in args.objects or archive.names:
        count = archive.rows[indices[name]][2] if name in indices else 0
        views = [archive.view(indices[name], i, keys) for i in range(count)]
        views = [
            view | {"cover": view["alpha"] > 127}
            for view in views
            if (view["alpha"] > 127).sum() > 3
        ]
        if len(views) < 2:
            if args.objects:
                raise InputError(
                    f"--objects {name}: no two views of it in {args.archive} with four foreground patches"
                )
            continue
        centres = data.camera_centre(torch.stack([view["pose"] for view in views]))
        angles = (
            torch.cosine_similarity(centres[:, None], centres, dim=-1).clamp(-1, 1).acos().rad2deg()
        )
        i, j = divmod(int((angles - 45).abs().fill_diagonal_(torch.inf).argmin()), len(views))
        for view in (views[i], views[j]):
            view["picture"] = np.asarray(to_pil(codec.decode(view["latent_mean"][None].float())[0]))
            view["patch"] = view["patch"].double().chunk(layers, dim=1)[-1]
        pairs.append((f"{name}, {angles[i, j]:.0f}° apart", [views[i], views[j]]))
        if len(pairs) == 4 and not args.objects:
            break
    if not pairs:
        raise InputError(
            f"--archive {args.archive}: no object has two views with four foreground patches"
        )
    return pairs


def trajectory(args) -> Figure:
    """figure 1: the predicted x0 along DDIM's steps, noisiest first, a row a view"""
    try:
        x0, t = (
            np.load(args.x0)["x0"].transpose(1, 0, 2, 3, 4),
            np.load(args.x0)["t"],
        )  # (views, N, H, W, 3), (N,)
        return picture_grid(
            x0, [f"t = {step}" for step in t], [f"view {i}" for i in range(len(x0))]
        )
    except Exception as error:  # np.load raises nearly anything
        raise InputError(
            f"--x0 {args.x0}: not from sample.py --save_x0 ({' '.join(str(error).split())})"
        ) from None


def timesteps(args) -> Figure:
    """figure 2: the density of training's timesteps for several means and stds; marks: what the sampler draws"""
    means, stds = (
        [(mean, 200) for mean in (1000, 700, 500, 300, 0)],
        [(1000, std) for std in (100, 200, 300, 400, 500)],
    )
    u = torch.rand(200_000, generator=seeded(0), dtype=torch.float64)
    axes = Figure(figsize=(7, 2.7)).subplots(1, 2, sharey=True, subplot_kw={"xlabel": "timestep t"})
    for ax, settings in zip(axes, (means, stds), strict=True):
        for (mean, std), style in zip(settings, CYCLE, strict=True):
            ax.plot(
                timestep_density("gaussian", mean, std),
                **style | {"marker": ""},
                label=f"mean {mean}, std {std}",
            )
            drawn, edges = np.histogram(
                sample_timesteps(u, "gaussian", mean, std), 20, (0, TIMESTEPS), density=True
            )
            ax.plot((edges[1:] + edges[:-1]) / 2, drawn, **style | {"linestyle": ""})
        ax.legend()
    axes[0].set(ylabel="probability of t (marks: as drawn)", ylim=(0, None))
    return axes[0].figure


def pca(args) -> Figure:
    """figures 5, 9: patch features of two views as colours, by a PCA of each view's foreground"""
    names, pairs = zip(*archived_pairs(args), strict=True)
    rows = [
        [v["picture"] for v in pair] + [patch_colours(v["patch"], v["cover"]) for v in pair]
        for pair in pairs
    ]
    return picture_grid(rows, ["view 1", "view 2", "features 1", "features 2"], names)


def matching(args) -> Figure:
    """figure 4: patches of a view joined to their nearest in feature space in another (A.2), foreground only"""
    pairs = archived_pairs(args)
    axes = Figure(figsize=(3.4, 1.9 * len(pairs))).subplots(len(pairs), squeeze=False)[:, 0]
    for ax, (name, views) in zip(axes, pairs, strict=True):
        ax.imshow(
            np.hstack([view["picture"] for view in views]),
            extent=(0, 2, 1, 0),
            interpolation="nearest",
        )
        source, target = (
            view["cover"].nonzero()[:, 0] for view in views
        )  # foreground patches in reading order
        found = match_patches(*(view["patch"][view["cover"]] for view in views), args.separate)
        some = np.unique(
            np.linspace(0, len(source) - 1, 12).astype(int)
        )  # a dozen, evenly over the first view
        ends, grid = (
            np.stack([source, target[found]])[:, some],
            len(views[0]["cover"]) ** 0.5,
        )  # (2, lines)
        ax.plot(
            (ends % grid + 0.5) / grid + [[0], [1]],
            (ends // grid + 0.5) / grid,
            "o-",
            markeredgecolor="w",
        )
        ax.set(title=name, xticks=[], yticks=[])
    return axes[0].figure


def sweep(args) -> Figure:
    """figure 6: a score by the mean and the std of training's timesteps; mean and standard deviation over runs"""
    lines = [
        line for line in read_scores(args, ALIKE + SWEPT) if line["train.t_sampling"] == "gaussian"
    ]
    lines = [line for line in lines if line["train.t_std"] == 200 or line["train.t_mean"] == 1000]
    last = {
        line["train.out"]: line for line in sorted(lines, key=lambda line: line["step"])
    }.values()  # of each run
    check_alike(last, ["step"])
    if not last or not all(type(line.get(args.metric)) in (int, float) for line in last):
        raise InputError(
            f"--metric {args.metric}: not of the runs of std 200 or mean 1000 in {' '.join(args.eval)}"
        )
    axes = Figure(figsize=(6, 2.6)).subplots(1, 2, sharey=True)
    for ax, (swept, fixed, at) in zip(
        axes, (("mean", "std", 200), ("std", "mean", 1000)), strict=True
    ):
        runs = [
            (line[f"train.t_{swept}"], line[args.metric])
            for line in last
            if line[f"train.t_{fixed}"] == at
        ]
        values = sorted({value for value, _ in runs})
        scores = [
            mean_and_spread([score for other, score in runs if other == value]) for value in values
        ]
        ax.errorbar(values, *np.reshape(scores, (-1, 2)).T, capsize=3)
        ax.set(xlabel=f"{swept} of t ({fixed} {at})", xticks=values)
    axes[0].set_ylabel(f"{LABELS.get(args.metric, args.metric)} (mean ± s.d. of runs)")
    return axes[0].figure


def curves(args) -> Figure:
    """figure 7: metrics along training, from log.jsonl or --eval; mean and standard deviation over a label's runs"""
    ax, metrics = Figure(figsize=(4.5, 3)).subplots(), {}
    for label, metric, n, (x, y, spread) in read_curves(args):
        x, unit = (x / 60, "training time (min)") if args.x == "seconds" else (x, args.x)
        (line,) = ax.plot(
            x, y, label=f"{label}: {metric} (n = {n})", markevery=max(1, len(x) // 10)
        )
        ax.fill_between(x, y - spread, y + spread, color=line.get_color(), alpha=0.15)
        metrics[metric] = LABELS.get(metric, metric)
    ax.set(xlabel=unit, ylabel=", ".join(metrics.values()))
    ax.legend()
    return ax.figure


def wild(args) -> Figure:
    """figure 8: sample.py's folders of images, the input beside its views; a row an object"""
    files = [
        [Path(folder, "input.png"), *sorted(Path(folder).glob("[0-9][0-9][0-9].png"))]
        for folder in args.folders
    ]
    rows = [[np.asarray(open_image(file).convert("RGB")) for file in row] for row in files]
    titles = ["input", *(f"view {i}" for i in range(max(map(len, rows)) - 1))]
    names = [
        "/".join(row[0].absolute().parts[-3:-1]) for row in files
    ]  # with --out's, which tells models apart
    return picture_grid(rows, titles, names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    commands, flags = parser.add_subparsers(required=True, metavar="FIGURE"), {}
    for draw in (trajectory, timesteps, matching, pca, sweep, curves, wild):
        command = commands.add_parser(
            draw.__name__, help=draw.__doc__, formatter_class=HelpFormatter
        )
        command.set_defaults(draw=draw)
        command.add_argument(
            "--out", default=f"out/{draw.__name__}", help="writes OUT.png and OUT.pdf"
        )
        flags[draw] = command.add_argument
    flags[trajectory]("--x0", required=True, metavar="FILE", help="x0.npz of sample.py --save_x0")
    for draw in (matching, pca):
        flags[draw]("--archive", required=True, help="what precompute_dino.py wrote")
        flags[draw](
            "--objects", nargs="+", metavar="NAME", help="default: the first four that can be drawn"
        )
        flags[draw](
            "--vae", help="the VAE that decodes the views, where the archive's is elsewhere"
        )
    flags[matching](
        "--separate", action="store_true", help="a PCA for each view (A.2) instead of one for both"
    )
    flags[sweep]("--metric", default="lpips", help="score to draw")
    flags[curves](
        "runs",
        nargs="+",
        metavar="[LABEL=]RUN[,RUN...]",
        help="--out of train.py; a label's are averaged",
    )
    flags[curves](
        "--metric",
        nargs="+",
        help="of log.jsonl (default: loss, val_loss_ema) or --eval (lpips, or psnr)",
    )
    flags[curves](
        "--x", choices=["seconds", "samples", "step"], default="seconds", help="horizontal axis"
    )
    for draw in (sweep, curves):
        flags[draw](
            "--eval",
            nargs="+",
            default=[],
            metavar="FILE",
            required=draw is sweep,
            help="evaluate.py's --out",
        )
        flags[draw]("--where", **WHERE)
    flags[wild](
        "folders", nargs="+", metavar="FOLDER", help="an image's folder in sample.py's --out"
    )
    args = parser.parse_args()
    print("wrote", *save(args.draw(args), args.out))


if __name__ == "__main__":
    run_script(main)
