"""Archives what the frozen networks make of every view, so that training need not run them (3.4).

The image encoder and the VAE take no part in backpropagation. The paper archives DINOv2's outputs
and saves 10% of the training time. Deviation: the VAE costs more than the UNet, so its posterior
moments are archived, too.

    python precompute_dino.py --data data/shapes --archive out/archive --codec pixels \
        --image_size 64 --encoder vit_tiny_patch16_224 --weights random --layers 5 11 \
        --encoder_size 64                                                  # a CPU, in a minute
    python precompute_dino.py --data DIR --archive ARCHIVE --vae sd-v1-5.safetensors \
        --compile                                                          # one GPU
    torchrun --nproc_per_node 8 precompute_dino.py --data DIR --archive ARCHIVE \
        --vae sd-v1-5.safetensors --compile

An archive is ARCHIVE/manifest.json and one shard, ARCHIVE/%05d.safetensors, for every 256 objects.
A shard holds the N views of its objects, one after the other:

    latent_mean, latent_logvar  (N,C,h,w)   float16                    the VAE's posterior moments
    cls                         (N,D)       float16                    the encoder's [CLS]
    patch                       (N,T,K)     float16 or float8_e4m3fn   its patch features
    alpha                       (N,T)       uint8     how much of each patch the object covers
    pose                        (N,3,4)     float32   world-to-camera
    view                        (N,)        int64     the number in the file's name
    crc32                       (N,7)       int64     checksums of the rows above
    view_offset                 (objects+1,)  int64   each object's first row, and the end

A shard appears whole or not at all. The same command again writes the shards that are missing.
"""

import argparse
import bisect
import itertools
import math
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

import data
from lib.archives import (
    ARCHIVE_FORMAT,
    open_shard,
    read_manifest,
    save_manifest,
    save_shard,
    shard_path,
)
from lib.cli import (
    ArgumentParser,
    InputError,
    default_workers,
    nonnegative_int,
    positive_int,
    progress,
    run_script,
)
from lib.distributed import (
    join_ranks,
    leave_ranks,
    on_rank_0,
    open_device,
    wait_for_all,
    without_compiler,
)
from lib.files import lock, save_tensors, write_atomically
from lib.formats import read_tensors
from lib.images import load_image
from pretrained import add_encoder_flags, autocast, codec_spec, encode, open_frozen, own_tensors

# What the manifest records, because a second run with other values would not fit the first.
RECORDED_FLAGS = (
    "encoder",
    "weights",
    "encoder_size",
    "layers",
    "codec",
    "pixels_factor",
    "image_size",
    "val_fraction",
    "patch_dtype",
    "pca",
    "precision",
)
DTYPES = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
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
        "--pca",
        type=nonnegative_int,
        default=0,
        help="project patch features to this many channels; 0: do not",
    )
    group.add_argument(
        "--pca_objects",
        type=positive_int,
        default=512,
        help="training objects that the PCA is fitted on",
    )
    group = parser.add_argument_group("system")
    group.add_argument("--batch_size", type=positive_int, default=64, help="views a batch")
    group.add_argument(
        "--workers",
        type=nonnegative_int,
        default=default_workers(),
        help="processes that decode images, a rank; at most 4 by default, and no more than cores",
    )
    group.add_argument(
        "--precision",
        choices=["bf16", "fp16", "fp32"],
        help="default: bf16 on a GPU (3.4: 16 bits), fp32 on a CPU",
    )
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--compile", action="store_true", help="torch.compile encoder and codec")
    return parser.parse_args()


# ------------------------------------------------------------------------------------ reading views


def find_views(root: str, name: str) -> list[tuple[Path, Path]]:
    """(image, pose) of an object's views. Raises InputError where there is none."""
    views = data.list_views(root, name)
    if not views:
        raise InputError(f"{Path(root, name)}: no view has both an image and a pose")
    return views


class Views(Dataset):
    """Decodes batches of views. Index: (shard, views in the shard, [(object, image, pose), ...]).

    object: the object's place in its shard; image, pose: paths. The V views of a batch give
        shard, shard_views   the first two of the index
        object, view         (V,) int64, view: the number in the file's name
        image, alpha, pose   (V,3,H,W) in [-1,1], (V,H,W) in [0,1], (V,3,4), float32
        skipped              messages on the views that skip_bad left out
    Where no view is left, only the first line and the last.
    """

    def __init__(self, size: int, skip_bad: bool):
        self.size = size
        self.skip_bad = skip_bad

    def __getitem__(self, batch: tuple[int, int, list]) -> dict:
        shard, shard_views, views = batch
        rows, skipped = [], []
        for view in views:
            try:
                rows.append(self.decode(*view))
            except InputError as error:
                if not self.skip_bad:
                    raise
                skipped.append(str(error))
        columns = default_collate(rows) if rows else {}
        return {"shard": shard, "shard_views": shard_views, "skipped": skipped, **columns}

    def decode(self, index: int, image_path: Path, pose_path: Path) -> dict[str, Tensor]:
        pose = torch.from_numpy(data.read_pose(pose_path)).float()
        image, alpha = load_image(image_path, self.size)
        return {
            "object": torch.tensor(index),
            "view": torch.tensor(int(pose_path.stem)),
            "image": image,
            "alpha": alpha,
            "pose": pose,
        }


class ViewLoader:
    """Iterates over batches of `Views`, shard after shard. No batch has views of two shards.

    members: shard -> names of its objects.
    skipped: messages on the views and objects that --skip_bad has passed over so far.
    """

    def __init__(self, members: dict[int, list[str]], args: argparse.Namespace):
        self.members = members
        self.args = args
        self.skipped: list[str] = []

    def __iter__(self):
        loader = DataLoader(
            Views(self.args.image_size, self.args.skip_bad),
            batch_size=None,
            sampler=self.batches(),
            num_workers=self.args.workers,
            pin_memory=torch.cuda.is_available() and self.args.device != "cpu",
        )
        for batch in loader:
            self.skipped += batch.pop("skipped")
            if "object" in batch:
                yield batch

    def batches(self):
        """What `Views` is indexed with. Made as workers ask for it: no list of all views exists."""
        for shard, names in self.members.items():
            views = []
            for index, name in enumerate(names):
                for image, pose in self.find(name):
                    views.append((index, image, pose))
            for first in range(0, len(views), self.args.batch_size):
                yield shard, len(views), views[first : first + self.args.batch_size]

    def find(self, name: str) -> list[tuple[Path, Path]]:
        try:
            return find_views(self.args.data, name)
        except InputError as error:
            if not self.args.skip_bad:
                raise
            self.skipped.append(str(error))
            return []


# ----------------------------------------------------------------------------------------- encoding


def stored(value: Tensor, form: str) -> Tensor:
    """Patch features as fp16 or fp8, clamped first: fp8 makes NaN of what is too large."""
    dtype = DTYPES[form]
    limit = torch.finfo(dtype).max
    return value.float().clamp(-limit, limit).to(dtype)


def patch_cover(alpha: Tensor, tokens: int) -> Tensor:
    """How much of each patch the object covers: alpha (V,H,W) in [0,1] -> (V,T) in [0,1]."""
    grid = round(tokens**0.5)
    return F.adaptive_avg_pool2d(alpha[:, None], grid).flatten(1)


def encode_views(
    batch: dict[str, Tensor],
    encoder: torch.nn.Module,
    codec: torch.nn.Module,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Tensor]:
    """A batch of `Views` -> its rows of the archive, in the archive's formats, and their "object".

    All are on the CPU; what a GPU has encoded may still be on its way there.
    """
    # Compiled code for any batch size is slower, so the short batches at shards' ends run eagerly.
    stance = "default" if len(batch["image"]) == args.batch_size else "force_eager"
    with torch.compiler.set_stance(stance), autocast(device, args.precision):
        encoded = encode(batch["image"].to(device, non_blocking=True), encoder, codec)
    rows = {}
    for key, value in encoded.items():
        row = stored(value, args.patch_dtype) if key == "patch" else value.half()
        rows[key] = row.to("cpu", non_blocking=True)
    cover = patch_cover(batch["alpha"], encoder.tokens)
    rows["alpha"] = (255 * cover).round().to(torch.uint8)
    for key in ("pose", "view", "object"):
        rows[key] = batch[key]
    return rows


def encode_ahead(batches, encoder, codec, args: argparse.Namespace, device: torch.device):
    """`encode_views` of each batch, arrived on the CPU.

    The next batch is already under way, so that a GPU goes on while these rows are put away.
    """
    pending = None
    for batch in batches:
        rows = encode_views(batch, encoder, codec, args, device)
        event = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
        if pending:
            yield arrived(*pending)
        pending = (rows, event)
    if pending:
        yield arrived(*pending)


def arrived(rows: dict[str, Tensor], event: torch.cuda.Event | None) -> dict[str, Tensor]:
    """The rows, once the GPU has copied them."""
    if event is not None:
        event.synchronize()
    return rows


# ---------------------------------------------------------------------------------------------- PCA


def fit_pca(
    batches, encoder: torch.nn.Module, args: argparse.Namespace, device: torch.device
) -> dict[str, Tensor]:
    """The PCA of patch features where the object covers more than half of the patch.

    Returns {"mean": (K0,), "components": (K0,K)}, float32, for K0 channels of the layers and
    K = --pca. Raises InputError where there are fewer such patches than components.
    """
    count, total, outer = 0, 0, 0  # of the foreground tokens: number, sum, sum of outer products
    for batch in progress(batches, desc="fitting the PCA", unit="batch"):
        with without_compiler(), autocast(device, args.precision):
            patch = encoder(batch["image"].to(device))[1].double()
        foreground = patch_cover(batch["alpha"], encoder.tokens).to(device) > 0.5
        tokens = patch[foreground]  # (n, K0)
        count += len(tokens)
        total = total + tokens.sum(0)
        outer = outer + tokens.T @ tokens
    if count < args.pca:
        raise InputError(
            f"--pca {args.pca}: only {count} foreground tokens in the sampled training objects"
        )
    mean = total / count
    variance, vectors = torch.linalg.eigh(outer / count - mean.outer(mean))  # ascending
    kept = variance[-args.pca :].sum() / variance.sum()
    print(
        f"PCA to {args.pca} of {len(mean)} channels keeps {kept:.1%} "
        "of the foreground tokens' variance"
    )
    components = vectors[:, -args.pca :].flip(1).contiguous()
    return {"mean": mean.float().cpu(), "components": components.float().cpu()}


def storage_error(
    image: Tensor, encoder: torch.nn.Module, args: argparse.Namespace, device: torch.device
) -> float:
    """What PCA and number format cost the patch features of images (V,3,H,W).

    The root mean square of the error, divided by that of the features.
    """
    with without_compiler(), autocast(device, args.precision):
        exact = encoder.features(image.to(device))[1]
        projected = encoder.project(exact)
    restored = stored(projected, args.patch_dtype).float()
    if encoder.pca is not None:
        restored = restored @ encoder.pca.T + encoder.pca_mean
    return ((restored - exact).norm() / exact.norm()).item()


# ----------------------------------------------------------------------- what rank 0 settles first


def check_begun(args: argparse.Namespace, names: list[str]) -> bool:
    """Whether this archive was begun before. Raises InputError if that was with other flags."""
    path = Path(args.archive) / "manifest.json"
    if not path.exists():
        if list(Path(args.archive).glob("[0-9]*.safetensors")):
            raise InputError(
                f"--archive {args.archive}: shards without their manifest.json; "
                "restore it, or delete them"
            )
        return False
    there = read_manifest(args.archive)
    for flag in RECORDED_FLAGS:
        value, recorded = getattr(args, flag), there.get("flags", {}).get(flag)
        if value != recorded:
            raise InputError(f"--{flag} {value}: {path} says {recorded}")
    if names != there["objects"]:
        listed = len(there["objects"])
        raise InputError(f"--data {args.data}: its objects are not the {listed} that {path} lists")
    check_same_tree(args, names)
    return True


def check_same_tree(args: argparse.Namespace, names: list[str]) -> None:
    """Raises InputError where the shards that are there hold other renders of these objects.

    It looks at one view of each shard.
    """
    for shard, members in members_of(names, range(count_shards(names))).items():
        path = shard_path(args.archive, shard)
        if not path.exists():
            continue
        handle = open_shard(path)
        offsets = handle.get_tensor("view_offset").tolist()
        if offsets[-1] == 0:
            continue  # all of its views were skipped
        name = members[bisect.bisect_right(offsets, 0) - 1]
        view = handle.get_slice("view")[0:1].item()
        pose = handle.get_slice("pose")[0]
        data.check_same_pose(args.archive, Path(args.data, name), view, pose)


def frozen_path(args: argparse.Namespace) -> Path:
    """The file of what the archive itself keeps of the encoder: random weights and the PCA."""
    return Path(args.archive) / "frozen.safetensors"


def make_frozen(args: argparse.Namespace, names: list[str], device: torch.device) -> None:
    """Draws random weights and fits the PCA, where the flags ask for them, and saves them."""
    frozen_path(args).unlink(missing_ok=True)  # of an attempt with other flags
    if args.weights != "random" and not args.pca:
        return
    encoder, _ = open_frozen(args, device, {})
    pca = None
    if args.pca:
        if args.pca > encoder.feature_dim:
            raise InputError(f"--pca {args.pca}: the layers have {encoder.feature_dim} channels")
        train = data.split_objects(names, args.val_fraction, "train")
        picked = np.random.default_rng(0).permutation(len(train))[: args.pca_objects]
        pca = fit_pca(ViewLoader({0: [train[i] for i in picked]}, args), encoder, args, device)
    tensors = own_tensors(encoder, pca)
    write_atomically(frozen_path(args), lambda path: save_tensors(tensors, path))


def settle(args: argparse.Namespace, device: torch.device) -> tuple[list[str], list[int]]:
    """(all objects, the shards that are missing), after making what all ranks will open."""
    names = data.list_objects(args.data)
    data.warn_of_odd_poses(args.data, names)
    if not check_begun(args, names):
        make_frozen(args, names, device)
    shards = range(count_shards(names))
    missing = [shard for shard in shards if not shard_path(args.archive, shard).exists()]
    return names, missing


def count_shards(names: list[str]) -> int:
    return math.ceil(len(names) / data.SHARD_OBJECTS)


def members_of(names: list[str], shards: Iterable[int]) -> dict[int, list[str]]:
    """Shard -> names of its objects."""
    members = {}
    for shard in shards:
        first = shard * data.SHARD_OBJECTS
        members[shard] = names[first : first + data.SHARD_OBJECTS]
    return members


def views_per_object(args: argparse.Namespace, names: list[str]) -> float:
    """The mean over up to 256 objects. An estimate for all: to list 800,000 folders takes hours."""
    counts = []
    for name in data.some_of(names):
        try:
            counts.append(len(data.list_views(args.data, name)))
        except InputError:
            counts.append(0)  # the loader names it
    return sum(counts) / len(counts)


def check_space(args: argparse.Namespace, objects: int, views: float, encoder, codec) -> None:
    """Prints what so many objects of so many views each will take on disk.

    Raises InputError where the disk has less.
    """
    moments = 2 * codec.channels * (args.image_size // codec.factor) ** 2
    patch = encoder.tokens * encoder.feature_dim
    pose, view, crc32 = 48, 8, 56
    row = (
        2 * (moments + encoder.cls_dim)
        + DTYPES[args.patch_dtype].itemsize * patch
        + encoder.tokens  # alpha
        + (pose + view + crc32)
    )
    need = objects * views * row
    free = shutil.disk_usage(args.archive).free
    print(
        f"{objects} objects x {views:.1f} views x {row:,} bytes = {need / 1e9:.2f} GB to write, "
        f"{free / 1e9:.1f} GB free"
    )
    if need > free:
        raise InputError(
            f"--archive {args.archive}: {need / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free"
        )


def save_or_check_manifest(args: argparse.Namespace, names: list[str], encoder, codec) -> None:
    """Writes the manifest. Where there is one, raises InputError if it is of other weights."""
    path = Path(args.archive) / "manifest.json"
    manifest = {
        "format": ARCHIVE_FORMAT,
        "flags": {flag: getattr(args, flag) for flag in RECORDED_FLAGS},
        "image_size": args.image_size,
        "val_fraction": args.val_fraction,
        "objects": names,
        "encoder": encoder.spec(),
        "codec": codec_spec(codec),
    }
    if not path.exists():
        save_manifest(args.archive, manifest)
        return
    there = read_manifest(args.archive)
    for key, flag in (("encoder", "--weights"), ("codec", "--vae")):
        if there[key]["sha256"] != manifest[key]["sha256"]:
            raise InputError(
                f"{flag}: not the weights that {path} was written with (sha256 differs)"
            )


def print_storage_error(
    args: argparse.Namespace, names: list[str], encoder, device: torch.device
) -> None:
    """What PCA and fp8 cost, on the first batch of eight training objects."""
    train = data.split_objects(names, args.val_fraction, "train")
    some = (train or names)[:8]
    for batch in itertools.islice(ViewLoader({0: some}, args), 1):
        error = storage_error(batch["image"], encoder, args, device)
        print(
            f"{args.patch_dtype} patch features, PCA {args.pca}: "
            f"{error:.2%} relative root mean square error"
        )


def begin(
    args: argparse.Namespace,
    names: list[str],
    missing: list[int],
    encoder,
    codec,
    device: torch.device,
) -> float:
    """Prints what will be written, and writes the manifest. Returns the views an object, a mean."""
    mean_views = views_per_object(args, names)
    objects = sum(map(len, members_of(names, missing).values()))
    check_space(args, objects, mean_views, encoder, codec)
    save_or_check_manifest(args, names, encoder, codec)
    if missing and args.layers and (args.pca or args.patch_dtype == "fp8"):
        print_storage_error(args, names, encoder, device)
    return mean_views


# ------------------------------------------------------------------------------------------ writing


def collect_shard(batches, views: int, objects: int, bar: tqdm) -> dict[str, Tensor]:
    """One shard's tensors, from the rows of its batches. views: how many rows to make room for."""
    tensors = {}  # filled in place: a shard of the paper's size takes 6 GB of memory
    filled = 0
    for rows in batches:
        if not tensors:
            for key, value in rows.items():
                tensors[key] = value.new_empty(views, *value.shape[1:])
        stop = filled + len(rows["object"])
        for key in ("latent_mean", "latent_logvar", "cls"):
            if not rows[key].isfinite().all():
                raise InputError(
                    f"{key} of views {filled} to {stop - 1} of a shard holds NaN or infinity: does "
                    "--precision fp32 mend it?"
                )
        for key, value in rows.items():
            tensors[key][filled:stop] = value
        bar.update(stop - filled)
        filled = stop
    tensors = {key: tensor[:filled] for key, tensor in tensors.items()}
    views_of_object = torch.bincount(tensors.pop("object"), minlength=objects)
    tensors["view_offset"] = F.pad(views_of_object.cumsum(0), (1, 0))
    return tensors


def write_shards(
    members: dict[int, list[str]], encoder, codec, args, device: torch.device, bar: tqdm
) -> list[str]:
    """Writes the shards (shard -> names of its objects). Returns messages on what was skipped."""
    loader = ViewLoader(members, args)
    by_shard = itertools.groupby(loader, key=lambda batch: (batch["shard"], batch["shard_views"]))
    with ThreadPoolExecutor(1) as writer:  # a shard is written while the next one is encoded
        writing = None
        for (shard, shard_views), batches in by_shard:
            rows = encode_ahead(batches, encoder, codec, args, device)
            tensors = collect_shard(rows, shard_views, len(members[shard]), bar)
            if writing:
                writing.result()  # raises what went wrong in it
            writing = writer.submit(save_shard, shard_path(args.archive, shard), tensors)
        if writing:
            writing.result()
    return loader.skipped


def print_skipped(skipped: list[str]) -> None:
    lines = [f"skipped {len(skipped)}:", *skipped[:20]]
    if len(skipped) > 20:
        lines.append("...")
    print("\n  ".join(lines))


def main() -> None:
    args = parse_args()
    # From here on --precision has a value, which the manifest records.
    device, args.precision = open_device(args.device, args.precision)
    rank, world = join_ranks()

    if rank == 0:
        lock_file = lock(Path(args.archive), "--archive")  # noqa: F841 (held until the end)

    # Rank 0 settles what all ranks share. A network's file system may show them different files.
    names, missing = on_rank_0(lambda: settle(args, device), rank, world)
    own = read_tensors(frozen_path(args)) if frozen_path(args).exists() else {}
    encoder, codec = open_frozen(args, device, own)
    mean_views = on_rank_0(lambda: begin(args, names, missing, encoder, codec, device), rank, world)

    members = members_of(names, missing[rank::world])
    total = round(mean_views * sum(map(len, members.values())))
    what = "archiving" if world == 1 else f"archiving, rank 0 of {world}"
    with progress(total=total, desc=what, unit="view", disable=rank > 0) as bar:
        skipped = write_shards(members, encoder, codec, args, device, bar)
    if skipped:
        print_skipped(skipped)
    wait_for_all(world)
    leave_ranks()

    if rank == 0:
        shards = list(Path(args.archive).glob("[0-9]*.safetensors"))
        if not shards:
            raise InputError(f"--data {args.data}: no sound view in it")
        size = sum(file.stat().st_size for file in shards)
        print(f"{args.archive}: {len(names)} objects, {size / 1e9:.3f} GB")


if __name__ == "__main__":
    run_script(main)
