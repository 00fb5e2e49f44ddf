"""How well generated orbits hold together: independent views against stochastic conditioning and shared noise.

    python -m tools.shapes --out out/orbits --objects 16 --views 12 --size 24 --seed 1 --orbit --plain
    python -m studies.consistency --ckpt out/demo --data out/orbits --seeds 0 1 2 --steps 20 --scale 1

For each way of sampling: PSNR against the true orbit, and agreement, the PSNR between neighbouring views of what both
see, one warped into the other by the true depth of `tools.shapes`. Blurred views agree easily: read both columns.
A line a (way, seed) goes to OUT; the table has their mean and standard deviation.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import pretrained
import sample
from data import TAN_HALF_FOV
from evaluate import psnr
from lib import images as pictures
from lib.cli import HelpFormatter, InputError, require_positive, run_script
from lib.distributed import set_up
from lib.files import check_writable, write_jsonl
from lib.images import load_image
from lib.scores import mean_and_spread

WAYS = {  # name: (--stochastic_conditioning, --shared_noise)
    "independent": (False, False),
    "shared noise": (False, True),
    "stochastic conditioning": (True, False),
    "stochastic conditioning, shared noise": (True, True),
}


def warp(
    image: Tensor, depth: Tensor, w2c: Tensor, into_depth: Tensor, into_w2c: Tensor
) -> tuple[Tensor, Tensor]:
    """The image (3,S,S) seen from another camera of known depth (S,S): (3,S,S), and where both see it (S,S) bool.

    w2c (3,4); depth along the optical axis, 0 for the background, as `python -m tools.shapes` writes it.
    """
    size = len(depth)
    x = ((torch.arange(size) + 0.5) * 2 / size - 1) * TAN_HALF_FOV
    ray = torch.stack(
        [x.expand(size, size), -x[:, None].expand(size, size), -torch.ones(size, size)]
    )
    world = torch.einsum(
        "ji,jhw->ihw", into_w2c[:, :3], ray * into_depth - into_w2c[:, 3, None, None]
    )
    x, y, z = torch.einsum("ij,jhw->ihw", w2c[:, :3], world) + w2c[:, 3, None, None]
    grid = torch.stack([x, -y], dim=-1)[None] / (-z * TAN_HALF_FOV).clamp(min=1e-6)[None, ..., None]
    warped, seen = (F.grid_sample(v[None], grid, mode=mode, align_corners=False)[0]
                    for v, mode in ((image, "bilinear"), (depth[None], "nearest")))  # fmt: skip
    return warped, (into_depth > 0) & ((seen[0] + z).abs() < 0.03)


def agreement(views: Tensor, depths: Tensor, w2c: Tensor) -> float:
    """Mean PSNR, in dB on [0,1], between neighbours among views (N,3,S,S) of an orbit, where both see the object."""
    scores = []
    for i in range(len(views) - 1):
        warped, both = warp(views[i], depths[i], w2c[i], depths[i + 1], w2c[i + 1])
        if both.sum() > 16:
            scores.append(
                psnr(
                    warped[None, :, both][..., None], views[i + 1][None, :, both][..., None]
                ).item()
            )
    return float(np.mean(scores)) if scores else float("nan")


def load_orbit(root: str, name: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(images (N,3,S,S), depths (N,S,S), world-to-camera (N,3,4)) of an object, N >= 3. InputError without depth."""
    views = data.list_views(root, name)
    if len(views) < 3:
        raise InputError(
            f"--data {root}: {name} has {len(views)} view(s); an input and two neighbours are needed"
        )
    images = torch.stack([load_image(image, size)[0] for image, _ in views])
    w2c = torch.stack([torch.from_numpy(data.read_pose(npy)).float() for _, npy in views])
    depths = []
    for _, npy in views:
        path = npy.with_name(f"{npy.stem}_depth.npy")
        try:
            depths.append(torch.from_numpy(np.load(path, allow_pickle=False)).float())
        except Exception as error:  # np.load raises nearly anything
            raise InputError(
                f"{path}: no depth map ({error}); `python -m tools.shapes` writes them"
            ) from None
        if depths[-1].shape != (size, size):
            raise InputError(
                f"{path}: a depth map of {tuple(depths[-1].shape)}, the model makes {size} pixels"
            )
    return images, torch.stack(depths), w2c


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=HelpFormatter,
        conflict_handler="resolve",
    )
    sample.add_checkpoint_flags(parser)
    sample.add_sampler_flags(parser)
    parser.add_argument("--data", required=True, help="orbits with depth, by tools.shapes --orbit")
    parser.add_argument("--objects", type=int, default=16, help="at most so many, the first")
    parser.add_argument(
        "--seeds", "--seed", type=int, nargs="+", default=[0, 1, 2], help="of the noise"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="independent views at a time")
    parser.add_argument(
        "--out", default="consistency.jsonl", help="file that gets a line a way and seed"
    )
    parser.add_argument(
        "--grid", help="picture to write: the first object's true orbit, and each way's"
    )
    args = parser.parse_args()
    require_positive(args, "objects")
    sample.check_sampler_flags(args)
    if min(args.seeds) < 0:
        raise InputError(f"--seeds {min(args.seeds)}: must not be negative")
    out = Path(args.out)
    check_writable(out)
    device, _, _ = set_up(args)
    model, encoder, codec, meta = pretrained.load_checkpoint(
        args.ckpt, device, args.encoder_weights, args.vae
    )
    names = data.list_objects(args.data)[: args.objects]
    orbits = [load_orbit(args.data, name, meta["image_size"]) for name in names]
    truth = [agreement(images[1:], depths[1:], w2c[1:]) for images, depths, w2c in orbits]
    if np.isnan(truth).all():
        raise InputError(
            f"--data {args.data}: neighbouring views of no orbit show the same; it takes more views"
        )
    lines, rows = [], [list(orbits[0][0][1:])]
    runs = list(itertools.product(WAYS, args.seeds))
    for way, seed in tqdm(runs, unit="run"):
        args.stochastic_conditioning, args.shared_noise = WAYS[way]
        scores = []
        for index, (images, depths, w2c) in enumerate(orbits):
            args.seed = seed * len(orbits) + index
            poses = data.relative_pose(w2c[:1], w2c[1:])
            views = sample.sample_views(images[0], poses, model, encoder, codec, args)
            scores.append(
                (psnr(views, images[1:]).mean().item(), agreement(views, depths[1:], w2c[1:]))
            )
            rows += [list(views)] if index == 0 and seed == args.seeds[0] else []
        score, agree = np.nanmean(scores, axis=0)
        lines.append({"way": way, "seed": seed, "psnr": score, "agreement": agree, "objects": len(orbits),
                      "checkpoint": args.ckpt} | sample.sampler_flags(args))  # fmt: skip
        write_jsonl(out, lines)
    print(f"| {len(orbits)} orbits, {len(args.seeds)} seeds | PSNR | agreement |\n|---|---|---|")
    for way in WAYS:
        cells = [
            mean_and_spread([x[key] for x in lines if x["way"] == way])
            for key in ("psnr", "agreement")
        ]
        print(f"| {way} |", " | ".join(f"{mean:.2f} ± {spread:.2f}" for mean, spread in cells), "|")
    print(f"| the true views | | {np.nanmean(truth):.2f} |")
    if args.grid:
        labels = [str(i) for i in range(1, 1 + len(rows[0]))]
        pictures.save_picture(
            Path(args.grid), pictures.labelled_grid(rows, labels, max(1, 128 // meta["image_size"]))
        )


if __name__ == "__main__":
    run_script(main)
