"""Train Efficient-3DiM (Jiang et al., ICLR 2024; sections 3 and A.1), or its Zero-1-to-3 baseline.

A CPU, a minute:
    python train.py --archive out/archive --out runs/small --width 64 --channel_mult 1 2 \
        --res_blocks 1 --attention 1 2 --heads 4 --context_dim 128 --prediction x0 \
        --t_sampling uniform --steps 100 --batch_size 16 --accumulate 1 --val_every 0 \
        --preview_every 0
One GPU:
    python train.py --archive ARCHIVE --init sd-v1-5.safetensors --out runs/full --compile \
        --batch_size 192 --accumulate 8
A node:
    torchrun --nproc_per_node 8 train.py --archive ARCHIVE --init sd-v1-5.safetensors \
        --out runs/full --compile

Rerunning a command resumes it. Everything random of a step comes from (seed, step), for the whole
global batch, and each process takes its slice. So restarts, the number of processes and the
accumulation change nothing but rounding.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import os
import sys
import time
from argparse import BooleanOptionalAction
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import data
import pretrained
import sample
from lib import checkpoints, cli
from lib.archives import list_id
from lib.cli import ArgumentParser, InputError, run_script
from lib.distributed import (
    any_rank,
    check_alike,
    compile_in_place,
    flops_per_sample,
    free_memory,
    join_ranks,
    leave_ranks,
    open_device,
    peak_memory,
    sum_over_ranks,
    without_compiler,
    wrap_ddp,
)
from lib.files import append, lock, trim_log, write_text
from lib.formats import may_exist
from lib.images import labelled_grid, save_picture
from lib.signals import catch_signals, start_workers_unstoppable
from model import (
    TIMESTEPS,
    NovelViewModel,
    condition_dropout,
    sample_timesteps,
    timestep_density,
    training_losses,
)
from pretrained import autocast, encode_latent

BINS = 10  # the loss is logged by timestep, in so many bins
MAX_SKIPPED = 10  # so many steps in a row without a finite gradient stop a run (`Log.write_step`)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_data_flags(parser)
    add_model_flags(parser)
    add_diffusion_flags(parser)
    add_optimisation_flags(parser)
    add_system_flags(parser)
    add_logging_flags(parser)
    args = parser.parse_args()
    if args.init:
        source = args.init
        if not may_exist(source):
            if not checkpoints.any_checkpoint(Path(args.out)):
                raise InputError(f"--init {source}: no such file or run")
            source = args.out  # it was begun from --init, whose weights it needs no more
        # A run of ours tells its architecture; flags that are given explicitly come first.
        parser.set_defaults(**architecture_of(source))
        args = parser.parse_args()
    check_flags(args)
    return args


def architecture_of(source: str) -> dict:
    """The flags of the model in a run of ours, for --init; {} for other checkpoints."""
    meta = pretrained.own_meta(source)
    if meta is None:
        return {}
    model = meta["model"]
    return {
        "width": model["model_channels"],
        "channel_mult": model["channel_mult"],
        "res_blocks": model["num_res_blocks"],
        "attention": model["attention_resolutions"],
        "heads": model["num_heads"],
        "context_dim": model["context_dim"],
        "prediction": model["prediction"],
        "pose": model.get("pose_encoding", "zero123"),
        "pose_embedding": model.get("pose_embedding", "token"),
    }


def add_data_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument_group("data").add_argument
    flag("--archive", help="features and latents that precompute_dino.py wrote (3.4)")
    flag(
        "--online",
        action="store_true",
        help="encode --data's images while training; with --archive, run the image encoder only",
    )
    flag("--data", help="with --online: renders in Zero-1-to-3's layout")
    flag(
        "--workers",
        type=cli.nonnegative_int,
        default=cli.default_workers(),
        help="processes that read data, a rank; at most 4 by default, and no more than cores",
    )
    pretrained.add_encoder_flags(
        parser.add_argument_group(
            "what is frozen (for --online; an archive records it; --vae says where its VAE is now)"
        )
    )


def add_model_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument_group("model (the defaults are Stable Diffusion 1.x)").add_argument
    flag("--init", help="weights to start from: a file, folder or hub name; SD's, zero123's, ours")
    flag(
        "--width", type=cli.positive_int, default=320, help="the UNet's channels at full resolution"
    )
    flag(
        "--channel_mult",
        type=cli.positive_int,
        nargs="+",
        default=[1, 2, 4, 4],
        help="channels of each stage, in multiples of --width",
    )
    flag("--res_blocks", type=cli.positive_int, default=2, help="residual blocks a stage")
    flag(
        "--attention",
        type=cli.positive_int,
        nargs="*",
        default=[1, 2, 4],
        help="downsampling factors with attention",
    )
    flag("--heads", type=cli.positive_int, default=8, help="attention heads")
    flag("--context_dim", type=cli.positive_int, default=768, help="width of the context token")
    flag(
        "--amalgamate",
        action=BooleanOptionalAction,
        default=True,
        help="add patch features to the UNet's encoder (3.3)",
    )
    flag(
        "--pose",
        choices=data.POSE_ENCODINGS,
        default="zero123",
        help="numbers of a camera move: elevation has the input's polar angle in the place of the "
        "change of distance (Stable Zero123's)",
    )
    flag(
        "--pose_embedding",
        choices=["token", "mlp"],
        default="token",
        help="token: the camera move is in the context token (3.3); mlp: in the timestep "
        "embedding, too (ours, beyond the paper)",
    )
    flag(
        "--checkpointing",
        action=BooleanOptionalAction,
        default=False,
        help="recompute blocks in backward: less memory, more time",
    )


def add_diffusion_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument_group("diffusion").add_argument
    flag(
        "--prediction",
        choices=["eps", "v", "x0"],
        default="eps",
        help="eps (equation 2); v and x0 are for training from scratch (ours)",
    )
    flag(
        "--t_sampling",
        choices=["gaussian", "uniform"],
        default="gaussian",
        help="distribution of the timesteps (3.2)",
    )
    flag(
        "--t_mean",
        type=cli.finite_float,
        default=1000,
        help="mean of the Gaussian, in timesteps (3.2)",
    )
    flag(
        "--t_std",
        type=cli.positive_finite_float,
        default=200,
        help="standard deviation of the Gaussian, in timesteps (3.2)",
    )
    flag(
        "--cond_dropout",
        type=cli.fraction,
        default=0.05,
        help="p, at most 1/3: 2p of the samples lose the context, 2p the condition latent, p both "
        "(Zero-1-to-3's; the paper is silent)",
    )
    flag(
        "--unconditional",
        action="store_true",
        help="drop every condition: pretrains a stand-in for Stable Diffusion (ours)",
    )


def add_optimisation_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--steps", type=cli.positive_int, default=30_000, help="optimiser steps (A.1)")
    flag(
        "--batch_size",
        type=cli.positive_int,
        default=48,
        help="samples a micro-batch and process (A.1)",
    )
    flag(
        "--accumulate",
        type=cli.positive_int,
        default=4,
        help="micro-batches a step (A.1: 48 x 4 x 8 GPUs = 1536 samples)",
    )
    flag("--lr", type=cli.positive_finite_float, default=1e-4, help="base learning rate (A.1)")
    flag("--lr_min", type=cli.nonnegative_float, default=1e-5, help="final learning rate (A.1)")
    flag(
        "--lr_schedule",
        choices=["cosine", "constant"],
        default="cosine",
        help="after the warm-up (3.4, A.1)",
    )
    flag("--warmup", type=cli.nonnegative_int, default=200, help="steps of linear warm-up (A.1)")
    flag(
        "--cc_lr",
        type=cli.nonnegative_float,
        default=1,
        help="learning rate of cc_projection, in multiples of --lr (the paper is silent; "
        "Zero-1-to-3: 10)",
    )
    flag(
        "--weight_decay",
        type=cli.nonnegative_float,
        default=0.01,
        help="AdamW's (A.1 says Adam with weight decay: AdamW is inferred)",
    )
    flag(
        "--clip",
        type=cli.positive_float,
        default=1.0,
        help="bound of the gradient norm (the paper is silent; Zero-1-to-3: inf)",
    )
    flag(
        "--ema",
        type=cli.fraction,
        default=0.9999,
        help="cap of the EMA decay (A.1 has an EMA; the value is Zero-1-to-3's)",
    )


def add_system_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument_group("system").add_argument
    flag(
        "--precision",
        choices=["bf16", "fp16", "fp32"],
        help="default: bf16 on a GPU, else fp32 (3.4: 16 bits)",
    )
    flag(
        "--compile",
        action=BooleanOptionalAction,
        default=False,
        help="torch.compile the UNet and, with --online, what is frozen",
    )
    flag(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on one GPU; slower",
    )
    flag("--device", default="auto", help="auto, cpu or cuda")
    flag("--seed", type=cli.seed, default=0, help="of initialisation, data order and noise")


def add_logging_flags(parser: ArgumentParser) -> None:
    flag = parser.add_argument_group("logging").add_argument
    flag("--out", required=True, help="run folder: log.jsonl, step_*/, latest, previews/")
    flag("--log_every", type=cli.positive_int, default=50, help="steps between lines of log.jsonl")
    flag("--save_every", type=cli.positive_int, default=1000, help="steps between checkpoints")
    flag("--keep", type=cli.positive_int, default=2, help="number of newest checkpoints that stay")
    flag(
        "--keep_every",
        type=cli.nonnegative_int,
        default=0,
        help="checkpoints at multiples of this many steps stay for good; 0: none",
    )
    flag(
        "--val_every",
        type=cli.nonnegative_int,
        default=1000,
        help="steps between held-out losses; 0: none",
    )
    flag(
        "--val_pairs",
        type=cli.positive_int,
        default=256,
        help="held-out pairs that this loss is averaged over",
    )
    flag(
        "--preview_every",
        type=cli.nonnegative_int,
        default=5000,
        help="steps between grids of samples; 0: none",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError where flags do not go together."""
    if not (args.archive or args.online):
        raise InputError("give --archive, or --online with --data, or all three")
    if args.online and not args.data:
        raise InputError("--online: needs --data, the renders that are encoded")
    if args.data and not args.online:
        raise InputError("--data: is read with --online only; an archive needs no images")
    if args.cond_dropout > 1 / 3:
        raise InputError(f"--cond_dropout {args.cond_dropout}: at most 1/3")
    stages = max(3, len(args.channel_mult))  # 3: the default --attention passes with fewer, too
    for factor in args.attention:
        if factor not in [2**stage for stage in range(stages)]:
            raise InputError(f"--attention {factor}: stages are downsampled by 1, 2, 4, ...")
    if not -5 * args.t_std < args.t_mean < TIMESTEPS + 5 * args.t_std:
        raise InputError(f"--t_mean {args.t_mean}: must be within 5 --t_std of 0 to {TIMESTEPS}")
    if args.t_std > 1e6:
        raise InputError(f"--t_std {args.t_std:g}: at most 1e6, where all timesteps are alike")
    if args.lr_schedule == "cosine" and args.lr < args.lr_min:
        raise InputError(f"--lr {args.lr}: below --lr_min {args.lr_min}; the cosine would rise")


def notes_on_flags(args) -> list[str]:
    """What a newcomer should know of these flags before the run."""
    notes = []
    if args.warmup > args.steps // 2:
        notes.append(
            f"note: --warmup {args.warmup} is shortened to half of --steps, {args.steps // 2}"
        )
    density = timestep_density(args.t_sampling, args.t_mean, args.t_std)
    share = density[:400].sum().item()  # of the nearly clean steps
    if not args.init and (args.prediction == "eps" or share < 0.01):
        notes.append(
            "note: without --init these flags train from scratch, but the paper's presume a "
            f"pretrained UNet: {args.prediction} prediction, {share:.1%} of the timesteps below "
            "400; presets/small.txt trains from scratch"
        )
    return notes


# ---------------------------------------------------------------------------------- pure functions


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then half a cosine period from lr to lr_min (A.1); step counts from 0.

    The warm-up takes at most half of the steps.
    """
    warmup = min(args.warmup, args.steps // 2)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.lr_schedule == "constant":
        return args.lr
    done = min(1.0, (step - warmup) / max(1, args.steps - warmup))
    return args.lr_min + (args.lr - args.lr_min) * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(step: int, cap: float) -> float:
    """LDM's warm-up of the EMA, in optimiser steps from 0: it starts at 2/11."""
    return min(cap, (2 + step) / (11 + step))


@torch.no_grad()  # without it, a graph of all updates would grow with every step
def update_ema(averaged: list[Tensor], trained: list[Tensor], decay: float) -> None:
    """EMA of all that trains (A.1): averaged = decay * averaged + (1 - decay) * trained."""
    # Deviation: A.1 and Zero-1-to-3 average the UNet alone; Zero-1-to-3 counts micro-batches.
    torch._foreach_lerp_(averaged, trained, 1 - decay)


def step_draws(
    seed: int, step: int, global_batch: int, shape: tuple, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything random of an optimiser step, for its whole global batch G, from (seed, step).

    Returns u_t and u_drop (G,), float64 uniform on [0, 1), then noise and posterior noise
    (G, *shape), float32 normal. Drawn on the device, so CPUs and GPUs draw differently.
    """
    generator = data.seeded(seed, step, device=device)
    uniform = torch.rand(2, global_batch, generator=generator, device=device, dtype=torch.float64)
    normal = torch.randn(2, global_batch, *shape, generator=generator, device=device)
    return uniform[0], uniform[1], normal[0], normal[1]


def losses_by_timestep(losses: Tensor, t: Tensor) -> Tensor:
    """(2, BINS) float64: sum and number of the finite losses (B,) by the bins of t (B,)."""
    member = F.one_hot(t * BINS // TIMESTEPS, BINS).double() * losses.isfinite()[:, None]
    sums = losses.double().nan_to_num(0, 0, 0) @ member
    return torch.stack([sums, member.sum(0)])


def due(step: int, every: int, steps: int) -> bool:
    """Whether to do after `step` steps what is done `every` steps, and at the end (0: never)."""
    return every > 0 and (step % every == 0 or step == steps)


# ------------------------------------------------------------------------------------------- data


def open_data(args, device: torch.device, precision: str, rank: int = 0):
    """(training set, held-out set, prepare, frozen).

    prepare: `prepare_batch` with all arguments but the batch. frozen: what a checkpoint keeps of
    encoder and codec: "encoder" and "codec", their specs; "tensors", weights that no public file
    holds; "image_size", "val_fraction" and "objects" of the data. Raises InputError.
    """
    encoder = None
    codec = None
    if args.archive:
        train_set = data.Archive(
            args.archive, "train", args.seed, args.data, args.amalgamate, args.pose
        )
        val_set = data.Archive(args.archive, "val", 0, args.data, args.amalgamate, args.pose)
        frozen = archived_networks(args.archive, train_set.manifest)
        if args.online:
            encoder = open_online_encoder(args, device)
            frozen["encoder"] = encoder.spec()
            frozen["tensors"] = pretrained.own_tensors(encoder)
    else:
        flags = vars(args)
        if not args.amalgamate:
            flags = {**flags, "layers": []}  # nothing would read the patch features
        encoder, codec = pretrained.open_frozen(argparse.Namespace(**flags), device)
        names = data.list_objects(args.data)
        if rank == 0:
            data.warn_of_odd_poses(args.data, names)
        train_names = data.split_objects(names, args.val_fraction, "train")
        val_names = data.split_objects(names, args.val_fraction, "val")
        train_set = data.ImagePairs(args.data, train_names, args.image_size, args.seed, args.pose)
        val_set = data.ImagePairs(args.data, val_names, args.image_size, 0, args.pose)
        frozen = {
            "encoder": encoder.spec(),
            "codec": pretrained.codec_spec(codec),
            "image_size": args.image_size,
            "val_fraction": args.val_fraction,
            "tensors": pretrained.own_tensors(encoder),
            "objects": list_id(names),
        }
    if len(train_set) == 0:
        raise InputError(f"{args.archive or args.data}: no training object with two views")
    prepare = functools.partial(
        prepare_batch, encoder=encoder, codec=codec, device=device, precision=precision
    )
    return train_set, val_set, prepare, frozen


def archived_networks(root: str, manifest: dict) -> dict:
    """`frozen` of an archive. Its "tensors" are random weights and the PCA, where it has them.

    Raises InputError where their file is lost: samples of the run could never be drawn.
    """
    own = Path(root) / "frozen.safetensors"
    encoder = manifest["encoder"]
    its_own = encoder.get("pca") or encoder["weights"] in ("random", "saved")
    if its_own and not own.exists():
        raise InputError(f"{own}: missing; it holds the image encoder's own weights or its PCA")
    return {
        "encoder": encoder,
        "codec": manifest["codec"],
        "image_size": manifest["image_size"],
        "val_fraction": manifest["val_fraction"],
        "tensors": pretrained.read_tensors(own) if own.exists() else {},
        "objects": list_id(manifest["objects"]),
    }


def open_online_encoder(args, device: torch.device) -> nn.Module:
    """The image encoder that runs while training on archived latents."""
    layers = tuple(args.layers) if args.amalgamate else ()  # else nothing reads patch features
    encoder = pretrained.ImageEncoder(args.encoder, args.weights, layers, args.encoder_size)
    encoder.to(device)
    if args.compile:
        pretrained.compile_frozen(encoder)
    return encoder


def prepare_batch(
    batch: dict, encoder, codec, device: torch.device, precision: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A batch of data.Archive or data.ImagePairs as the training step takes it, on the device.

    encoder, codec: each encodes the batch's images here; None leaves what was archived.
    Returns the target's posterior mean and log variance (B, C, H, W) and the condition.
    """
    rows = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    with autocast(device, precision):
        if encoder is not None:
            rows["cls"], rows["patch"] = encoder(rows["cond"])
        if codec is not None:
            rows["latent"], _ = encode_latent(rows["cond"], codec)
            rows["target_mean"], rows["target_logvar"] = encode_latent(rows["target"], codec)
    condition = {}
    for key in ("latent", "cls", "pose", "patch"):
        if rows.get(key) is not None:
            condition[key] = rows[key].float()
    return rows["target_mean"].float(), rows["target_logvar"].float(), condition


# ------------------------------------------------------------------------------------------ model


def build_model(args, frozen: dict, latent_size: int) -> NovelViewModel:
    """The model that flags and encoders ask for. Raises InputError naming the flag."""
    encoder = frozen["encoder"]
    channels = frozen["codec"]["channels"]
    if args.amalgamate and not encoder["feature_dim"]:
        raise InputError("--amalgamate: --layers is empty; --no-amalgamate does without features")
    torch.manual_seed(args.seed)
    try:
        model = NovelViewModel(
            cls_dim=encoder["cls_dim"],
            prediction=args.prediction,
            pose_encoding=args.pose,
            pose_embedding=args.pose_embedding,
            in_channels=2 * channels,
            out_channels=channels,
            model_channels=args.width,
            channel_mult=tuple(args.channel_mult),
            num_res_blocks=args.res_blocks,
            attention_resolutions=tuple(args.attention),
            num_heads=args.heads,
            context_dim=args.context_dim,
            feature_dim=encoder["feature_dim"] if args.amalgamate else 0,
            feature_tokens=encoder["tokens"],
            latent_size=latent_size,
            checkpointing=args.checkpointing,
        )
    except ValueError as error:
        raise InputError(f"--width, --channel_mult, --heads or --image_size: {error}") from None
    if args.unconditional:  # the condition's input weights get no gradient and stay zero
        nn.init.zeros_(model.unet.input_blocks[0][0].weight[:, channels:])
    return model


def load_init(model: NovelViewModel, source: str, encoder: dict, rank: int) -> None:
    """Starts from --init's weights; rank 0 says what it found. Raises InputError.

    encoder: the spec of the model's encoder.
    """
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):
        pretrained.check_init(model, source, encoder)
        weights = pretrained.read_weights(source, ("unet", "cc_projection"))
        pretrained.load_pretrained(model, weights, f"init {source}")


def check_memory(model: NovelViewModel, device: torch.device) -> None:
    """Raises InputError where EMA, gradients and AdamW's moments will not fit beside the model."""
    parameters = sum(p.numel() for p in model.parameters())
    needed = 16 * parameters  # bytes: EMA 4, gradient 4, two moments 8
    free = free_memory(device)
    if free is not None and needed > free:
        raise InputError(
            f"--width {model.args['model_channels']}: the model's {parameters / 1e6:.0f} M "
            f"parameters take {needed / 1e9:.1f} GB more (EMA, gradients, AdamW: 16 bytes each); "
            f"{free / 1e9:.1f} GB are free on {device}; presets/small.txt is a small model"
        )


def match_gradient_layout(model: NovelViewModel) -> None:
    """Gives the 1x1 convolutions the memory layout of their gradients.

    They run as linear layers, so their gradients are contiguous. Where a parameter's layout differs
    from its gradient's, DDP would copy the gradient in every step.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("proj_in.weight", "proj_out.weight")):
            parameter.data = parameter.data.flatten(1)[:, :, None, None]


def averages_of_trained(ema: NovelViewModel, model: NovelViewModel) -> list[Tensor]:
    """The EMA's copies of the parameters that train, in the model's order."""
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    return [average for average, parameter in pairs if parameter.requires_grad]


def make_optimizer(model: NovelViewModel, args) -> torch.optim.Optimizer:
    """AdamW over all that trains (A.1); cc_projection learns at --cc_lr times the others' rate."""
    projection = list(model.cc_projection.parameters())
    others = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("cc_projection."):
            others.append(parameter)
    groups = [
        {"params": others, "lr_multiple": 1.0},
        {"params": projection, "lr_multiple": args.cc_lr},
    ]
    return torch.optim.AdamW(
        groups, lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.999), fused=True
    )


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Skips steps with non-finite gradients, in every precision; with fp16 it scales the loss, too.

    With the other precisions the scale is 1 and stays so.
    """
    if precision == "fp16":
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(
        device.type,
        init_scale=1.0,
        backoff_factor=1 - 2**-30,  # it may not be 1; the scale, in float32, is not changed by it
        growth_interval=2**31 - 1,
    )


def clip_gradients(parameters: list[Tensor], limit: float) -> Tensor:
    """Scales the gradients so that their norm is at most the limit; returns what it was.

    A norm that overflows makes the gradients zero. By an infinite limit it would make them NaN.
    """
    largest = torch.finfo(torch.float32).max
    return nn.utils.clip_grad_norm_(parameters, min(limit, largest))


# ----------------------------------------------------------------------------------------- resume


@dataclass
class State:
    """Where training is. A checkpoint holds it, together with weights and optimiser."""

    accumulate: int  # micro-batches a step
    losses: Tensor  # (2, BINS) of `losses_by_timestep`, since the last line of the log
    skipped: Tensor  # () int64: steps skipped so far because a gradient was not finite
    step: int = 0  # optimiser steps done
    seconds: float = 0.0  # of training, without validation and saving
    validated: bool = False  # this step's held-out loss and preview are done


def run_facts(args, precision: str, world: int, train_set, val_set, frozen: dict) -> dict:
    """The flags, and facts on what they found here. A checkpoint keeps them for `resume`."""
    return {
        **vars(args),
        "precision": precision,
        "processes": world,
        "training_objects": list_id(train_set.names),
        "held_out_objects": list_id(val_set.names),
        "frozen_ids": [
            frozen["encoder"]["sha256"],
            frozen["encoder"]["layers"],
            frozen["codec"]["sha256"],
            frozen["image_size"],
        ],
        "encoder_pixels": frozen["encoder"]["image_size"],
        "held_out_fraction": frozen["val_fraction"],
    }


def check_ranks(state: State, facts: dict, where: str, world: int) -> None:
    """Raises InputError where a rank found other files than rank 0."""
    found = {
        "steps": state.step,
        "training objects": facts["training_objects"],
        "held-out objects": facts["held_out_objects"],
        "encoder and codec": facts["frozen_ids"],
    }
    check_alike(found, world, where)


def resume(out: Path, args, facts: dict, rank: int, model, ema, optimizer, scaler) -> State:
    """Where training is, by OUT's newest checkpoint; a fresh state where there is none.

    The checkpoint also fills model, ema, optimizer and scaler. facts: `run_facts`. Raises
    InputError where a fact changed that must stay, or the model's layers did.
    """
    device = model.alpha_bar.device
    losses = torch.zeros(2, BINS, dtype=torch.float64, device=device)
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    found = checkpoints.newest_checkpoint(out)
    if found is None:
        return State(args.accumulate, losses, skipped)
    saved, ema_weights = found
    accumulate = checkpoints.keep_global_batch(
        saved["args"]["global_batch"], args.batch_size, facts["processes"]
    )
    now = {**facts, "accumulate": accumulate}
    changes = checkpoints.compare_flags(args.out, now, saved["args"])
    if args.accumulate not in (accumulate, saved["args"]["accumulate"]):
        changes.append(f"accumulate: not {args.accumulate}; {accumulate} keeps the global batch")
    if changes and rank == 0:
        print("resuming with what differs from the checkpoint:", *changes, sep="\n  ")
    with pretrained.naming(f"--out {out}: its weights are of another version of this code"):
        model.load_state_dict(saved["model"])
        ema.load_state_dict({name: ema_weights[name] for name in saved["model"]})
    # This command's learning rate and weight decay count, not those of the checkpoint.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
    if saved["args"]["precision"] == facts["precision"]:
        scaler.load_state_dict(saved["scaler"])
    if rank == 0:
        losses = saved["losses"].to(device)  # a sum over all ranks, so one rank alone takes it
        checkpoints.point_at(out / f"step_{saved['step']:07d}")
    return State(
        accumulate=accumulate,
        losses=losses,
        skipped=saved["skipped"].to(device),
        step=saved["step"],
        seconds=saved["seconds"],
        validated=saved["validated"],
    )


def saved_state(state: State, losses: Tensor, facts: dict, model, optimizer, scaler) -> dict:
    """What `resume` takes. losses: the sum of all ranks' state.losses."""
    return {
        "args": facts,
        "step": state.step,
        "seconds": state.seconds,
        "validated": state.validated,
        "losses": losses,
        "skipped": state.skipped,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }


# -------------------------------------------------------------------------------------------- log


def step_values(state: State, lr: float, grad_norm: Tensor, device: torch.device, world: int):
    """What log.jsonl says of the steps since its last line; resets `state.losses`."""
    sums, counts = sum_over_ranks(state.losses, world).tolist()
    state.losses.zero_()
    norm = float(grad_norm)
    return {
        "loss": sum(sums) / sum(counts) if sum(counts) else None,
        "lr": lr,
        "grad_norm": norm if math.isfinite(norm) else None,
        "skipped": int(state.skipped),
        "loss_by_t": [s / n if n else None for s, n in zip(sums, counts, strict=True)],
        "peak_memory_gb": peak_memory(device),
    }


def finite_or_none(value):
    """The value of a log's line, with None for numbers that are not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: finite_or_none(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite_or_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """log.jsonl and the progress bar. Rank 0 has both; other ranks write nothing."""

    def __init__(
        self, path: Path, state: State, steps: int, global_batch: int, flops: int, rank: int
    ):
        self.path = path
        self.rank = rank
        self.global_batch = global_batch
        self.flops = flops
        self.last_step = state.step  # of the last line
        self.last_seconds = state.seconds
        self.last_skipped = int(state.skipped)
        self.last_loss = None
        self.last_text = ""  # on the bar, of the last line
        self.stuck = 0  # steps without progress, up to the last line
        self.bar = cli.progress(total=steps, initial=state.step, unit="step", disable=rank > 0)
        if rank == 0:
            trim_log(path, state.step, held_out=state.validated)

    def say(self, *lines: str) -> None:
        if self.rank == 0:
            self.bar.write("\n".join(lines))

    def close(self, summary: str) -> None:
        self.bar.close()
        if self.rank == 0:
            print(summary)

    @contextlib.contextmanager
    def doing(self, what: str):
        """The progress bar says inside the block what takes time now, and then the loss again."""
        self.bar.set_postfix_str(f"{what} ...")
        yield
        self.bar.set_postfix_str(self.last_text, refresh=False)

    def write(self, state: State, values: dict) -> None:
        line = {
            "step": state.step,
            "seconds": round(state.seconds, 2),
            "samples": state.step * self.global_batch,
            **finite_or_none(values),
        }
        if self.rank == 0:
            append(self.path, json.dumps(line) + "\n")

    def write_held_out(self, state: State, model_losses: list, ema_losses: list) -> None:
        values = {
            "val_loss": sum(model_losses) / BINS,
            "val_loss_ema": sum(ema_losses) / BINS,
            "val_loss_by_t": model_losses,
            "val_loss_ema_by_t": ema_losses,
        }
        self.write(state, values)

    def write_step(self, state: State, values: dict) -> None:
        """A line on the steps since the last one. Raises InputError where training is stuck."""
        steps = state.step - self.last_step
        skipped = values["skipped"] - self.last_skipped
        rate = steps * self.global_batch / (state.seconds - self.last_seconds)
        tflops = rate * self.flops / 1e12
        self.write(
            state, {**values, "samples_per_second": round(rate, 1), "tflops": round(tflops, 3)}
        )
        self.stuck = self.stuck + steps if skipped == steps else 0
        if self.stuck >= MAX_SKIPPED:
            raise InputError(
                f"{self.path.parent}: the gradient was not finite {self.stuck} steps in a row, "
                f"by step {state.step}"
            )
        loss = values["loss"]
        text = "no finite loss" if loss is None else f"loss {loss:.4f}"
        if loss and self.last_loss and loss > 10 * self.last_loss:
            text += f" (JUMPED from {self.last_loss:.4f})"
        self.last_text = f"{text}, lr {values['lr']:.1e}, {rate:.0f} samples/s"
        self.bar.set_postfix_str(self.last_text)
        self.last_step = state.step
        self.last_seconds = state.seconds
        self.last_skipped = values["skipped"]
        self.last_loss = loss or self.last_loss


# ---------------------------------------------------------------------------------- held-out pairs


class HeldOut:
    """Held-out loss and previews. The pairs and the noise are fixed, so that runs compare.

    It has its own random generators, so it does not change training. codec: decodes previews; None
    where there are none, and on all ranks but 0. scale: the codec's.
    """

    def __init__(self, val_set, prepare, codec, scale: float, args, precision: str, ranks):
        self.val_set = val_set
        self.prepare = prepare
        self.codec = codec
        self.scale = scale
        self.args = args
        self.precision = precision
        self.rank, self.world = ranks

    @torch.no_grad()
    def losses(self, networks: list[NovelViewModel]) -> list[list[float]]:
        """Each network's loss at the middle timestep of each bin, averaged over the pairs."""
        device = networks[0].alpha_bar.device
        totals = torch.zeros(len(networks), BINS, dtype=torch.float64, device=device)
        positions = list(range(self.rank, self.args.val_pairs, self.world))
        for first in range(0, len(positions), self.args.batch_size):
            chunk = positions[first : first + self.args.batch_size]
            with without_compiler():
                totals += self.losses_of_pairs(networks, chunk, device)
        return (sum_over_ranks(totals, self.world) / self.args.val_pairs).tolist()

    def losses_of_pairs(self, networks, positions: list[int], device: torch.device) -> Tensor:
        """The sums (networks, BINS) of the losses of the pairs at these positions."""
        mean, _, condition = self.prepare(self.val_set[positions])
        x0 = self.scale * mean
        keep = None  # of context and latent: all
        if self.args.unconditional:
            keep = torch.zeros(len(positions), dtype=torch.bool, device=device)
        generators = [data.seeded(0, position) for position in positions]
        sums = torch.zeros(len(networks), BINS, dtype=torch.float64, device=device)
        for b in range(BINS):
            noise = [torch.randn(mean.shape[1:], generator=g) for g in generators]
            noise = torch.stack(noise).to(device)
            middle = (2 * b + 1) * TIMESTEPS // (2 * BINS)
            t = torch.full((len(positions),), middle, device=device)
            for row, network in zip(sums, networks, strict=True):
                with autocast(device, self.precision):
                    losses = training_losses(network, x0, t, noise, condition, keep, keep)
                row[b] = losses.sum()
        return sums

    def save_preview(self, path: Path, network: NovelViewModel) -> None:
        """A grid of eight held-out pairs: condition, target, the network's sample."""
        with without_compiler():
            mean, _, condition = self.prepare(self.val_set[list(range(8))])
        generators = [data.seeded(0, i) for i in range(8)]
        guidance = 0.0 if self.args.unconditional else 3.0
        latents = sample.sample_latents(
            network, [condition], generators, scale=guidance, precision=self.precision
        )  # the EMA model, which is not compiled
        codec = self.codec.to(mean.device)  # where it stays from the first preview on
        columns = [
            sample.decode(self.scale * condition["latent"], codec),
            sample.decode(self.scale * mean, codec),
            sample.decode(latents, codec),
        ]
        rows = [list(row) for row in zip(*columns, strict=True)]
        save_picture(path, labelled_grid(rows, ["condition", "target", "sample"]))


# ------------------------------------------------------------------------------------------- main


def make_deterministic() -> None:
    """The same bits in every run on one GPU (--deterministic)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if hasattr(torch._inductor.config, "deterministic"):
        torch._inductor.config.deterministic = True  # no kernel is chosen by its measured time


def start_loader(train_set, args, state: State, ranks, device: torch.device):
    """An iterator over this rank's micro-batches, from the step that training is at."""
    positions = data.batch_positions(
        state.step, args.steps, state.accumulate, args.batch_size, *ranks
    )
    loader = DataLoader(
        train_set,
        batch_size=None,  # the sampler gives lists of positions: whole batches
        sampler=positions,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    with start_workers_unstoppable():
        return iter(loader)


def main() -> None:  # noqa: C901, PLR0912, PLR0915 (they read best in one piece)
    args = parse_args()
    device, precision = open_device(args.device, args.precision)
    rank, world = join_ranks("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    stop_signals = catch_signals()  # not before: a rank that waits for others has nothing to save
    if args.deterministic:
        make_deterministic()
    out = Path(args.out)
    if rank == 0:
        lock_file = lock(out, "--out")  # noqa: F841 (locked as long as the name lives)
        (out / "preempted").unlink(missing_ok=True)

    # data, model, EMA, optimiser
    train_set, val_set, prepare, frozen = open_data(args, device, precision, rank)
    scale = frozen["codec"]["scale"]
    with without_compiler():
        example_mean, _, example_condition = prepare(train_set[[0]])
    latent_shape = example_mean.shape[1:]
    model = build_model(args, frozen, latent_shape[-1])
    if args.init and not checkpoints.any_checkpoint(out):
        load_init(model, args.init, frozen["encoder"], rank)
    model.to(device, memory_format=torch.channels_last)
    check_memory(model, device)
    match_gradient_layout(model)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    averaged = averages_of_trained(ema, model)
    optimizer = make_optimizer(model, args)
    scaler = make_scaler(device, precision)
    flops = flops_per_sample(model, example_condition)
    codec = None
    if rank == 0 and args.preview_every and len(val_set):
        codec = pretrained.open_codec(frozen["codec"], args.vae, " (or --preview_every 0)")
    held_out = HeldOut(val_set, prepare, codec, scale, args, precision, (rank, world))

    # resume, and make sure that all ranks found the same
    facts = run_facts(args, precision, world, train_set, val_set, frozen)
    state = resume(out, args, facts, rank, model, ema, optimizer, scaler)
    check_ranks(state, facts, f"--out {out}, --archive or --data", world)
    global_batch = args.batch_size * state.accumulate * world
    facts["accumulate"] = state.accumulate
    facts["global_batch"] = global_batch

    if args.compile:
        compile_in_place(model.unet)
    wrapped = wrap_ddp(model, device) if world > 1 else model
    batches = start_loader(train_set, args, state, (rank, world), device)
    log = Log(out / "log.jsonl", state, args.steps, global_batch, flops, rank)
    log.say(
        f"{sum(p.numel() for p in trained) / 1e6:.1f} M parameters train on {len(train_set)} "
        f"objects, {global_batch} samples a step, {flops / 1e9:.1f} GFLOP a sample; "
        f"steps {state.step} to {args.steps}",
        *notes_on_flags(args),
    )
    if state.step >= args.steps:
        log.say(f"{out} has {state.step} steps already: nothing to train (--steps)")
    if len(val_set) == 0 and (args.val_every or args.preview_every):
        log.say("no object is held out: there will be no held-out loss and no preview")

    first_step = state.step
    while True:
        stop = any_rank(bool(stop_signals), world)
        if not (stop or state.validated or len(val_set) == 0):
            if due(state.step, args.val_every, args.steps):
                with log.doing("held-out loss"):
                    log.write_held_out(state, *held_out.losses([model, ema]))
            if due(state.step, args.preview_every, args.steps) and rank == 0:
                with log.doing("preview"):
                    held_out.save_preview(out / "previews" / f"step_{state.step:07d}.png", ema)
            state.validated = True
        if state.step > first_step and (stop or due(state.step, args.save_every, args.steps)):
            with log.doing("saving"):
                losses_of_all = sum_over_ranks(state.losses, world)
                if rank == 0:
                    saved = saved_state(state, losses_of_all, facts, model, optimizer, scaler)
                    checkpoints.save_checkpoint(out, saved, ema, frozen, args.keep, args.keep_every)
        if stop or state.step >= args.steps:  # above: --steps was lowered
            break

        clock = time.perf_counter()
        # ------------------------------------------------ one optimiser step: this is the method
        lr = learning_rate(state.step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_multiple"]
        draws = step_draws(args.seed, state.step, global_batch, latent_shape, device)
        for micro in range(state.accumulate):
            first = (micro * world + rank) * args.batch_size
            mine = slice(first, first + args.batch_size)
            u_t, u_drop, noise, posterior_noise = (draw[mine] for draw in draws)
            mean, logvar, condition = prepare(next(batches))
            x0 = scale * (mean + (0.5 * logvar).exp() * posterior_noise)
            t = sample_timesteps(u_t, args.t_sampling, args.t_mean, args.t_std)
            keep_context, keep_latent = condition_dropout(u_drop, args.cond_dropout)
            if args.unconditional:
                keep_context = keep_latent = torch.zeros_like(keep_context)
            # DDP then sums gradients over ranks in the last micro-batch only; others ignore it.
            wrapped.require_backward_grad_sync = micro == state.accumulate - 1
            with autocast(device, precision):
                losses = training_losses(
                    wrapped, x0, t, noise, condition, keep_context, keep_latent
                )
            scaler.scale(losses.mean() / state.accumulate).backward()
            state.losses += losses_by_timestep(losses.detach(), t)
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients(trained, args.clip)
        scaler.step(optimizer)  # updates nothing where a gradient is not finite
        scaler.update()
        optimizer.zero_grad(set_to_none=world == 1)  # DDP's gradients are views of its buckets
        update_ema(averaged, trained, ema_decay(state.step, args.ema))
        state.skipped += ~grad_norm.isfinite()
        # ----------------------------------------------------------------------------------------
        state.step += 1
        state.validated = False
        if due(state.step, args.log_every, args.steps):
            values = step_values(state, lr, grad_norm, device, world)  # waits for the device
            state.seconds += time.perf_counter() - clock
            log.write_step(state, values)
        else:
            state.seconds += time.perf_counter() - clock
        log.bar.update()

    if rank == 0 and stop:
        write_text(out / "preempted", "")
        log.say(f"stopped by a signal after step {state.step}; the same command goes on from there")
    log.close(f"{out}: {state.step} steps in {state.seconds:.0f} s of training")
    leave_ranks()


if __name__ == "__main__":
    run_script(main)
