"""Score novel views on fixed pairs of held-out objects, beside baselines: MSE, PSNR, SSIM, LPIPS (section 4).

    python evaluate.py --ckpt out/demo --data out/demo/data --pairs 32 --steps 20 --lpips none --shuffled  # a CPU
    python evaluate.py --ckpt runs/full --data DIR --split val                                              # one GPU
    torchrun --nproc_per_node 8 evaluate.py --ckpt runs/full runs/baseline --data DIR --protocol first --samples 3

A sample's noise depends on (--seed, object, target view, sample number) alone, not on batch or world size. OUT gets a
line a row, in place of one of the same settings; OUT.pairs/ every pair's values, from which the same command goes on.
"""

import argparse
import functools
import hashlib
import itertools
import json
from pathlib import Path

import lpips
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import pretrained
import sample
from lib import images as pictures
from lib.archives import list_id
from lib.checkpoints import tensor_hash
from lib.cli import HelpFormatter, InputError, require_positive, run_script
from lib.distributed import from_rank_0, set_up
from lib.files import write_jsonl
from lib.images import load_image, open_image
from lib.scores import open_table


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
    moments = torch.conv2d(torch.cat([a, b, a * a, b * b, a * b], dim=1), window, groups=15)
    ma, mb, aa, bb, ab = moments.chunk(5, dim=1)  # (B,3,H-10,W-10) each
    luminance = (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
    return (luminance * (2 * (ab - ma * mb) + 9e-4) / (aa - ma**2 + bb - mb**2 + 9e-4)).mean(
        dim=(1, 2, 3)
    )


def open_lpips(net: str, backbone: str | None = None) -> lpips.LPIPS | None:
    """LPIPS (Zhang et al. 2018) of images (B,3,H,W) in [-1,1] -> (B,1,1,1), its network's weights torchvision's, from a
    file or downloaded; where that fails, None, and the reason printed. Raises InputError for a wrong file."""
    try:
        model = lpips.LPIPS(net=net, pnet_rand=bool(backbone), verbose=False)
    except (OSError, RuntimeError) as error:
        return print(
            f"no LPIPS: torchvision's {net} network can't be downloaded ({error}); give --lpips_backbone FILE"
        )
    if backbone:
        weights = pretrained.read_tensors(backbone)
        try:  # torchvision's features.3.weight is slice2.3.weight in lpips
            model.net.load_state_dict(
                {k: weights[f"features.{k.split('.', 1)[1]}"] for k in model.net.state_dict()}
            )
        except (KeyError, RuntimeError):
            raise InputError(
                f"--lpips_backbone {backbone}: not torchvision's {net} network"
            ) from None
    return model


def fixed_pairs(
    root: str,
    val_fraction: float,
    split: str,
    protocol: str,
    count: int | None = None,
    trained_on: str | None = None,
) -> list[dict]:
    """Ordered pairs of views of the split's objects, always the same: key, object, view, and the paths to load.
    "pairs": as in training, one an object, and for a higher `count` of more epochs; "first": an object's first view is
    the input, all others are targets. Repeats and objects of one view are left out. Raises InputError if none stay.
    Where `trained_on`, a checkpoint's `list_id`, is of another list, whose split is another, it says so."""
    names = data.list_objects(root)
    if split != "all" and trained_on not in (None, list_id(names)):
        print(
            f"WARNING: the model was trained on another list of objects: --split {split} may mean others, too"
        )
    chosen = {*data.split_objects(names, val_fraction, split)}

    def views_of(name: str) -> list:
        try:
            return data.list_views(root, name)
        except InputError as error:  # a folder that is listed and not there
            return print(f"left out: {error}") or []

    usable = (
        (i, v) for i, name in enumerate(names) if name in chosen and len(v := views_of(name)) > 1
    )
    views = dict(itertools.islice(usable, count))  # no more folders are read than it takes
    if not views:
        raise InputError(
            f"{root}: no object with two views in --split {split} at --val_fraction {val_fraction}"
        )
    drawn = [(i, 0, j) for i, v in views.items() for j in range(1, len(v))]
    if protocol == "pairs":
        epochs = range(-(-(count or 1) // len(views)))
        drawn = [
            (i, *data.draw_pair(0, epoch, i, len(v))) for epoch in epochs for i, v in views.items()
        ]
    pairs = []
    for i, c, t in dict.fromkeys(drawn[:count]):
        (cond, cond_pose), (target, target_pose) = views[i][c], views[i][t]
        pair = {
            "key": f"{names[i]} {cond.stem} {target.stem}",
            "object": i,
            "view": int(target.stem),
        }
        pairs.append(pair | {"cond": cond, "target": target, "move": (cond_pose, target_pose)})
    return pairs


def shuffled(pairs: list[dict], seed: int) -> list[dict]:
    """The pairs, each with another's camera move: a derangement, as the moves go once round a cycle through all."""
    if len(pairs) < 2:
        raise InputError("--shuffled: takes two pairs or more")
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [
        pairs[i] | {"move": pairs[j]["move"]} for i, j in zip(order, np.roll(order, 1), strict=True)
    ]


def files_of(pair: dict) -> tuple[Path, ...]:
    return pair["cond"], pair["target"], *pair["move"]


@functools.cache  # pairs, and checkpoints, share files
def readable(path: Path) -> bool:
    """Whether an image or a pose can be read; else the reason is printed."""
    try:
        data.read_pose(path) if path.suffix == ".npy" else open_image(path)
        return True
    except InputError as error:
        print(f"left out: {error}")
        return False


def load_pairs(pairs: list[dict], size: int) -> dict:
    """{"pairs", "cond" and "target" (B,3,size,size), "pose" (B,4)}."""
    images = {
        key: torch.stack([load_image(pair[key], size)[0] for pair in pairs])
        for key in ("cond", "target")
    }
    moves = [[torch.from_numpy(data.read_pose(path)) for path in pair["move"]] for pair in pairs]
    return images | {
        "pairs": pairs,
        "pose": torch.stack([data.relative_pose(*move) for move in moves]),
    }


def sample_pairs(batch: dict, model, encoder, codec, args):
    """Yields the model's views (B,3,H,W) of a batch of pairs, --samples times; conditions are encoded once."""
    condition = sample.condition_on(batch["cond"].to(args.device), encoder, codec)
    condition["pose"] = batch["pose"].to(args.device)
    for k in range(args.samples):
        noise = [data.seeded(args.seed, pair["object"], pair["view"], k) for pair in batch["pairs"]]
        latent = sample.ddim(model, [condition], noise, **sample.sampler_flags(args))
        yield sample.decode(latent, codec)


def baselines(root: str, val_fraction: float, size: int) -> dict:
    """Rows without a model: name -> a function of the conditions (B,3,size,size) that gives views."""
    rows = {"white": torch.ones_like, "condition copied": torch.clone}
    try:
        mean = load_pairs(fixed_pairs(root, val_fraction, "train", "pairs", 512), size)[
            "target"
        ].mean(0)
        rows["training images' mean"] = mean.expand_as
    except InputError as error:
        print(f"no row of the training images' mean: {error}")
    return rows


def evaluate_row(settings: dict, pairs: list[dict], predict, metrics: dict, args) -> dict:
    """{id: line of eval.jsonl}: the settings, each metric's mean over samples and pairs, and its _spread: the standard
    deviation of a pair's samples, averaged over pairs."""
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder, done = Path(f"{args.out}.pairs"), {}
    for text in (
        text for path in folder.glob(f"{identity}.*") for text in path.read_text().splitlines()
    ):
        done |= json.loads(text) if text.endswith("}}") else {}  # else a crash tore it
    mine = pairs[args.rank :: args.world]
    todo = [pair for pair in mine if pair["key"] not in done]
    load = functools.partial(load_pairs, size=settings["image_size"])
    loader = torch.utils.data.DataLoader(
        todo, args.batch_size, collate_fn=load, num_workers=args.workers
    )
    with open(folder / f"{identity}.{args.rank}", "a") as file:
        for batch in tqdm(loader, desc=settings["row"], unit="batch", disable=args.rank > 0):
            target, *views = (
                image.to(args.device) for image in (batch["target"], *predict(batch))
            )  # a view a sample
            scores = {
                key: [f(view, target).flatten().tolist() for view in views]
                for key, f in metrics.items()
            }
            for i, pair in enumerate(batch["pairs"]):
                done[pair["key"]] = {key: [each[i] for each in scores[key]] for key in metrics}
                print("\n" + json.dumps({pair["key"]: done[pair["key"]]}), file=file, flush=True)
    shares = [[done[pair["key"]] for pair in mine]] * args.world
    if args.world > 1:
        dist.all_gather_object(shares, shares[0])
    line = settings | {"id": identity, "lpips": None, "lpips_spread": None}
    for key in metrics:
        values = torch.tensor(
            [row[key] for share in shares for row in share], dtype=torch.float64
        )  # (pairs, samples)
        spread = values.std(1).mean().item() if values.shape[1] > 1 else None
        line |= {key: values.mean().item(), f"{key}_spread": spread}
    return {identity: line}


def evaluate_checkpoint(path: str, args, metrics: dict) -> dict:
    """{id: line} of a checkpoint's rows and of the baselines' on its pairs; rank 0 writes --out and draws --grid."""
    model, encoder, codec, meta = pretrained.load_checkpoint(
        path, args.device, args.encoder_weights, args.vae
    )
    size, fraction = (
        meta["image_size"],
        meta["val_fraction"] if args.val_fraction is None else args.val_fraction,
    )
    if size < (32 if "lpips" in metrics else 11):
        raise InputError(
            f"--ckpt {path}: makes {size} pixels; LPIPS takes 32 (--lpips none leaves it out), SSIM 11"
        )
    trained_on = meta.get("objects") if args.rank == 0 else None
    pairs = fixed_pairs(args.data, fraction, args.split, args.protocol, args.pairs, trained_on)
    if args.skip_bad:
        sound = [pair for pair in pairs if args.rank == 0 and all(map(readable, files_of(pair)))]
        if not (pairs := from_rank_0(sound, args.world)):
            raise InputError(f"--data {args.data}: no pair of --split {args.split} can be read")
    files = [path.stat() for pair in pairs for path in files_of(pair)]
    digest = hashlib.sha256(
        json.dumps([(file.st_size, file.st_mtime_ns) for file in files]).encode()
    )
    common = {
        "data": str(Path(args.data).absolute()),
        "split": args.split,
        "val_fraction": fraction,
    }
    common["files"] = digest.hexdigest()[
        :12
    ]  # what is rendered anew is scored anew, and with other code
    scripts = ("data", "evaluate", "model", "pretrained", "sample", "lib/images", "lib/autoencoder")
    code = b"".join(Path(Path(__file__).parent, f"{script}.py").read_bytes() for script in scripts)
    common["code"] = hashlib.sha256(code).hexdigest()[:12]
    common |= {
        "protocol": args.protocol,
        "pairs": len(pairs),
        "image_size": size,
        "torch": torch.__version__,
    }
    common |= {
        "lpips_net": args.lpips if "lpips" in metrics else None,
        "mse_range": [-1, 1],
        "ssim_window": 11,
    }
    common["lpips_sha256"] = (
        tensor_hash(metrics["lpips"].state_dict()) if "lpips" in metrics else None
    )
    own = (
        common
        | sample.sampler_flags(args)
        | {"seed": args.seed, "samples": args.samples, "ema": True}
    )
    own |= {
        "checkpoint": path,
        "step": meta.get("step"),
        "seconds": meta.get("seconds"),
        "run_args": meta.get("args"),
    }
    own |= {"weights_sha256": tensor_hash(model.state_dict())}
    own |= {f"{part}_sha256": meta[part]["sha256"] for part in ("encoder", "codec")}
    rows = baselines(args.data, fraction, size)  # here, lest an error come after hours of sampling
    others = shuffled(pairs, args.seed) if args.shuffled else None
    predict = functools.partial(sample_pairs, model=model, encoder=encoder, codec=codec, args=args)
    lines = evaluate_row(own | {"row": "samples"}, pairs, predict, metrics, args)
    if args.shuffled:
        lines |= evaluate_row(own | {"row": "poses shuffled"}, others, predict, metrics, args)
    for row, view in rows.items():
        lines |= evaluate_row(
            common | {"row": row}, pairs, lambda batch, f=view: [f(batch["cond"])], metrics, args
        )
    if args.rank == 0:
        write_jsonl(Path(args.out), (open_table(Path(args.out)) | lines).values())
    if args.grid and args.rank == 0:
        batch = load_pairs(pairs[:: max(1, len(pairs) // 8)][:8], size)
        images = [*zip(batch["cond"], batch["target"], next(predict(batch)), strict=True)]
        grid = pictures.labelled_grid(
            images, ["condition", "target", "sample"], scale=max(1, 128 // size)
        )
        pictures.save_picture(Path(args.grid), grid)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    group = parser.add_argument_group("model")
    sample.add_checkpoint_flags(group, nargs="+")
    group = parser.add_argument_group("pairs")
    group.add_argument("--data", required=True, help="renders in Zero-1-to-3's layout")
    group.add_argument(
        "--split", choices=["val", "train", "all"], default="val", help="which objects to score"
    )
    group.add_argument(
        "--val_fraction", type=float, help="share of objects held out; default: the checkpoint's"
    )
    group.add_argument(
        "--protocol",
        choices=["pairs", "first"],
        default="pairs",
        help="random, or view 0 to the rest",
    )
    group.add_argument(
        "--pairs",
        type=int,
        help="at most so many; default: one an object, or all of --protocol first",
    )
    group.add_argument(
        "--skip_bad", action="store_true", help="leave out pairs that can't be read, and name them"
    )
    group.add_argument(
        "--shuffled", action="store_true", help="also give the model other pairs' camera moves"
    )
    group = parser.add_argument_group("sampler (the paper names none of its settings)")
    sample.add_sampler_flags(group)
    group.add_argument("--samples", type=int, default=1, help="samples a pair")
    group.add_argument("--batch_size", type=int, default=16, help="pairs at a time, a process")
    group.add_argument(
        "--workers", type=int, default=4, help="processes that decode images, a rank"
    )
    group = parser.add_argument_group(
        "output (the paper names neither LPIPS's network nor MSE's range, [-1,1] here)"
    )
    group.add_argument(
        "--lpips",
        choices=["alex", "vgg", "squeeze", "none"],
        default="alex",
        help="LPIPS's network",
    )
    group.add_argument(
        "--lpips_backbone", help="file of that network's torchvision weights; default: a download"
    )
    group.add_argument(
        "--out", default="eval.jsonl", help="file that gets a line a row of the table"
    )
    group.add_argument(
        "--grid",
        help="picture to write: condition, target, sample of eight pairs; of the last --ckpt",
    )
    args = parser.parse_args()
    sample.check_sampler_flags(args)
    require_positive(args, "samples", *(["pairs"] if args.pairs is not None else []))
    args.device, args.rank, args.world = set_up(args)
    lines: dict[str, dict] = {}
    open_table(Path(args.out))
    network = (
        open_lpips(args.lpips, args.lpips_backbone)
        if args.rank == 0 and args.lpips != "none"
        else None
    )
    network = from_rank_0(network, args.world)  # everywhere, or nowhere
    metrics = {"psnr": psnr, "ssim": ssim, "mse": mse} | (
        {"lpips": network.to(args.device)} if network else {}
    )
    for path in args.ckpt:
        lines |= evaluate_checkpoint(path, args, metrics)
    if args.rank == 0:
        print(f"{'PSNR':>33} {'SSIM':>8} {'LPIPS':>8} {'MSE':>8}  pairs")
        for line in lines.values():
            scores = (line[key] for key in ("psnr", "ssim", "lpips", "mse"))
            cells = " ".join("       -" if score is None else f"{score:8.4g}" for score in scores)
            print(f"{line['row']:24} {cells} {line['pairs']:6}  {line.get('checkpoint', '')}")


if __name__ == "__main__":
    run_script(main)
