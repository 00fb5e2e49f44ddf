"""Score novel views on fixed pairs of held-out objects, beside baselines: MSE, PSNR, SSIM, LPIPS (section 4).

    python evaluate.py --ckpt runs/demo --data data/shapes --pairs 32 --steps 20 --lpips none --shuffled    # a CPU
    python evaluate.py --ckpt runs/full --data DIR --split val                                              # one GPU
    torchrun --nproc_per_node 8 evaluate.py --ckpt runs/full runs/baseline --data DIR --protocol first --samples 3

A sample's noise depends on (--seed, object, target view, sample number) alone: neither batch size nor world size
changes more than rounding. OUT gets a line a row of the table, in place of one of the same settings; OUT.pairs/ gets
every pair's values as they come, and rerunning the command goes on from there.
"""

import argparse
import hashlib
import json
import os
import warnings
from functools import partial
from pathlib import Path

import lpips
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import pretrained
import sample
from data import InputError
from precompute_dino import pick_device, write_atomically

METRICS = ("psnr", "ssim", "lpips", "mse")


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of images (B,3,H,W) in [-1,1] -> (B,). The paper does not state its images' range."""
    return (a.double() - b.double()).square().mean(dim=(1, 2, 3))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B,3,H,W) in [-1,1], taken on [0,1] -> (B,); 100 where equal."""
    return -10 * (mse(a, b) / 4).clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B,3,H,W) in [-1,1], taken on [0,1] -> (B,).

    Gaussian window of 11 pixels, sigma 1.5, biased variances: scikit-image's with use_sample_covariance=False.
    """
    a, b = (a.double() + 1) / 2, (b.double() + 1) / 2
    g = torch.exp(-((torch.arange(11, device=a.device, dtype=a.dtype) - 5) ** 2) / (2 * 1.5**2))
    window = (g.outer(g) / g.sum() ** 2).expand(15, 1, 11, 11)
    moments = F.conv2d(torch.cat([a, b, a * a, b * b, a * b], dim=1), window, groups=15)  # (B,15,H-10,W-10)
    ma, mb, aa, bb, ab = moments.chunk(5, dim=1)
    luminance = (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
    return (luminance * (2 * (ab - ma * mb) + 9e-4) / (aa - ma**2 + bb - mb**2 + 9e-4)).mean(dim=(1, 2, 3))


def open_lpips(net: str, backbone: str | None = None) -> lpips.LPIPS | None:
    """LPIPS (Zhang et al. 2018) of images (B,3,H,W) in [-1,1] -> (B,1,1,1), its network's weights torchvision's, from a
    file or downloaded; where that fails, None, and the reason printed. Raises InputError for a wrong file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # lpips calls torchvision in a deprecated way
            model = lpips.LPIPS(net=net, pnet_rand=bool(backbone), verbose=False)
    except (OSError, RuntimeError) as error:
        return print(f"no LPIPS: torchvision's {net} network can't be downloaded ({error}); give --lpips_backbone FILE")
    if backbone:
        weights = pretrained.read_tensors(backbone)
        try:  # torchvision's features.3.weight is slice2.3.weight in lpips
            model.net.load_state_dict({k: weights[f"features.{k.split('.', 1)[1]}"] for k in model.net.state_dict()})
        except (KeyError, RuntimeError):
            raise InputError(f"--lpips_backbone {backbone}: not torchvision's {net} network") from None
    return model


def fixed_pairs(root: str, val_fraction: float, split: str, protocol: str, count: int | None = None) -> list[dict]:
    """Ordered pairs of views of the split's objects, always the same: key, object, view, and the paths to load.

    "pairs": drawn as in training, one an object and for a higher `count` of more epochs, repeats left out; "first": an
    object's first view is the input, all others are targets. Raises InputError when there are none.
    """
    names = data.list_objects(root)
    chosen = {*data.split_objects(names, val_fraction, split)}
    views = {i: v for i, name in enumerate(names) if name in chosen and len(v := data.list_views(root, name)) > 1}
    if not views:
        raise InputError(f"{root}: no object with two views in --split {split} at --val_fraction {val_fraction}")
    if len(views) < len(chosen):
        print(f"{root}: {len(chosen) - len(views)} objects with fewer than two views are left out")
    drawn = [(i, 0, j) for i, v in views.items() for j in range(1, len(v))]
    if protocol == "pairs":
        epochs = range(-(-(count or 1) // len(views)))
        drawn = [(i, *data.draw_pair(0, epoch, i, len(v))) for epoch in epochs for i, v in views.items()]
    pairs = {}
    for i, c, t in drawn[:count]:
        (cond, cond_pose), (target, target_pose) = views[i][c], views[i][t]
        pair = {"key": f"{names[i]} {cond.stem} {target.stem}", "object": i, "view": int(target.stem)}
        pairs[pair["key"]] = pair | {"cond": cond, "target": target, "move": (cond_pose, target_pose)}
    return list(pairs.values())


def shuffled(pairs: list[dict], seed: int) -> list[dict]:
    """The pairs, each with another's camera move: a derangement, as the moves go once round a cycle through all."""
    if len(pairs) < 2:
        raise InputError("--shuffled: takes two pairs or more")
    order = np.random.default_rng(seed).permutation(len(pairs))
    giver = dict(zip(order, np.roll(order, 1), strict=True))
    return [pair | {"move": pairs[giver[i]]["move"]} for i, pair in enumerate(pairs)]


def load_pairs(pairs: list[dict], size: int) -> dict:
    """{"pairs", "cond" and "target" (B,3,size,size), "pose" (B,4)}."""
    images = {key: torch.stack([data.load_image(pair[key], size)[0] for pair in pairs]) for key in ("cond", "target")}
    moves = [[torch.from_numpy(data.read_pose(path)) for path in pair["move"]] for pair in pairs]
    return images | {"pairs": pairs, "pose": torch.stack([data.relative_pose(*move) for move in moves])}


def sample_pairs(batch: dict, model, encoder, codec, args):
    """Yields the model's views (B,3,H,W) of a batch of pairs, --samples times; conditions are encoded once."""
    condition = sample.condition_on(batch["cond"].to(args.device), encoder, codec)
    condition["pose"] = batch["pose"].to(args.device)
    for k in range(args.samples):
        noise = [sample.seeded(args.seed, pair["object"], pair["view"], k) for pair in batch["pairs"]]
        latent = sample.ddim(model, [condition], noise, **sample.sampler_flags(args))
        yield sample.decode(latent, codec)


def baselines(root: str, val_fraction: float, size: int) -> dict:
    """Rows without a model: name -> a function that, like sample_pairs, gives views of a batch of pairs."""
    rows = {"white": lambda batch: [torch.ones_like(batch["cond"])], "condition copied": lambda batch: [batch["cond"]]}
    train = data.split_objects(data.list_objects(root), val_fraction, "train")
    views = [data.list_views(root, train[i]) for i in np.random.default_rng(0).permutation(len(train))[:512]]
    images = [data.load_image(v[i % len(v)][0], size)[0] for i, v in enumerate(views) if v]  # one an object
    mean = torch.stack(images).mean(0) if images else torch.full((3, size, size), torch.nan)
    return rows | {"training images' mean": lambda batch: [mean.expand_as(batch["cond"])]}


def evaluate_row(settings: dict, pairs: list[dict], predict, metrics: dict, args) -> dict:
    """{id: line of eval.jsonl}: the settings, each metric's mean over samples and pairs, its _spread (the standard
    deviation of a pair's samples, averaged over pairs) and its _error (the standard error of the mean over pairs)."""
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder, done = Path(f"{args.out}.pairs"), {}
    for text in (text for path in folder.glob(f"{identity}.*") for text in path.read_text().splitlines()):
        done |= json.loads(text) if text.endswith("}}") else {}  # else a crash tore it
    mine = pairs[args.rank :: args.world]
    todo = [pair for pair in mine if pair["key"] not in done]
    load = partial(load_pairs, size=settings["image_size"])
    loader = torch.utils.data.DataLoader(todo, args.batch_size, collate_fn=load, num_workers=args.workers)
    bar = tqdm(total=len(mine), initial=len(mine) - len(todo), unit="pair", desc=settings["row"], disable=args.rank > 0)
    with bar, open(folder / f"{identity}.{args.rank}", "a") as file:
        for batch in loader:
            target = batch["target"].to(args.device)
            scores = []  # a dictionary a sample
            for view in predict(batch):
                scores.append({key: f(view.to(args.device), target).flatten().tolist() for key, f in metrics.items()})
            for i, pair in enumerate(batch["pairs"]):
                done[pair["key"]] = {key: [score[key][i] for score in scores] for key in metrics}
                file.write("\n" + json.dumps({pair["key"]: done[pair["key"]]}))
            file.flush()
            bar.update(len(target))
    shares = [[done[pair["key"]] for pair in mine]] * args.world
    if args.world > 1:
        dist.all_gather_object(shares, shares[0])
    line = settings | {"id": identity} | {key + end: None for key in METRICS for end in ("", "_spread", "_error")}
    for key in metrics:
        values = torch.tensor([row[key] for share in shares for row in share], dtype=torch.float64)  # (pairs, samples)
        line[key] = values.mean().item()
        line[f"{key}_spread"] = values.std(1).mean().item() if values.shape[1] > 1 else None
        line[f"{key}_error"] = values.mean(1).std().item() / len(values) ** 0.5 if len(values) > 1 else None
    return {identity: line}


def evaluate_checkpoint(path: str, args, metrics: dict, columns: dict) -> dict:
    """{id: line} of a checkpoint's rows and of the baselines' on its pairs; on rank 0 adds to the columns of --grid."""
    model, encoder, codec, meta = pretrained.load_checkpoint(path, args.device, args.encoder_weights, args.vae)
    size, fraction = meta["image_size"], meta["val_fraction"] if args.val_fraction is None else args.val_fraction
    if size < 32 and "lpips" in metrics:
        raise InputError(f"--lpips {args.lpips}: takes 32 pixels, {path} makes {size}; --lpips none leaves it out")
    pairs = fixed_pairs(args.data, fraction, args.split, args.protocol, args.pairs)
    common = {"data": os.path.abspath(args.data), "split": args.split, "val_fraction": fraction, "image_size": size,
              "protocol": args.protocol, "pairs": len(pairs), "mse_range": [-1, 1], "psnr_ssim_range": [0, 1],
              "ssim_window": 11, "lpips_net": args.lpips if "lpips" in metrics else None,
              "torch": torch.__version__}  # fmt: skip
    own = common | sample.sampler_flags(args) | {"samples": args.samples, "seed": args.seed}
    own |= {"checkpoint": path, "weights": str(pretrained.find_weights(path)), "ema": True, "step": meta.get("step"),
            "weights_sha256": pretrained.tensor_hash(model.state_dict()), "seconds": meta.get("seconds"),
            "run_args": meta.get("args")}  # fmt: skip
    predict = partial(sample_pairs, model=model, encoder=encoder, codec=codec, args=args)
    lines = evaluate_row(own | {"row": "samples"}, pairs, predict, metrics, args)
    if args.shuffled:
        lines |= evaluate_row(own | {"row": "poses shuffled"}, shuffled(pairs, args.seed), predict, metrics, args)
    for row, views in baselines(args.data, fraction, size).items():
        lines |= evaluate_row(common | {"row": row}, pairs, views, metrics, args)
    if args.grid and args.rank == 0:
        batch = load_pairs(pairs[:: max(1, len(pairs) // 8)][:8], size)
        columns |= {"condition": batch["cond"], "target": batch["target"]}
        columns[f"sample {len(columns) - 1}" if len(args.ckpt) > 1 else "sample"] = next(predict(batch))
    return lines


def read_lines(path: Path) -> dict[str, dict]:
    """{id: line} of an eval.jsonl that may not be there yet."""
    return {line["id"]: line for line in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def print_table(lines: list[dict]) -> None:
    """The rows, aligned; behind +- the spread over samples, where there are several."""
    rows = [["", "pairs", "PSNR", "SSIM", "LPIPS", "MSE on [-1,1]"]]
    for line in lines:
        rows.append([f"{line['row']} {line.get('checkpoint', '')}", str(line["pairs"])])
        for key in METRICS:
            value, spread = line[key], line[f"{key}_spread"]
            rows[-1].append("-" if value is None else f"{value:.4g}" + (f" +- {spread:.2g}" if spread else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(*("  ".join(map(str.ljust, row, widths)) for row in rows), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=data.HelpFormatter)
    group = parser.add_argument_group("model")
    sample.add_checkpoint_flags(group, nargs="+")
    group = parser.add_argument_group("pairs")
    group.add_argument("--data", required=True, help="renders in Zero-1-to-3's layout")
    group.add_argument("--split", choices=["val", "train", "all"], default="val", help="objects, in list order")
    group.add_argument("--val_fraction", type=float, help="share of objects held out; default: the checkpoint's")
    group.add_argument("--protocol", choices=["pairs", "first"], default="pairs", help="random, or first to all others")
    group.add_argument("--pairs", type=int, help="at most so many; default: one an object, or all of --protocol first")
    group.add_argument("--shuffled", action="store_true", help="also give the model other pairs' camera moves")
    group = parser.add_argument_group("sampler")
    sample.add_sampler_flags(group)
    group.add_argument("--samples", type=int, default=1, help="of each pair")
    group.add_argument("--batch_size", type=int, default=16, help="pairs at a time, a process")
    group.add_argument("--workers", type=int, default=4, help="processes that decode images, a rank")
    group = parser.add_argument_group("output (MSE is of images in [-1,1]: the paper does not state its range)")
    group.add_argument("--lpips", choices=["alex", "vgg", "squeeze", "none"], default="alex", help="LPIPS's network")
    group.add_argument("--lpips_backbone", help="file of that network's torchvision weights; default: a download")
    group.add_argument("--out", default="eval.jsonl", help="file that gets a line a row of the table")
    group.add_argument("--grid", help="picture to write: condition, target, sample; eight pairs across the split")
    args = parser.parse_args()
    data.require_positive(args, "samples", "batch_size", "steps", *(["pairs"] if args.pairs is not None else []))

    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = pick_device(args.device)
    args.precision = args.precision or ("bf16" if args.device.type == "cuda" else "fp32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    out = Path(args.out)
    try:
        read_lines(out)
        Path(f"{out}.pairs").mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"--out {out}: can't be written, or is another program's file ({error})") from None
    box = [open_lpips(args.lpips, args.lpips_backbone) if args.rank == 0 and args.lpips != "none" else None]
    if args.world > 1:
        dist.init_process_group("gloo")  # what ranks exchange are metrics
        dist.broadcast_object_list(box)  # LPIPS is everywhere, or nowhere
    metrics = {"psnr": psnr, "ssim": ssim, "mse": mse} | ({"lpips": box[0].to(args.device)} if box[0] else {})

    lines, columns = {}, {}
    for path in args.ckpt:
        lines |= evaluate_checkpoint(path, args, metrics, columns)
    if args.rank == 0:
        text = "".join(json.dumps(line) + "\n" for line in (read_lines(out) | lines).values())
        write_atomically(out, lambda temporary: temporary.write_text(text))
        print_table([*lines.values()])
        if args.grid:
            rows = [[*row] for row in zip(*columns.values(), strict=True)]
            grid = sample.labelled_grid(rows, [*columns], scale=max(1, 128 // rows[0][0].shape[-1]))
            sample.save_picture(Path(args.grid), grid)
    if args.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_script(main)
