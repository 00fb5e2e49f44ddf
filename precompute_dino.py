"""Archive everything frozen, once: DINOv2's features and the VAE's posterior moments of every view (section 3.4).

Neither encoder takes part in backpropagation, so training need not run them. The paper archives DINOv2's outputs, for
10% of the training time. Deviation: the VAE costs more than the UNet, so its moments are archived too.

    python precompute_dino.py --data data/shapes --archive out/archive --codec pixels --image_size 64 \
        --encoder vit_tiny_patch16_224 --weights random --layers 5 11 --encoder_size 64           # a CPU, in a minute
    python precompute_dino.py --data DIR --archive ARCHIVE --vae sd-v1-5.safetensors --compile    # one GPU
    torchrun --nproc_per_node 8 precompute_dino.py --data DIR --archive ARCHIVE --vae sd-v1-5.safetensors --compile

An archive is ARCHIVE/manifest.json and a shard ARCHIVE/%05d.safetensors for every 256 objects: the views of its objects
along the first axis, as latent_mean, latent_logvar (N,C,h,w) float16, cls (N,D) float16, patch (N,T,K) float16 or
float8_e4m3fn, alpha (N,T) uint8 (the object's cover of each patch), pose (N,3,4) float32, crc32 (N,6) int64 (of
each row); view_offset (objects+1,) int64. A shard appears whole or not at all; rerunning the command goes on.
"""

import argparse
import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import data
import pretrained
from lib.archives import (
    ARCHIVE_FORMAT,
    check_manifest,
    check_space,
    save_manifest,
    save_shard,
    shard_path,
)
from lib.cli import HelpFormatter, InputError, require_positive, run_script
from lib.distributed import from_rank_0, set_up
from lib.files import lock, write_atomically
from pretrained import add_encoder_flags, autocast, encode, open_frozen

# ------------------------------------------------------------------------------------------------------ the writer


class Views(torch.utils.data.Dataset):
    """Decodes batches of views, in workers. Index with (shard, its views, [(object, image path, pose path), ...]).

    Returns {"shard", "views", "object" (V,), "image" (V,3,H,W), "alpha" (V,H,W), "pose" (V,3,4), "bad": messages}.
    """

    def __init__(self, size: int, skip_bad: bool):
        self.size, self.skip_bad = size, skip_bad

    def __getitem__(self, batch: tuple[int, int, list]) -> dict:
        shard, count, views = batch
        rows, bad = [], []
        for index, image_path, pose_path in views:
            try:
                pose = torch.from_numpy(data.read_pose(pose_path)).float()
                rows.append((torch.tensor(index), *data.load_image(image_path, self.size), pose))
            except InputError as error:
                if not self.skip_bad:
                    raise
                bad.append(str(error))
        columns = [torch.stack(column) for column in zip(*rows, strict=True)] or [
            torch.empty(0)
        ] * 4
        rows = dict(zip(("object", "image", "alpha", "pose"), columns, strict=True))
        return rows | {"shard": shard, "views": count, "bad": bad}


def find_views(name: str, args, bad: list[str]) -> list[tuple[Path, Path]]:
    """(image, pose) of an object's views. Where there is none: InputError, or with --skip_bad its message in `bad`."""
    try:
        if views := data.list_views(args.data, name):
            return views
        raise InputError(f"{Path(args.data) / name}: no view has both an image and a pose")
    except InputError as error:
        if not args.skip_bad:
            raise
        bad.append(str(error))
        return []


def load_views(members: dict[int, list[str]], args, bad: list[str]):
    """Yields batches of the views of each shard's objects (shard -> names), in order, none across shards.

    What --skip_bad passes over is named in `bad`.
    """

    def batches():  # runs in this process as workers ask for more: no list of all views is ever made
        for shard, names in members.items():
            views = [
                (index, *view)
                for index, name in enumerate(names)
                for view in find_views(name, args, bad)
            ]
            for first in range(0, len(views), args.batch_size):
                yield shard, len(views), views[first : first + args.batch_size]

    options = {"num_workers": args.workers, "pin_memory": torch.cuda.is_available()}
    dataset = Views(args.image_size, args.skip_bad)
    for batch in torch.utils.data.DataLoader(dataset, None, sampler=batches(), **options):
        bad += batch.pop("bad")
        if len(batch["object"]):
            yield batch


def encode_views(
    batch: dict[str, Tensor], encoder, codec, args, device: torch.device
) -> dict[str, Tensor]:
    """The archive's rows of a batch of views and their "object", in the archive's number formats, on the CPU. What a
    GPU has encoded is still on its way."""
    # only whole batches compiled: once it saw another size, the compiler's code would be for any, and slower
    stance = "default" if len(batch["image"]) == args.batch_size else "force_eager"
    with torch.compiler.set_stance(stance), autocast(device, args.precision):
        rows = encode(batch["image"].to(device, non_blocking=True), encoder, codec)
    forms = {"patch": args.patch_dtype}
    out = {
        k: stored(value, forms.get(k, "fp16")).to("cpu", non_blocking=True)
        for k, value in rows.items()
    }
    alpha = (255 * patch_cover(batch["alpha"], encoder.tokens)).round().to(torch.uint8)
    return out | {"alpha": alpha, "pose": batch["pose"], "object": batch["object"]}


def encode_ahead(batches, encoder, codec, args, device: torch.device):
    """`encode_views` of each batch, arrived. The next is under way by then: a GPU goes on while rows are put away."""
    ahead = None
    for batch in itertools.chain(batches, [None]):
        before, ahead = ahead, None
        if batch:
            rows = encode_views(batch, encoder, codec, args, device)
            ahead = (
                rows,
                torch.cuda.current_stream().record_event() if device.type == "cuda" else None,
            )
        if before:
            rows, event = before
            if event:
                event.synchronize()
            yield rows


def stored(value: Tensor, form: str) -> Tensor:
    """In the number format fp16 or fp8, clamped to its range: a cast to fp8 saturates to NaN otherwise."""
    dtype = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}[form]
    limit = torch.finfo(dtype).max
    return value.float().clamp(-limit, limit).to(dtype)


def patch_cover(alpha: Tensor, tokens: int) -> Tensor:
    """The object's cover of each patch: alpha (V,H,W) in [0,1] -> (V,T)."""
    return F.adaptive_avg_pool2d(alpha[:, None], round(tokens**0.5)).flatten(1)


@torch.compiler.set_stance("force_eager")
def fit_pca(loader, encoder, codec, args, device: torch.device) -> dict[str, Tensor]:
    """PCA of the patch features of foreground tokens: {"mean" (K0,), "components" (K0, K) float32}."""
    count, total, outer = 0, 0, 0
    for batch in tqdm(loader, desc="fitting the PCA", unit="batch"):
        with autocast(device, args.precision):
            patch = encoder(batch["image"].to(device))[1].double()
        tokens = patch[
            patch_cover(batch["alpha"], encoder.tokens).to(device) > 0.5
        ]  # of the foreground, (n, K0)
        count, total, outer = count + len(tokens), total + tokens.sum(0), outer + tokens.T @ tokens
    if count < args.pca:
        raise InputError(
            f"--pca {args.pca}: only {count} foreground tokens in the sampled training objects"
        )
    mean = total / count
    variance, vectors = torch.linalg.eigh(outer / count - mean.outer(mean))  # ascending
    kept = variance[-args.pca :].sum() / variance.sum()
    print(
        f"PCA to {args.pca} of {len(mean)} channels keeps {kept:.1%} of the foreground tokens' variance"
    )
    return {
        "mean": mean.float().cpu(),
        "components": vectors[:, -args.pca :].flip(1).contiguous().float().cpu(),
    }


@torch.compiler.set_stance("force_eager")
def storage_error(image: Tensor, encoder, args, device: torch.device) -> float:
    """Of images' patch features as archived (PCA, fp8): the error's root mean square over that of the features."""
    with autocast(device, args.precision):
        exact = encoder.features(image.to(device))[1]
        found = encoder.project(exact)
    found = stored(found, args.patch_dtype).float()
    if encoder.pca is not None:
        found = found @ encoder.pca.T + encoder.pca_mean
    return ((found - exact).norm() / exact.norm()).item()


FLAGS = (
    "encoder",
    "weights",
    "encoder_size",
    "layers",
    "codec",
    "pixels_factor",
    "image_size",
    "val_fraction",
)
FLAGS += ("patch_dtype", "pca", "precision")


def write_archive(
    members: dict[int, list[str]], encoder, codec, args, device: torch.device, bar
) -> list[str]:
    """Write the shards (shard -> names of its objects); returns messages of what was skipped."""
    bad, written = [], Future()
    written.set_result(None)
    with ThreadPoolExecutor(1) as writer:  # a shard is written while the next one is encoded
        shards = itertools.groupby(
            load_views(members, args, bad), key=lambda batch: (batch["shard"], batch["views"])
        )
        for (shard, views), batches in shards:
            tensors, n = {}, 0  # filled in place: a shard of the paper's size takes 6 GB of memory
            for rows in encode_ahead(batches, encoder, codec, args, device):
                tensors = tensors or {
                    k: row.new_empty(views, *row.shape[1:]) for k, row in rows.items()
                }
                for key, row in rows.items():
                    tensors[key][n : n + len(row)] = row
                n += len(rows["object"])
                bar.update(len(rows["object"]))
            tensors = {key: tensor[:n] for key, tensor in tensors.items()}
            counts = torch.bincount(tensors.pop("object"), minlength=len(members[shard]))
            tensors["view_offset"] = F.pad(counts.cumsum(0), (1, 0))
            written.result()
            written = writer.submit(save_shard, shard_path(args.archive, shard), tensors)
        written.result()
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    group = parser.add_argument_group("data")
    group.add_argument("--data", required=True, help="renders in Zero-1-to-3's layout")
    group.add_argument("--archive", required=True, help="folder to write")
    group.add_argument(
        "--skip_bad",
        action="store_true",
        help="leave out unreadable views and name them at the end",
    )
    group = parser.add_argument_group("what is frozen")
    add_encoder_flags(group)
    group.add_argument(
        "--patch_dtype", choices=["fp16", "fp8"], default="fp16", help="patch features on disk"
    )
    group.add_argument(
        "--pca", type=int, default=0, help="project patch features to this many channels; 0: do not"
    )
    group.add_argument(
        "--pca_objects", type=int, default=512, help="training objects that the PCA is fitted on"
    )
    group = parser.add_argument_group("system")
    group.add_argument("--batch_size", type=int, default=64, help="views a batch")
    group.add_argument(
        "--workers", type=int, default=4, help="processes that decode images, a rank"
    )
    group.add_argument(
        "--precision",
        choices=["bf16", "fp16", "fp32"],
        help="default: bf16 on a GPU (3.4: 16 bits)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--compile", action="store_true", help="torch.compile encoder and codec")
    args = parser.parse_args()
    require_positive(args, "batch_size", "image_size", "encoder_size", "pixels_factor")

    device, rank, world = set_up(
        args
    )  # the ranks only wait: for what rank 0 settles, and at the end
    names = data.list_objects(args.data)
    train = data.split_objects(names, args.val_fraction, "train")
    held = lock(Path(args.archive), "--archive") if rank == 0 else None  # noqa: F841 (closing it would let go)
    manifest = {"format": ARCHIVE_FORMAT, "flags": {flag: vars(args)[flag] for flag in FLAGS}}
    manifest |= {"image_size": args.image_size, "val_fraction": args.val_fraction, "objects": names}
    begun = check_manifest(args, manifest)

    members = {s: names[s * data.SHARD_OBJECTS : (s + 1) * data.SHARD_OBJECTS]
               for s in range(-(-len(names) // data.SHARD_OBJECTS))}  # fmt: skip
    members = {s: shard for s, shard in members.items() if not shard_path(args.archive, s).exists()}
    members = from_rank_0(members, world)  # a network's file system may show nodes different shards

    # rank 0 settles what all share, and what no public file holds: random weights and the PCA
    frozen_file = Path(args.archive) / "frozen.safetensors"
    if not begun and list(Path(args.archive).glob("[0-9]*.safetensors")):
        raise InputError(
            f"--archive {args.archive}: shards without their manifest.json; restore it, or delete them"
        )
    if rank == 0 and not begun:
        frozen_file.unlink(missing_ok=True)  # of an attempt with other flags
    if rank == 0 and not begun and (args.weights == "random" or args.pca):
        encoder, codec = open_frozen(args, device)
        pca = None
        if args.pca:
            if not 0 < args.pca <= encoder.feature_dim:
                raise InputError(
                    f"--pca {args.pca}: the layers have {encoder.feature_dim} channels"
                )
            picked = np.random.default_rng(0).permutation(len(train))[: args.pca_objects]
            pca = fit_pca(
                load_views({0: [train[i] for i in picked]}, args, []), encoder, codec, args, device
            )
        tensors = pretrained.own_tensors(encoder, pca)
        write_atomically(frozen_file, lambda path: save_file(tensors, path))
    if world > 1:
        dist.barrier()
    encoder, codec = open_frozen(
        args, device, pretrained.read_tensors(frozen_file) if frozen_file.exists() else {}
    )
    if rank == 0:
        some = names[:256]
        views = sum(len(find_views(name, args, [])) for name in some) / len(some)
        check_space(args, sum(map(len, members.values())), views, encoder, codec)
        manifest |= {"encoder": encoder.spec(), "codec": pretrained.codec_spec(codec)}
        if not check_manifest(args, manifest):
            save_manifest(args.archive, manifest)
        if members and args.layers and (args.pca or args.patch_dtype == "fp8"):
            for batch in itertools.islice(load_views({0: (train or names)[:8]}, args, []), 1):
                error = storage_error(batch["image"], encoder, args, device)
                print(
                    f"{args.patch_dtype} patch features, PCA {args.pca}: {error:.2%} relative root mean square error"
                )
    if world > 1:
        dist.barrier()

    mine = dict(list(members.items())[rank::world])
    with tqdm(desc=f"archiving, rank {rank}", unit="view", position=rank) as bar:
        bad = write_archive(mine, encoder, codec, args, device, bar)
    if bad:
        print(f"skipped {len(bad)}:", *bad[:20], *(["..."] if len(bad) > 20 else []), sep="\n  ")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        if not (shards := list(Path(args.archive).glob("[0-9]*.safetensors"))):
            raise InputError(f"--data {args.data}: no sound view in it")
        size = sum(file.stat().st_size for file in shards)
        print(f"{args.archive}: {len(names)} objects, {size / 1e9:.3f} GB")


if __name__ == "__main__":
    run_script(main)
