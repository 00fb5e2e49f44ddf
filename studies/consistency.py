"""How well generated orbits hold together: independent views against stochastic conditioning.

    python -m tools.shapes --out out/orbits --objects 16 --views 12 --size 24 --orbit --plain
    python -m studies.consistency --ckpt out/demo --data out/orbits --steps 20 --scale 1

For each way of sampling it prints PSNR against the true orbit, and agreement: the PSNR between
neighbouring views of what both see, where one is warped into the other by the true depth of
`tools.shapes`. Blurred views agree easily, so read both columns. OUT gets one line for each way and
seed; the table has their mean and standard deviation.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import pretrained
import sample
from data import TAN_HALF_FOV
from evaluate import psnr
from lib import cli
from lib.cli import ArgumentParser, InputError, progress, run_script
from lib.distributed import open_device
from lib.files import check_writable, write_jsonl
from lib.images import labelled_grid, load_image, save_picture
from lib.scores import mean_and_spread

WAYS = {  # name: whether --stochastic_conditioning is on
    "independent": False,
    "stochastic conditioning": True,
}


def warp(
    image: Tensor, depth: Tensor, w2c: Tensor, into_depth: Tensor, into_w2c: Tensor
) -> tuple[Tensor, Tensor]:
    """The image (3,S,S) as another camera of known depth (S,S) sees it.

    Returns (3,S,S), and where both cameras see the same surface: (S,S) bool. w2c (3,4). Depth is
    along the optical axis and 0 for the background, as `python -m tools.shapes` writes it.
    """
    size = len(depth)
    # The other camera's pixels as points in the world.
    x = ((torch.arange(size) + 0.5) * 2 / size - 1) * TAN_HALF_FOV
    right = x.expand(size, size)
    up = -x[:, None].expand(size, size)
    ray = torch.stack([right, up, -torch.ones(size, size)])
    in_camera = ray * into_depth - into_w2c[:, 3, None, None]
    world = torch.einsum("ji,jhw->ihw", into_w2c[:, :3], in_camera)
    # Where this camera sees them.
    x, y, z = torch.einsum("ij,jhw->ihw", w2c[:, :3], world) + w2c[:, 3, None, None]
    half_width = (-z * TAN_HALF_FOV).clamp(min=1e-6)
    grid = torch.stack([x, -y], dim=-1)[None] / half_width[None, ..., None]
    warped = F.grid_sample(image[None], grid, mode="bilinear", align_corners=False)[0]
    seen_depth = F.grid_sample(depth[None, None], grid, mode="nearest", align_corners=False)[0, 0]
    return warped, (into_depth > 0) & ((seen_depth + z).abs() < 0.03)


def agreement(views: Tensor, depths: Tensor, w2c: Tensor) -> float:
    """Mean PSNR, in dB on [0,1], between neighbours of an orbit where both see the object.

    views (N,3,S,S), depths (N,S,S), w2c (N,3,4). NaN where no neighbours see the same.
    """
    scores = []
    for i in range(len(views) - 1):
        warped, both = warp(views[i], depths[i], w2c[i], depths[i + 1], w2c[i + 1])
        if both.sum() > 16:
            # As images of one column, (1,3,pixels,1).
            ours = warped[None, :, both][..., None]
            theirs = views[i + 1][None, :, both][..., None]
            scores.append(psnr(ours, theirs).item())
    return float(np.mean(scores)) if scores else float("nan")


def load_orbit(root: str, name: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """An object's images (N,3,S,S), depths (N,S,S) and world-to-camera poses (N,3,4), N >= 3.

    Raises InputError where there are fewer views, or where one has no depth.
    """
    views = data.list_views(root, name)
    if len(views) < 3:
        raise InputError(
            f"--data {root}: {name} has {len(views)} view(s); it takes an input and two neighbours"
        )
    images = torch.stack([load_image(image, size)[0] for image, _ in views])
    w2c = torch.stack([torch.from_numpy(data.read_pose(npy)).float() for _, npy in views])
    depths = torch.stack(
        [load_depth(npy.with_name(f"{npy.stem}_depth.npy"), size) for _, npy in views]
    )
    return images, depths, w2c


def load_depth(path: Path, size: int) -> Tensor:
    """A depth map (size,size). Raises InputError naming the file."""
    try:
        depth = torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except Exception as error:  # np.load raises nearly anything
        raise InputError(
            f"{path}: no depth map ({error}); `python -m tools.shapes` writes them"
        ) from None
    if depth.shape != (size, size):
        raise InputError(
            f"{path}: a depth map of {tuple(depth.shape)}, the model makes {size} pixels"
        )
    return depth


def parse_args() -> argparse.Namespace:
    # --seeds replaces the --seed of add_sampler_flags.
    parser = ArgumentParser(__doc__, conflict_handler="resolve")
    sample.add_checkpoint_flags(parser)
    sample.add_sampler_flags(parser)
    parser.add_argument("--data", required=True, help="orbits with depth, by tools.shapes --orbit")
    parser.add_argument(
        "--objects", type=cli.positive_int, default=16, help="at most so many, the first"
    )
    parser.add_argument(
        "--seeds", "--seed", type=cli.seed, nargs="+", default=[0, 1, 2], help="of the noise"
    )
    parser.add_argument(
        "--batch_size", type=cli.positive_int, default=16, help="independent views at a time"
    )
    parser.add_argument(
        "--out", default="consistency.jsonl", help="file that gets one line for each way and seed"
    )
    parser.add_argument(
        "--grid", help="picture to write: the first object's true orbit, and that of each way"
    )
    return parser.parse_args()


def print_table(lines: list[dict], count: int, seeds: int, truth: list[float]) -> None:
    """Markdown: each way's scores over the seeds, and the agreement of the true views."""
    print(f"| {count} orbits, {seeds} seeds | PSNR | agreement |\n|---|---|---|")
    for way in WAYS:
        cells = []
        for key in ("psnr", "agreement"):
            mean, spread = mean_and_spread([line[key] for line in lines if line["way"] == way])
            cells.append(f"{mean:.2f} ± {spread:.2f}")
        print(f"| {way} |", " | ".join(cells), "|")
    print(f"| the true views | | {np.nanmean(truth):.2f} |")


def elevation_of(w2c: Tensor) -> float:
    """A camera's elevation in degrees, of its world-to-camera matrix (3,4)."""
    polar, _, _ = data.spherical(w2c)
    return 90 - math.degrees(polar)


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    check_writable(out)
    device, precision = open_device(args.device, args.precision)
    model, encoder, codec, meta = pretrained.load_checkpoint(
        args.ckpt, device, args.encoder_weights, args.vae, args.pose
    )
    names = data.list_objects(args.data)[: args.objects]
    orbits = [load_orbit(args.data, name, meta["image_size"]) for name in names]
    truth = [agreement(images[1:], depths[1:], w2c[1:]) for images, depths, w2c in orbits]
    if np.isnan(truth).all():
        raise InputError(
            f"--data {args.data}: neighbouring views of no orbit show the same; it takes more views"
        )

    settings = sample.sampler_settings(args, precision)
    first_images = orbits[0][0]
    grid_rows = [list(first_images)]
    lines = []
    runs = [(way, seed) for way in WAYS for seed in args.seeds]
    for way, seed in progress(runs, unit="run"):
        scores = []
        for index, (images, depths, w2c) in enumerate(orbits):
            poses = data.relative_pose(w2c[:1], w2c[1:])
            views = sample.sample_views(
                images[0],
                poses,
                model,
                encoder,
                codec,
                settings,
                seed * len(orbits) + index,
                args.batch_size,
                WAYS[way],
                input_elevation=elevation_of(w2c[0]),
            )
            view_psnr = psnr(views, images[1:]).mean().item()
            scores.append((view_psnr, agreement(views, depths[1:], w2c[1:])))
            if index == 0 and seed == args.seeds[0]:
                grid_rows.append([first_images[0], *views])
        mean_psnr, mean_agreement = np.nanmean(scores, axis=0)
        line = {
            "way": way,
            "seed": seed,
            "psnr": mean_psnr,
            "agreement": mean_agreement,
            "objects": len(orbits),
            "checkpoint": args.ckpt,
        }
        lines.append({**line, **settings})
        write_jsonl(out, lines)

    print_table(lines, len(orbits), len(args.seeds), truth)
    if args.grid:
        views = len(first_images) - 1
        azimuths = [f"{360 * i / (views + 1):.0f}°" for i in range(1, views + 1)]
        save_picture(Path(args.grid), labelled_grid(grid_rows, ["input", *azimuths]))


if __name__ == "__main__":
    run_script(main)
