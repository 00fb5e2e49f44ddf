"""Score novel views on fixed pairs of held-out objects, beside baselines (section 4.2).

    # a CPU
    python evaluate.py --ckpt out/demo --data out/demo/data --pairs 32 --steps 20 --lpips none
    # one GPU
    python evaluate.py --ckpt runs/full --data DIR --split val
    # eight GPUs: the first view to the next 16, of 20 objects, three samples each
    torchrun --nproc_per_node 8 evaluate.py --ckpt runs/full runs/zero123 --data DIR \
        --protocol first --objects 20 --views 16 --samples 3

The metrics are PSNR, SSIM, LPIPS and MSE. A row of the table is a model's samples, its samples with
the camera moves shuffled among the pairs (--shuffled), or a baseline that needs no model.

Writes one JSON line per row to OUT. A row with the same settings is replaced. OUT.pairs/ keeps the
values of every pair, so the same command goes on where it was stopped. The settings say which
weights, which files and which flags, and not which code: after a change of the code delete
OUT.pairs/ to score again.

A sample's noise depends only on --seed, the object, the target view and the sample's number. Batch
size and number of processes do not change it.
"""

import functools
import hashlib
import json
import math
import subprocess
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
import pretrained
import sample
from lib.archives import list_id
from lib.checkpoints import tensor_hash
from lib.cli import (
    ArgumentParser,
    InputError,
    default_workers,
    fraction,
    nonnegative_int,
    positive_int,
    progress,
    run_script,
)
from lib.distributed import from_rank_0, gather_objects, join_ranks, open_device
from lib.files import write_jsonl
from lib.formats import may_exist, read_tensors
from lib.images import labelled_grid, load_image, save_picture
from lib.scores import open_table

# ----------------------------------------------------------------------------------------- metrics


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of images (B,3,H,W) in [-1,1] -> (B,).

    The paper does not state the range of its images.
    """
    return (a.double() - b.double()).square().mean(dim=(1, 2, 3))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B,3,H,W) in [-1,1] -> (B,).

    The images are brought to [0,1] first. Equal images have 100 dB.
    """
    return -10 * (mse(a, b) / 4).clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B,3,H,W) in [-1,1] -> (B,).

    The images are brought to [0,1] first. The window is a Gaussian of 11 pixels with sigma 1.5, the
    variances are biased: scikit-image's `structural_similarity` with use_sample_covariance=False.
    """
    a = (a.double() + 1) / 2
    b = (b.double() + 1) / 2
    offsets = torch.arange(11, device=a.device, dtype=a.dtype) - 5
    gaussian = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = gaussian.outer(gaussian) / gaussian.sum() ** 2
    moments = torch.conv2d(
        torch.cat([a, b, a * a, b * b, a * b], dim=1),
        window.expand(15, 1, 11, 11),
        groups=15,
    )
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = moments.chunk(5, dim=1)  # (B,3,H-10,W-10) each
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    covariance = mean_ab - mean_a * mean_b
    variances = mean_aa - mean_a**2 + mean_bb - mean_b**2
    similarity = luminance * (2 * covariance + 9e-4) / (variances + 9e-4)
    return similarity.mean(dim=(1, 2, 3))


def open_lpips(net: str, backbone: str | None = None) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018): images (B,3,H,W) in [-1,1], twice -> (B,1,1,1).

    net: alex, vgg or squeeze. backbone: a file of torchvision's weights of that network; without
    one they are downloaded. Prints the reason and returns None where the download fails. Raises
    InputError where the file is not such a network.
    """
    import lpips  # here: the package is needed for this metric only

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips uses an old argument of torchvision's
            model = lpips.LPIPS(net=net, pnet_rand=backbone is not None, verbose=False)
    except (OSError, RuntimeError) as error:
        print(
            f"no LPIPS: torchvision's {net} network can't be downloaded ({error}); "
            "give --lpips_backbone FILE, as tools.lpips_backbone makes it"
        )
        return None
    if backbone is not None:
        weights = read_tensors(backbone)
        try:
            # torchvision's features.3.weight is slice2.3.weight in lpips.
            renamed = {
                name: weights["features." + name.split(".", 1)[1]]
                for name in model.net.state_dict()
            }
            model.net.load_state_dict(renamed)
        except (KeyError, RuntimeError):
            raise InputError(
                f"--lpips_backbone {backbone}: not torchvision's {net} network"
            ) from None
    return model


def open_metrics(args, device: torch.device, rank: int, world: int) -> dict:
    """{name: a function of two batches of images}. All ranks have LPIPS, or none has it."""
    network = None
    if args.lpips != "none" and rank == 0:
        network = open_lpips(args.lpips, args.lpips_backbone)
    network = from_rank_0(network, world)
    metrics = {"psnr": psnr, "ssim": ssim, "mse": mse}
    if network is not None:
        metrics["lpips"] = network.to(device)
    return metrics


# ------------------------------------------------------------------------------------------- pairs


def fixed_pairs(
    root: str,
    val_fraction: float,
    split: str,
    protocol: str,
    count: int | None = None,
    trained_on: str | None = None,
    held_out: float = 1.0,
    objects: int | None = None,
    views: int | None = None,
) -> list[dict]:
    """Ordered pairs of views of the split's objects, the same at every call.

    protocol "pairs": a random pair of each object, as in training (4.1); several with a higher
    `views` or `count`. "first": the object's first view is the input, the others are targets.
    count: at most so many pairs. objects: at most so many objects. views: so many targets of each
    object. trained_on, held_out: a checkpoint's `list_id` and --val_fraction; a warning says where
    it may have been trained on these objects.

    Returns dicts with "key", "object" and "view" (numbers, for the noise), the paths "cond" and
    "target" of the images and "move", the paths of their poses. Repeated pairs and objects of one
    view are left out. Raises InputError if no pair is left.
    """
    names = data.list_objects(root)
    if split != "all" and trained_on not in (None, list_id(names)):
        print(
            "WARNING: the model was trained on another list of objects: "
            f"--split {split} may mean others, too"
        )
    elif split == "val" and trained_on is not None and val_fraction > held_out:
        print(
            f"WARNING: --val_fraction {val_fraction:g}: the model held out {held_out:g}, and was "
            "trained on the others"
        )
    limits = [number for number in (count, objects) if number is not None]
    views_of = usable_views(
        root, names, data.split_objects(names, val_fraction, split), min(limits, default=len(names))
    )
    if objects is not None and len(views_of) < min(limits):
        print(f"note: --objects {objects}: there are {len(views_of)} in --split {split}")
    if not views_of:
        raise InputError(
            f"{root}: no object with two views in --split {split} at --val_fraction {val_fraction}"
        )
    if protocol == "pairs":
        epochs = views or math.ceil((count or 1) / len(views_of))
        drawn = random_pairs(views_of, epochs)
    else:
        drawn = first_view_pairs(views_of, views)
    pairs = []
    for index, cond_view, target_view in dict.fromkeys(drawn[:count]):  # without repeats
        views_of_object = views_of[index]
        pair = describe_pair(
            names[index], index, views_of_object[cond_view], views_of_object[target_view]
        )
        pairs.append(pair)
    return pairs


def describe_pair(name: str, index: int, cond_view: tuple, target_view: tuple) -> dict:
    """A pair as `fixed_pairs` returns it. The views are paths (image, pose)."""
    cond, cond_pose = cond_view
    target, target_pose = target_view
    return {
        "key": f"{name} {cond.stem} {target.stem}",
        "object": index,
        "view": int(target.stem),
        "cond": cond,
        "target": target,
        "move": (cond_pose, target_pose),
    }


def usable_views(root: str, names: list[str], chosen: list[str], limit: int) -> dict[int, list]:
    """{index in names: `list_views`} of the first `limit` chosen objects with two views or more.

    A listed folder that is not there is named and left out.
    """
    views_of: dict[int, list] = {}
    chosen_names = set(chosen)
    for index, name in enumerate(names):
        if len(views_of) == limit:  # so that no more folders are read than needed
            break
        if name not in chosen_names:
            continue
        try:
            views = data.list_views(root, name)
        except InputError as error:
            print(f"left out: {error}")
            continue
        if len(views) > 1:
            views_of[index] = views
    return views_of


def random_pairs(views_of: dict[int, list], epochs: int) -> list[tuple[int, int, int]]:
    """(object, condition view, target view): a pair of every object, in each epoch."""
    drawn = []
    for epoch in range(epochs):
        for index, views in views_of.items():
            cond_view, target_view = data.draw_pair(0, epoch, index, len(views))
            drawn.append((index, cond_view, target_view))
    return drawn


def first_view_pairs(views_of: dict[int, list], targets: int | None) -> list[tuple[int, int, int]]:
    """(object, 0, target view) for the next `targets` views of every object, or all."""
    drawn = []
    for index, views in views_of.items():
        stop = len(views) if targets is None else min(len(views), 1 + targets)
        for target_view in range(1, stop):
            drawn.append((index, 0, target_view))
    return drawn


def shuffled(pairs: list[dict], seed: int) -> list[dict]:
    """The pairs in a random order, each with the camera move of the pair before it.

    So no pair keeps its own move. Raises InputError where there is only one pair.
    """
    if len(pairs) < 2:
        raise InputError("--shuffled: takes two pairs or more")
    order = np.random.default_rng(seed).permutation(len(pairs))
    moved = []
    for own, other in zip(order, np.roll(order, 1), strict=True):
        moved.append({**pairs[own], "move": pairs[other]["move"]})
    return moved


def load_pairs(pairs: list[dict], size: int) -> dict:
    """{"pairs", "cond" and "target" (B,3,size,size) in [-1,1], "w2c" (B,2,3,4): their cameras}.

    Raises InputError naming a file that can't be read.
    """
    cameras = []
    for pair in pairs:
        cameras.append(np.stack([data.read_pose(path) for path in pair["move"]]))
    return {
        "pairs": pairs,
        "cond": torch.stack([load_image(pair["cond"], size)[0] for pair in pairs]),
        "target": torch.stack([load_image(pair["target"], size)[0] for pair in pairs]),
        "w2c": torch.from_numpy(np.stack(cameras)),
    }


def condition_of(batch: dict, model, encoder, codec) -> dict[str, Tensor]:
    """What the model is conditioned on for a batch of `load_pairs`, on the model's device."""
    device = next(model.parameters()).device
    condition = sample.condition_on(batch["cond"].to(device), encoder, codec)
    cond_w2c, target_w2c = batch["w2c"].unbind(1)
    move = data.relative_pose(cond_w2c, target_w2c, model.pose_encoding)
    condition["pose"] = move.to(device)
    return condition


# ------------------------------------------------------------------- what is scored: batch -> views


def sample_pairs(batch: dict, model, encoder, codec, sampler: dict, seed: int, samples: int):
    """Yields the model's views (B,3,H,W) of a batch of `load_pairs`, `samples` times.

    sampler: keyword arguments of `sample.sample_latents`.
    """
    condition = condition_of(batch, model, encoder, codec)
    for number in range(samples):
        generators = [
            data.seeded(seed, pair["object"], pair["view"], number) for pair in batch["pairs"]
        ]
        latent = sample.sample_latents(model, [condition], generators, **sampler)
        yield sample.decode(latent, codec)


def baselines(mean_image: Tensor | None) -> dict:
    """Rows without a model: {name: a function of a batch that gives views (B,3,H,W), once}."""

    def white(batch: dict) -> list[Tensor]:
        return [torch.ones_like(batch["cond"])]

    def condition(batch: dict) -> list[Tensor]:
        return [batch["cond"]]

    def mean(batch: dict) -> list[Tensor]:
        return [mean_image.expand_as(batch["cond"])]

    rows = {"white": white, "condition copied": condition}
    if mean_image is not None:
        rows["training images' mean"] = mean
    return rows


def training_mean(root: str, val_fraction: float, size: int) -> Tensor | None:
    """The mean (3,size,size) of 512 views of training objects; None where there are none."""
    try:
        pairs = fixed_pairs(root, val_fraction, "train", "pairs", 512)
        return load_pairs(pairs, size)["target"].mean(dim=0)
    except InputError as error:
        print(f"no row of the training images' mean: {error}")
        return None


# -------------------------------------------------------------------------------------------- rows


def file_hash(pairs: list[dict]) -> str:
    """A hash of the sizes and times of the pairs' files: new renders are scored again.

    Raises InputError naming a file that is not there.
    """
    stats = []
    for pair in pairs:
        for path in (pair["cond"], pair["target"], *pair["move"]):
            try:
                stat = path.stat()
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}") from None
            stats.append((stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:12]


def git_commit() -> str | None:
    """The commit of this code, and "-dirty" where files differ; None where git can't tell."""
    root = Path(__file__).parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def shared_settings(args, val_fraction: float, size: int, pairs: list[dict], metrics: dict) -> dict:
    """The settings that every row has: which pairs, and which metrics."""
    has_lpips = "lpips" in metrics
    return {
        "data": str(Path(args.data).absolute()),
        "split": args.split,
        "val_fraction": val_fraction,
        "files": file_hash(pairs),
        "protocol": args.protocol,
        "objects": len({pair["object"] for pair in pairs}),
        "pairs": len(pairs),
        "image_size": size,
        "torch": torch.__version__,
        "metrics": sorted(metrics),
        "lpips_net": args.lpips if has_lpips else None,
        "lpips_sha256": tensor_hash(metrics["lpips"].state_dict()) if has_lpips else None,
        "mse_range": [-1, 1],
        "ssim_window": 11,
    }


def model_settings(path: str, args, sampler: dict, model, meta: dict) -> dict:
    """The further settings of a model's rows: which weights, and how they are sampled."""
    return {
        **sampler,
        "seed": args.seed,
        "samples": args.samples,
        "ema": True,
        "checkpoint": path,
        "step": meta.get("step"),
        "seconds": meta.get("seconds"),
        "run_args": writable(meta.get("args")),
        "pose_encoding": model.pose_encoding,
        "weights_sha256": tensor_hash(model.state_dict()),
        "encoder_sha256": meta["encoder"]["sha256"],
        "codec_sha256": meta["codec"]["sha256"],
    }


def writable(flags: dict | None) -> dict | None:
    """A run's flags for JSON, which has no infinity (--clip inf)."""
    if flags is None:
        return None
    return {flag: str(value) if value == math.inf else value for flag, value in flags.items()}


def read_pair_scores(folder: Path, identity: str) -> dict[str, dict]:
    """{pair's key: {metric: [a value per sample]}} that earlier runs, of any rank, have written."""
    scores: dict[str, dict] = {}
    for path in folder.glob(f"{identity}.*"):
        for text in path.read_text(encoding="utf-8").splitlines():
            if text.endswith("}}"):  # else a crash tore the line
                scores.update(json.loads(text))
    return scores


@torch.no_grad()
def score_batch(batch: dict, predict, metrics: dict, device: torch.device) -> dict[str, dict]:
    """{pair's key: {metric: [a value per sample]}} of a batch of `load_pairs`."""
    target = batch["target"].to(device)
    scores: dict[str, dict] = {}
    for pair in batch["pairs"]:
        scores[pair["key"]] = {metric: [] for metric in metrics}
    for views in predict(batch):  # one sample of each pair: (B,3,H,W)
        for metric, function in metrics.items():
            values = function(views.to(device), target).flatten().tolist()
            for pair, value in zip(batch["pairs"], values, strict=True):
                scores[pair["key"]][metric].append(value)
    return scores


def check_finite(settings: dict, scores: dict[str, dict]) -> None:
    """Raises InputError naming row, metric and pair where a value is infinite or not a number."""
    row = f'row "{settings["row"]}"'
    if "checkpoint" in settings:
        row += f" of {settings['checkpoint']}"
    for key, values in scores.items():
        for metric in values:
            if not all(map(math.isfinite, values[metric])):
                raise InputError(
                    f'{row}: the {metric} of pair "{key}" is not a finite number; '
                    "try --precision fp32, or look at the weights"
                )


def evaluate_row(
    settings: dict,
    pairs: list[dict],
    predict,
    metrics: dict,
    args,
    device: torch.device,
    rank: int,
    world: int,
) -> dict:
    """The row's line of OUT (`summary`). Each rank scores a share of the pairs.

    predict: a function of a batch of `load_pairs` that gives views (B,3,H,W), once per sample.
    Pairs whose values are in OUT.pairs/ are not scored again.
    """
    text = json.dumps(settings, sort_keys=True)
    identity = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = Path(f"{args.out}.pairs")
    scores = read_pair_scores(folder, identity)
    mine = pairs[rank::world]
    loader = torch.utils.data.DataLoader(
        [pair for pair in mine if pair["key"] not in scores],
        args.batch_size,
        collate_fn=functools.partial(load_pairs, size=settings["image_size"]),
        num_workers=args.workers,
    )
    with open(folder / f"{identity}.{rank}", "a", encoding="utf-8") as file:
        for batch in progress(loader, desc=settings["row"], unit="batch", disable=rank > 0):
            batch_scores = score_batch(batch, predict, metrics, device)
            check_finite(settings, batch_scores)
            for key, values in batch_scores.items():
                # The line break in front ends a line that a crash may have torn.
                file.write("\n" + json.dumps({key: values}) + "\n")
                file.flush()
            scores.update(batch_scores)
    for share in gather_objects({pair["key"]: scores[pair["key"]] for pair in mine}, world):
        scores.update(share)
    return summary(settings, identity, [scores[pair["key"]] for pair in pairs], metrics)


def summary(settings: dict, identity: str, scores: list[dict], metrics: dict) -> dict:
    """A row's line: its settings and, for each metric, mean and spread.

    scores: {metric: [a value per sample]} of each pair. The mean is over samples and pairs. The
    spread is the standard deviation of a pair's samples, averaged over pairs.
    """
    line = {
        **settings,
        "id": identity,
        "commit": git_commit(),
        "lpips": None,
        "lpips_spread": None,
    }
    for metric in metrics:
        values = torch.tensor([pair[metric] for pair in scores], dtype=torch.float64)
        pair_count, sample_count = values.shape
        line[metric] = values.mean().item()
        line[f"{metric}_spread"] = values.std(dim=1).mean().item() if sample_count > 1 else None
    return line


# ------------------------------------------------------------------------------------- checkpoints


def check_checkpoints(args) -> None:
    """Raises InputError where a --ckpt is missing or makes images too small for the metrics.

    It reads no weights, so the error comes before downloads and hours of sampling.
    """
    smallest = 11 if args.lpips == "none" else 32
    for path in args.ckpt:
        if not may_exist(path):
            raise InputError(f"--ckpt {path}: no such file or run")
        size = pretrained.image_size(path)
        if size < smallest:
            raise InputError(
                f"--ckpt {path}: makes {size} pixels; LPIPS takes 32 "
                "(--lpips none leaves it out), SSIM 11"
            )


def choose_pairs(path: str, args, meta: dict, val_fraction: float) -> list[dict]:
    """The pairs that a checkpoint is scored on, with a warning where it may have seen them."""
    foreign = "args" not in meta  # a Zero-1-to-3 checkpoint, which does not say what it saw
    if foreign and args.split == "val" and not Path(args.data, "valid_paths.json").exists():
        print(
            f"WARNING: {args.data} has no valid_paths.json, so --split val is not Zero-1-to-3's: "
            f"--ckpt {path} may have been trained on these objects"
        )
    return fixed_pairs(
        args.data,
        val_fraction,
        args.split,
        args.protocol,
        count=args.pairs,
        trained_on=meta.get("objects"),
        held_out=meta["val_fraction"],
        objects=args.objects,
        views=args.views,
    )


def evaluate_checkpoint(
    path: str,
    args,
    metrics: dict,
    device: torch.device,
    precision: str,
    rank: int,
    world: int,
) -> list[dict]:
    """The lines of a checkpoint's rows and of the baselines on its pairs. Rank 0 writes them."""
    model, encoder, codec, meta = pretrained.load_checkpoint(
        path, device, args.encoder_weights, args.vae, args.pose
    )
    size = meta["image_size"]
    val_fraction = meta["val_fraction"] if args.val_fraction is None else args.val_fraction
    pairs = None
    mean_image = None
    if rank == 0:
        pairs = choose_pairs(path, args, meta, val_fraction)
        mean_image = training_mean(args.data, val_fraction, size)
    pairs = from_rank_0(pairs, world)
    mean_image = from_rank_0(mean_image, world)

    sampler = sample.sampler_settings(args, precision)
    predict = functools.partial(
        sample_pairs,
        model=model,
        encoder=encoder,
        codec=codec,
        sampler=sampler,
        seed=args.seed,
        samples=args.samples,
    )
    shared = shared_settings(args, val_fraction, size, pairs, metrics)
    own = {**shared, **model_settings(path, args, sampler, model, meta)}
    rows = [({**own, "row": "samples"}, pairs, predict)]
    if args.shuffled:
        rows.append(({**own, "row": "poses shuffled"}, shuffled(pairs, args.seed), predict))
    for row, baseline in baselines(mean_image).items():
        rows.append(({**shared, "row": row}, pairs, baseline))

    lines = []
    for settings, row_pairs, row_predict in rows:
        line = evaluate_row(settings, row_pairs, row_predict, metrics, args, device, rank, world)
        lines.append(line)
    if rank == 0:
        write_lines(Path(args.out), lines)
        if args.grid:
            draw_grid(Path(args.grid), pairs, predict, size)
    return lines


def write_lines(out: Path, lines: list[dict]) -> None:
    """Add the lines to OUT, in place of those with the same settings."""
    table = open_table(out)
    for line in lines:
        table[line["id"]] = line
    write_jsonl(out, table.values())


def draw_grid(path: Path, pairs: list[dict], predict, size: int) -> None:
    """Write a picture of eight pairs: condition, target, sample."""
    spacing = max(1, len(pairs) // 8)
    batch = load_pairs(pairs[::spacing][:8], size)
    views = next(predict(batch))
    rows = list(zip(batch["cond"], batch["target"], views, strict=True))
    labels = ["condition", "target", "sample"]
    save_picture(path, labelled_grid(rows, labels))


def print_table(lines: list[dict]) -> None:
    print(f"{'PSNR':>33} {'SSIM':>8} {'LPIPS':>8} {'MSE':>8}  pairs")
    for line in lines:
        cells = []
        for metric in ("psnr", "ssim", "lpips", "mse"):
            cells.append("       -" if line[metric] is None else f"{line[metric]:8.4g}")
        checkpoint = line.get("checkpoint", "")
        print(f"{line['row']:24} {' '.join(cells)} {line['pairs']:6}  {checkpoint}")


def parse_args():
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("model")
    sample.add_checkpoint_flags(group, nargs="+")

    group = parser.add_argument_group("pairs")
    add = group.add_argument
    add("--data", required=True, help="renders in Zero-1-to-3's layout")
    add("--split", choices=["val", "train", "all"], default="val", help="which objects to score")
    add(
        "--val_fraction",
        type=fraction,
        help="share of objects held out; default: the checkpoint's",
    )
    add(
        "--protocol",
        choices=["pairs", "first"],
        default="pairs",
        help="random pairs of views, or an object's first view to its others",
    )
    add("--pairs", type=positive_int, help="at most so many; default: as many as --views gives")
    add("--objects", type=positive_int, help="at most so many, in the split's order; default: all")
    add(
        "--views",
        type=positive_int,
        help="targets per object; default: 1 random pair, or all views after the first",
    )
    add("--shuffled", action="store_true", help="also give the model other pairs' camera moves")

    group = parser.add_argument_group("sampler (the paper names none of its settings)")
    sample.add_sampler_flags(group)
    add = group.add_argument
    add("--samples", type=positive_int, default=1, help="samples per pair")
    add("--batch_size", type=positive_int, default=16, help="pairs at a time, per process")
    add(
        "--workers",
        type=nonnegative_int,
        default=default_workers(),
        help="processes that decode images, per rank; at most 4 by default, and no more than cores",
    )

    group = parser.add_argument_group(
        "output (the paper names neither LPIPS's network nor MSE's range, [-1,1] here)"
    )
    add = group.add_argument
    add(
        "--lpips",
        choices=["alex", "vgg", "squeeze", "none"],
        default="alex",
        help="LPIPS's network",
    )
    add("--lpips_backbone", help="file of that network's torchvision weights; default: a download")
    add("--out", default="eval.jsonl", help="file that gets a line per row of the table")
    add(
        "--grid", help="picture to write, eight pairs of the last --ckpt: condition, target, sample"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device, precision = open_device(args.device, args.precision)
    rank, world = join_ranks()
    open_table(Path(args.out))  # to fail now and not after sampling, where it can't be written
    check_checkpoints(args)
    if rank == 0:
        data.warn_of_odd_poses(args.data, data.list_objects(args.data))
    metrics = open_metrics(args, device, rank, world)
    lines: dict[str, dict] = {}  # by "id": checkpoints share baselines
    for path in args.ckpt:
        checkpoint_lines = evaluate_checkpoint(path, args, metrics, device, precision, rank, world)
        lines.update({line["id"]: line for line in checkpoint_lines})
    if rank == 0:
        print_table(list(lines.values()))


if __name__ == "__main__":
    run_script(main)
