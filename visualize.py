"""Draw the paper's figures from what the other scripts wrote.

    # figure 1, from sample.py --save_x0 8
    python visualize.py trajectory --x0 out/samples/cat/x0.npz
    # figure 2
    python visualize.py timesteps
    # figure 4; then figures 5 and 9
    python visualize.py matching --archive out/archive --objects 00001 00003
    python visualize.py pca --archive out/archive --objects 00001 00003
    # figure 6
    python visualize.py sweep --eval out/eval.jsonl --metric lpips
    # figure 7
    python visualize.py curves base=runs/a0,runs/a1 ours=runs/b0,runs/b1 --metric val_loss_ema
    # figure 8, from sample.py --azimuth 90
    python visualize.py wild out/samples/cat out/samples/dog

Each command writes OUT.png and OUT.pdf. Figure 3 is a diagram in the README.
"""

import json
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import data
import pretrained
from lib.cli import ArgumentParser, InputError, one_line, run_script
from lib.files import write_atomically
from lib.images import open_image, to_pil
from lib.scores import (
    ALIKE,
    LABELS,
    add_where_flag,
    check_same_training,
    last_of_each_run,
    mean_and_spread,
    read_curves,
    read_scores,
)
from model import TIMESTEPS, sample_timesteps, timestep_density

CYCLE = matplotlib.cycler(
    color=["k", "b", "r", "g", "m"],
    marker=["o", "s", "^", "D", "v"],
    linestyle=["-", "--", "-.", ":", (0, (8, 2))],
)
matplotlib.rcParams.update(
    {
        "axes.prop_cycle": CYCLE,
        "figure.constrained_layout.use": True,
        "font.size": 8,
        "lines.linewidth": 1.2,
        "lines.markersize": 3.5,
        "text.parse_math": False,  # a folder's name may hold a $
    }
)

# ------------------------------------------------------------------------------------------ shared


def save(figure: Figure, out: str) -> list[Path]:
    """Write OUT.png and OUT.pdf. Raises InputError where they can't be written."""
    written = []
    for form in ("png", "pdf"):
        path = Path(f"{out}.{form}")

        def write(temporary: Path, form: str = form) -> None:
            figure.savefig(temporary, format=form, dpi=150)

        write_atomically(path, write)
        written.append(path)
    return written


def picture_grid(rows: list[list[np.ndarray]], columns: list[str], names: list[str]) -> Figure:
    """Rows of pictures (H,W,3) uint8 under the columns' titles, with a name before each row.

    A row may be short.
    """
    figure = Figure(figsize=(1.2 * len(columns) + 0.4, 1.2 * len(rows) + 0.3))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            place = i * len(columns) + j + 1
            ax = figure.add_subplot(len(rows), len(columns), place, xticks=[], yticks=[])
            ax.imshow(picture, interpolation="nearest")
            if i == 0:
                ax.set_title(textwrap.fill(columns[j], 16))
            if j == 0:
                name = names[i].encode(errors="backslashreplace").decode()  # may be no text
                ax.set_ylabel(textwrap.fill(name, 20))
    return figure


def camera_moves(folder: Path) -> list[str]:
    """The camera moves of the views in a folder of sample.py's, in words; [] if it has none.

    Raises InputError where transforms.json can't be read.
    """
    path = folder / "transforms.json"
    if not path.exists():
        return []
    try:
        frames = json.loads(path.read_text())["frames"]
        moves = [frame.get("camera_move") for frame in frames]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not from sample.py ({one_line(error)})") from None
    return moves if all(moves) else []  # sample.py did not always write them


def condense(tokens: Tensor, fitted_on: Tensor) -> Tensor:
    """Tokens (N,K) -> (N,3), by the first principal components of `fitted_on` (M,K), M > 3."""
    mean = fitted_on.mean(dim=0)
    _, _, components = torch.linalg.svd(fitted_on - mean, full_matrices=False)
    basis = components[:3].T  # (K,3)
    # An SVD leaves the signs open. The largest loading of a component is made positive, so that
    # separate fits of similar views mostly agree.
    largest = basis.abs().argmax(dim=0, keepdim=True)
    basis = basis * basis.gather(0, largest).sign()
    return (tokens - mean) @ basis


def patch_colours(patch: Tensor, cover: Tensor) -> np.ndarray:
    """Figure 5: a view's features (T,K) -> RGB (g,g,3) uint8, where T = g * g.

    cover: (T,) bool, the foreground. Its PCA gives three components, each stretched to 0 to 255.
    The background is white.
    """
    points = condense(patch[cover], patch[cover])
    low = points.amin(dim=0)
    high = points.amax(dim=0)
    stretched = (points - low) / (high - low).clamp(min=1e-12)
    colours = torch.full((len(patch), 3), 255, dtype=torch.uint8)
    colours[cover] = (255 * stretched).round().byte()
    side = round(len(patch) ** 0.5)
    return colours.unflatten(0, (side, side)).numpy()


def match_patches(a: Tensor, b: Tensor, separate: bool = False) -> Tensor:
    """A.2: for each patch of a (N,K) the nearest of b (M,K), in three components -> indices (N,).

    separate: fit a PCA to each view, as the paper does.
    """
    # Deviation: one PCA is fitted to both views. With one each, as in the paper, the two bases
    # differ, so distances between them mean little.
    both = torch.cat([a, b])
    points_a = condense(a, a if separate else both)
    points_b = condense(b, b if separate else both)
    distances = torch.cdist(
        points_a, points_b, compute_mode="donot_use_mm_for_euclid_dist"
    )  # exact, so that equal patches are at distance 0
    return distances.argmin(dim=1)


def foreground_views(archive: data.Archive, index: int) -> list[dict]:
    """The object's views with four foreground patches or more: tensors and "cover"."""
    views = []
    view_count = archive.rows[index][2]
    for number in range(view_count):
        view = archive.read_view(index, number, ("patch", "alpha", "pose", "latent_mean"))
        view["cover"] = view["alpha"] > 127  # (T,) bool: at least half of the patch
        if view["cover"].sum() > 3:
            views.append(view)
    return views


def nearest_to_45_degrees(views: list[dict]) -> tuple[int, int, float]:
    """(i, j, degrees): the two views whose directions differ by the angle nearest to 45 degrees."""
    centres = data.camera_centre(torch.stack([view["pose"] for view in views]))
    cosines = torch.cosine_similarity(centres[:, None], centres, dim=-1)
    angles = cosines.clamp(-1, 1).acos().rad2deg()  # (views, views)
    misfit = (angles - 45).abs().fill_diagonal_(torch.inf)
    i, j = divmod(int(misfit.argmin()), len(views))
    return i, j, float(angles[i, j])


def archived_pairs(args) -> list[tuple[str, list[dict]]]:
    """(title, two views) of each object of --objects, or of the first four that can be drawn.

    A view has its decoded "picture" (H,W,3) uint8, "patch" (T,K) of the deepest layer in float64,
    and "cover" (T,) bool. Raises InputError naming the flag.
    """
    archive = data.Archive(args.archive, "all")
    encoder = archive.manifest["encoder"]
    codec = pretrained.open_codec(archive.manifest["codec"], args.vae)
    if not encoder["feature_dim"]:
        raise InputError(
            f"--archive {args.archive}: holds no patch features (its --layers were empty)"
        )
    # The archive's PCA has mixed the layers for good.
    layers = 1 if encoder["pca"] else len(encoder["layers"])
    index_of = {name: index for index, name in enumerate(archive.names)}
    pairs = []
    for name in args.objects or archive.names:
        views = foreground_views(archive, index_of[name]) if name in index_of else []
        if len(views) < 2:
            if args.objects:
                raise InputError(
                    f"--objects {name}: no two views of it in {args.archive} "
                    "with four foreground patches"
                )
            continue
        i, j, degrees = nearest_to_45_degrees(views)
        pair = [views[i], views[j]]
        for view in pair:
            image = codec.decode(view["latent_mean"][None].float())[0]
            view["picture"] = np.asarray(to_pil(image))
            view["patch"] = view["patch"].double().chunk(layers, dim=1)[-1]
        pairs.append((f"{name}, {degrees:.0f}° apart", pair))
        if len(pairs) == 4 and not args.objects:
            break
    if not pairs:
        raise InputError(
            f"--archive {args.archive}: no object has two views with four foreground patches"
        )
    return pairs


# ----------------------------------------------------------------------------------------- figures


def trajectory(args) -> Figure:
    """Figure 1: the predicted x0 along DDIM's steps, noisiest first, a row per view."""
    try:
        with np.load(args.x0) as file:
            x0 = file["x0"]  # (N,views,H,W,3) uint8
            steps = file["t"]  # (N,)
        pictures = x0.transpose(1, 0, 2, 3, 4)
        names = camera_moves(Path(args.x0).parent) or [f"view {i}" for i in range(len(pictures))]
        return picture_grid(pictures, [f"t = {step}" for step in steps], names)
    except Exception as error:  # np.load raises nearly anything
        raise InputError(
            f"--x0 {args.x0}: not from sample.py --save_x0 ({one_line(error)})"
        ) from None


def timesteps(args) -> Figure:
    """Figure 2: the density of training's timesteps for several means and standard deviations.

    Lines are the density, marks what training's sampler draws.
    """
    means = [(1000, 200), (700, 200), (500, 200), (300, 200), (0, 200)]
    stds = [(1000, 100), (1000, 200), (1000, 300), (1000, 400), (1000, 500)]
    uniform = torch.rand(200_000, generator=data.seeded(0), dtype=torch.float64)
    figure = Figure(figsize=(7, 2.7))
    axes = figure.subplots(1, 2, sharey=True, subplot_kw={"xlabel": "timestep t"})
    for ax, settings in zip(axes, (means, stds), strict=True):
        for (mean, std), style in zip(settings, CYCLE, strict=True):
            ax.plot(
                timestep_density("gaussian", mean, std),
                color=style["color"],
                linestyle=style["linestyle"],
                marker="",
                label=f"mean {mean}, std {std}",
            )
            drawn = sample_timesteps(uniform, "gaussian", mean, std)
            density, edges = np.histogram(drawn, 20, (0, TIMESTEPS), density=True)
            centres = (edges[1:] + edges[:-1]) / 2
            ax.plot(centres, density, color=style["color"], marker=style["marker"], linestyle="")
        ax.legend()
    axes[0].set(ylabel="probability of t (marks: as drawn)", ylim=(0, None))
    return figure


def matching(args) -> Figure:
    """Figure 4: patches of a view joined to their nearest in feature space in another (A.2).

    Only patches of the foreground, a dozen of them, evenly over the first view.
    """
    pairs = archived_pairs(args)
    figure = Figure(figsize=(3.4, 1.9 * len(pairs)))
    axes = figure.subplots(len(pairs), squeeze=False)[:, 0]
    for ax, (name, (view_a, view_b)) in zip(axes, pairs, strict=True):
        side_by_side = np.hstack([view_a["picture"], view_b["picture"]])
        ax.imshow(side_by_side, extent=(0, 2, 1, 0), interpolation="nearest")
        patches_a = view_a["cover"].nonzero()[:, 0]  # foreground patches in reading order
        patches_b = view_b["cover"].nonzero()[:, 0]
        nearest = match_patches(
            view_a["patch"][view_a["cover"]], view_b["patch"][view_b["cover"]], args.separate
        )
        dozen = np.unique(np.linspace(0, len(patches_a) - 1, 12).astype(int))
        ends = np.stack([patches_a, patches_b[nearest]])[:, dozen]  # (2, lines)
        grid = len(view_a["cover"]) ** 0.5
        x = (ends % grid + 0.5) / grid + [[0], [1]]  # the second view is one picture to the right
        y = (ends // grid + 0.5) / grid
        ax.plot(x, y, "o-", markeredgecolor="w")
        ax.set(title=name, xticks=[], yticks=[])
    return figure


def pca(args) -> Figure:
    """Figures 5 and 9: patch features of two views as colours, by a PCA of each foreground."""
    names = []
    rows = []
    for name, (view_a, view_b) in archived_pairs(args):
        names.append(name)
        row = [
            view_a["picture"],
            view_b["picture"],
            patch_colours(view_a["patch"], view_a["cover"]),
            patch_colours(view_b["patch"], view_b["cover"]),
        ]
        rows.append(row)
    return picture_grid(rows, ["view 1", "view 2", "features 1", "features 2"], names)


def sweep(args) -> Figure:
    """Figure 6: a score by the mean and by the standard deviation of training's timesteps.

    Points are the mean over runs, bars the standard deviation.
    """
    runs = []
    for line in read_scores(args.eval, args.where, ALIKE):
        on_an_axis = line["train.t_std"] == 200 or line["train.t_mean"] == 1000
        if line["train.t_sampling"] == "gaussian" and on_an_axis:
            runs.append(line)
    runs = last_of_each_run(runs)
    check_same_training(runs, except_for=("t_mean", "t_std"))
    if not runs or not all(type(line.get(args.metric)) in (int, float) for line in runs):
        raise InputError(
            f"--metric {args.metric}: not of the runs of std 200 or mean 1000 "
            f"in {' '.join(args.eval)}"
        )
    figure = Figure(figsize=(6, 2.6))
    mean_ax, std_ax = figure.subplots(1, 2, sharey=True)
    of_std_200 = [line for line in runs if line["train.t_std"] == 200]
    draw_sweep(mean_ax, of_std_200, "train.t_mean", args.metric)
    mean_ax.set_xlabel("mean of t (std 200)")
    of_mean_1000 = [line for line in runs if line["train.t_mean"] == 1000]
    draw_sweep(std_ax, of_mean_1000, "train.t_std", args.metric)
    std_ax.set_xlabel("std of t (mean 1000)")
    label = LABELS.get(args.metric, args.metric)
    mean_ax.set_ylabel(f"{label} (mean ± s.d. of runs)")
    return figure


def draw_sweep(ax, runs: list[dict], flag: str, metric: str) -> None:
    """Mean and standard deviation of the metric over the runs with the same value of the flag."""
    values = sorted({line[flag] for line in runs})
    means = []
    spreads = []
    for value in values:
        mean, spread = mean_and_spread([line[metric] for line in runs if line[flag] == value])
        means.append(mean)
        spreads.append(spread)
    ax.errorbar(values, means, spreads, capsize=3)
    ax.set_xticks(values)


def curves(args) -> Figure:
    """Figure 7: metrics along training, mean and standard deviation over a label's runs.

    They come from the runs' log.jsonl, or from --eval.
    """
    figure = Figure(figsize=(4.5, 3))
    ax = figure.subplots()
    y_labels = []
    for label, metric, run_count, (x, mean, spread) in read_curves(args):
        at = x / 60 if args.x == "seconds" else x
        mark_every = max(1, len(at) // 10)
        name = f"{label}: {metric} (n = {run_count})"
        (line,) = ax.plot(at, mean, label=name, markevery=mark_every)
        ax.fill_between(at, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
        y_label = LABELS.get(metric, metric)
        if y_label not in y_labels:
            y_labels.append(y_label)
    ax.set_xlabel("training time (min)" if args.x == "seconds" else args.x)
    ax.set_ylabel(", ".join(y_labels))
    ax.legend()
    return figure


def wild(args) -> Figure:
    """Figure 8: the photos that sample.py was given beside their views, a row per object."""
    rows = []
    names = []
    moves = []
    for folder in args.folders:
        views = sorted(Path(folder).glob("[0-9][0-9][0-9].png"))
        files = [Path(folder, "input.png"), *views]
        rows.append([np.asarray(open_image(file).convert("RGB")) for file in files])
        # With the folder above, which is sample.py's --out: it tells models apart.
        names.append("/".join(Path(folder).absolute().parts[-2:]))
        moves.append(camera_moves(Path(folder)))
    view_count = max(len(row) for row in rows) - 1
    titles = [f"view {i}" for i in range(view_count)]
    if all(row == moves[0] for row in moves) and len(moves[0]) == view_count:
        titles = moves[0]
    return picture_grid(rows, ["input", *titles], names)


# -------------------------------------------------------------------------------------------- main


def add_archive_flags(parser) -> None:
    parser.add_argument("--archive", required=True, help="what precompute_dino.py wrote")
    parser.add_argument(
        "--objects", nargs="+", metavar="NAME", help="default: the first four that can be drawn"
    )
    parser.add_argument(
        "--vae", help="the VAE that decodes the views, where the archive's is elsewhere"
    )


def main() -> None:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="FIGURE")

    def add_command(draw) -> ArgumentParser:
        summary = draw.__doc__.splitlines()[0]
        command = commands.add_parser(draw.__name__, help=summary, description=draw.__doc__)
        command.set_defaults(draw=draw)
        default = f"out/{draw.__name__}"
        command.add_argument("--out", default=default, help="writes OUT.png and OUT.pdf")
        return command

    command = add_command(trajectory)
    command.add_argument(
        "--x0", required=True, metavar="FILE", help="x0.npz of sample.py --save_x0"
    )

    add_command(timesteps)

    command = add_command(matching)
    add_archive_flags(command)
    command.add_argument(
        "--separate", action="store_true", help="a PCA for each view (A.2) instead of one for both"
    )

    command = add_command(pca)
    add_archive_flags(command)

    command = add_command(sweep)
    command.add_argument("--metric", default="lpips", help="score to draw")
    command.add_argument(
        "--eval", nargs="+", required=True, metavar="FILE", help="evaluate.py's --out"
    )
    add_where_flag(command)

    command = add_command(curves)
    command.add_argument(
        "runs",
        nargs="+",
        metavar="[LABEL=]RUN[,RUN...]",
        help="--out of train.py; the runs of a label are averaged",
    )
    command.add_argument(
        "--metric",
        nargs="+",
        help="of log.jsonl (default: loss, val_loss_ema) or --eval (lpips, or psnr)",
    )
    command.add_argument(
        "--x", choices=["seconds", "samples", "step"], default="seconds", help="horizontal axis"
    )
    command.add_argument(
        "--eval", nargs="+", default=[], metavar="FILE", help="evaluate.py's --out"
    )
    add_where_flag(command)

    command = add_command(wild)
    command.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="an image's folder in sample.py's --out"
    )

    args = parser.parse_args()
    print("wrote", *save(args.draw(args), args.out))


if __name__ == "__main__":
    run_script(main)
