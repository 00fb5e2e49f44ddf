"""Train Efficient-3DiM (Jiang et al., ICLR 2024; sections 3 and A.1), or its Zero-1-to-3 baseline.

    python train.py --archive out/archive --out runs/small --width 64 --channel_mult 1 2 --res_blocks 1 \
        --attention 1 2 --heads 4 --context_dim 128 --prediction x0 --t_sampling uniform --steps 100 --batch_size 16 \
        --accumulate 1 --val_every 0 --preview_every 0                                      # a CPU, a minute
    python train.py --archive ARCHIVE --init sd-v1-5.safetensors --out runs/full --compile --batch_size 192 \
        --accumulate 8                                                                      # one GPU
    torchrun --nproc_per_node 8 train.py --archive ARCHIVE --init sd-v1-5.safetensors --out runs/full --compile

Rerunning a command resumes it. Everything random of a step comes from (seed, step) for the whole global batch, of which
each process takes its slice: restarts, world size and accumulation change nothing but rounding.
"""

import argparse
import atexit
import copy
import json
import math
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import pretrained
import sample
from lib import checkpoints, distributed, signals
from lib import files as durable
from lib import images as pictures
from lib.archives import list_id
from lib.cli import HelpFormatter, InputError, require_positive, run_script
from lib.distributed import agree, set_up
from model import (
    TIMESTEPS,
    NovelViewModel,
    condition_dropout,
    diffusion_loss,
    q_sample,
    sample_timesteps,
)
from pretrained import add_encoder_flags, autocast, compile_frozen, open_frozen

BINS = 10  # of the loss by timestep
# torch.compile's. The thresholds have it compute more anew instead of storing it: the backward pass of GroupNorm and
# SiLU then reads and writes as much memory as 5 activations take instead of 12 (tests/test_bench.py).
COMPILE = {
    "realize_reads_threshold": 8,
    "realize_acc_reads_threshold": 16,
    "realize_opcount_threshold": 60,
}
# a fusion for GPUs that fails an assertion of torch 2.14.1's ("64 v.s. 512") at some shapes
COMPILE |= {"triton.mix_order_reduction": False}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    toggle = argparse.BooleanOptionalAction

    flag = parser.add_argument_group("data").add_argument
    flag("--archive", help="features and latents that precompute_dino.py wrote (3.4)")
    flag(
        "--online",
        action="store_true",
        help="encode --data's images as training goes; with --archive, DINO only",
    )
    flag("--data", help="with --online: renders in Zero-1-to-3's layout")
    flag(
        "--skip_bad",
        action="store_true",
        help="with --online alone: pass over unreadable objects, and name them",
    )
    flag("--workers", type=int, default=4, help="processes that read data, a rank")
    frozen = "what is frozen (read with --online; from an archive only --vae, for previews, where the VAE has moved)"
    add_encoder_flags(parser.add_argument_group(frozen))

    flag = parser.add_argument_group("model (the defaults are Stable Diffusion 1.x)").add_argument
    flag(
        "--init",
        help="weights to start from, a file, folder or hub name: Stable Diffusion's, Zero-1-to-3's, ours",
    )
    flag("--width", type=int, default=320, help="the UNet's channels at full resolution")
    flag(
        "--channel_mult",
        type=int,
        nargs="+",
        default=[1, 2, 4, 4],
        help="each stage's channels, by --width",
    )
    flag("--res_blocks", type=int, default=2, help="residual blocks a stage")
    flag(
        "--attention",
        type=int,
        nargs="*",
        default=[1, 2, 4],
        help="downsampling factors with attention",
    )
    flag("--heads", type=int, default=8, help="attention heads")
    flag("--context_dim", type=int, default=768, help="width of the context token")
    flag(
        "--amalgamate",
        action=toggle,
        default=True,
        help="add patch features to the UNet's encoder (3.3)",
    )
    flag(
        "--checkpointing",
        action=toggle,
        default=False,
        help="recompute blocks in backward, for memory",
    )

    flag = parser.add_argument_group("diffusion").add_argument
    flag(
        "--prediction",
        choices=["eps", "v", "x0"],
        default="eps",
        help="eps (eq. 2); v, x0: to train from scratch",
    )
    flag(
        "--t_sampling",
        choices=["gaussian", "uniform"],
        default="gaussian",
        help="3.2; from scratch: uniform",
    )
    flag("--t_mean", type=float, default=1000, help="of the Gaussian, in timesteps (3.2)")
    flag("--t_std", type=float, default=200, help="of the Gaussian, in timesteps (3.2)")
    flag("--cond_dropout", type=float, default=0.05, help="p: of the samples, 2p lose the context, 2p the condition "
         "latent, p both (Zero-1-to-3's)")  # fmt: skip
    flag(
        "--unconditional",
        action="store_true",
        help="null every condition: pretrains a stand-in for Stable Diffusion",
    )

    flag = parser.add_argument_group("optimisation").add_argument
    flag("--steps", type=int, default=30_000, help="optimiser steps (A.1)")
    flag("--batch_size", type=int, default=48, help="samples a micro-batch and process (A.1)")
    flag(
        "--accumulate",
        type=int,
        default=4,
        help="micro-batches a step (A.1; 48 x 4 x 8 GPUs: 1536 samples)",
    )
    flag("--lr", type=float, default=1e-4, help="base learning rate (A.1)")
    flag("--lr_min", type=float, default=1e-5, help="final learning rate (A.1)")
    flag(
        "--lr_schedule",
        choices=["cosine", "constant"],
        default="cosine",
        help="after warm-up (3.4, A.1)",
    )
    flag("--warmup", type=int, default=200, help="steps of linear warm-up (A.1)")
    flag(
        "--cc_lr",
        type=float,
        default=1,
        help="of --lr, for cc_projection (the paper is silent; Zero-1-to-3: 10)",
    )
    flag("--weight_decay", type=float, default=0.01, help="AdamW's (A.1 says Adam: inferred)")
    flag(
        "--clip",
        type=float,
        default=1.0,
        help="gradient norm's bound (the paper is silent; Zero-1-to-3: inf)",
    )
    flag(
        "--ema",
        type=float,
        default=0.9999,
        help="EMA decay's cap (A.1 has an EMA; Zero-1-to-3's value)",
    )
    flag(
        "--max_skips", type=int, default=10, help="non-finite gradients in a row that stop the run"
    )

    flag = parser.add_argument_group("system").add_argument
    flag(
        "--precision",
        choices=["bf16", "fp16", "fp32"],
        help="default: bf16 on a GPU, else fp32 (3.4: 16 bits)",
    )
    flag(
        "--compile",
        action=toggle,
        default=False,
        help="torch.compile the UNet, and --online what is frozen",
    )
    flag("--deterministic", action="store_true", help="bit-for-bit repeatable on one GPU, slower")
    flag("--device", default="auto", help="auto, cpu or cuda")
    flag("--seed", type=int, default=0, help="of initialisation, data order and noise")

    flag = parser.add_argument_group("logging").add_argument
    flag("--out", required=True, help="run folder: log.jsonl, step_*/, latest, previews/")
    flag("--log_every", type=int, default=50, help="steps between lines of log.jsonl")
    flag("--save_every", type=int, default=1000, help="steps between checkpoints")
    flag("--keep", type=int, default=2, help="newest checkpoints kept")
    flag(
        "--keep_every",
        type=int,
        default=0,
        help="checkpoints at multiples of this stay for good; 0: none",
    )
    flag("--val_every", type=int, default=1000, help="steps between held-out losses; 0: none")
    flag(
        "--val_pairs", type=int, default=256, help="held-out pairs that this loss is averaged over"
    )
    flag("--preview_every", type=int, default=5000, help="steps between sample grids; 0: none")
    args = parser.parse_args()

    positive = "steps batch_size accumulate log_every save_every keep heads width res_blocks t_std lr clip context_dim "
    positive += "image_size encoder_size pixels_factor"
    require_positive(args, *positive.split(), "max_skips", "val_pairs")
    for key in ("lr", "lr_min", "cc_lr", "warmup", "weight_decay", "t_std"):
        if not 0 <= getattr(args, key) < math.inf:
            raise InputError(f"--{key} {getattr(args, key)}: must be finite and not negative")
    if not (args.online or args.archive) or args.online != bool(args.data):
        raise InputError("give --archive, or --online with --data, or all three")
    if not 0 <= args.cond_dropout <= 1 / 3:
        raise InputError(f"--cond_dropout {args.cond_dropout}: between 0 and 1/3")
    if not 0 <= args.ema <= 1:
        raise InputError(f"--ema {args.ema}: between 0 and 1")
    if min(args.channel_mult) < 1:
        raise InputError(f"--channel_mult {args.channel_mult}: whole numbers above 0")
    if strange := set(args.attention) - {
        2**stage for stage in range(max(3, len(args.channel_mult)))
    }:
        raise InputError(
            f"--attention {min(strange)}: no stage is downsampled so; they are by 1, 2, 4, ..."
        )
    if not -5 * args.t_std < args.t_mean < TIMESTEPS + 5 * args.t_std:
        raise InputError(f"--t_mean {args.t_mean}: within 5 --t_std of 0 to {TIMESTEPS}")
    return args


# ------------------------------------------------------------------------------------------------ pure functions


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then half a period of a cosine from lr to lr_min (A.1), of a step counted from 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.lr_schedule == "constant":
        return args.lr
    progress = min(1.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    return args.lr_min + (args.lr - args.lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(step: int, cap: float) -> float:
    """Zero-1-to-3's (LDM's) warm-up of the EMA, counted in optimiser steps from 0: 2/11 at first."""
    return min(cap, (2 + step) / (11 + step))


@torch.no_grad()  # the weights have gradients: a graph of all updates would grow with every step
def update_ema(averaged: list[Tensor], trained: list[Tensor], decay: float) -> None:
    """EMA of all that trains, once an optimiser step (A.1): averaged = decay * averaged + (1 - decay) * trained."""
    # Deviation: A.1 and Zero-1-to-3 average the UNet alone; Zero-1-to-3 counts micro-batches.
    torch._foreach_lerp_(averaged, trained, 1 - decay)


def step_draws(
    seed: int, step: int, global_batch: int, shape: tuple, device: torch.device
) -> tuple[Tensor, ...]:
    """Everything random of an optimiser step, for the whole global batch, from (seed, step).

    (u_t, u_drop, noise, posterior): u (G,) float64 uniform on [0, 1), the others (G, *shape) float32 normal. Drawn on
    the device: CPUs and GPUs draw differently.
    """
    generator = data.seeded(seed, step, device=device)
    uniform = torch.rand(2, global_batch, generator=generator, device=device, dtype=torch.float64)
    normal = torch.randn(2, global_batch, *shape, generator=generator, device=device)
    return *uniform, *normal


def binned(losses: Tensor, t: Tensor) -> Tensor:
    """(2 BINS,) float64: the sum of finite losses (B,) whose timesteps (B,) fall in each bin, and their number."""
    member = F.one_hot(t * BINS // TIMESTEPS, BINS).double() * losses.isfinite()[:, None]
    return torch.cat([losses.double().nan_to_num(0, 0, 0) @ member, member.sum(0)])


def due(done: int, every: int, args) -> bool:
    """Whether something that happens every so many steps happens after `done` of them; at the end it does."""
    return every > 0 and (done % every == 0 or done == args.steps)


# ---------------------------------------------------------------------------------------------- data and the model


def open_data(args, device: torch.device):
    """(training set, held-out set, prepare, frozen): `prepare` turns a set's batch into what the model takes.

    frozen: the specs of encoder and codec and what a checkpoint keeps of them; see checkpoints.save_model.
    """
    if not args.archive:
        encoder, codec = open_frozen(args, device)
        names = data.list_objects(args.data)
        train, val = (
            data.split_objects(names, args.val_fraction, split) for split in ("train", "val")
        )
        train_set = data.ImagePairs(args.data, train, args.image_size, args.seed, args.skip_bad)
        val_set = data.ImagePairs(args.data, val, args.image_size, 0, args.skip_bad)
        frozen = {"encoder": encoder.spec(), "codec": pretrained.codec_spec(codec), "image_size": args.image_size,
                  "val_fraction": args.val_fraction, "tensors": pretrained.own_tensors(encoder)}  # fmt: skip
        frozen["objects"] = list_id(names)
    else:
        train_set = data.Archive(args.archive, "train", args.seed, args.data, args.amalgamate)
        val_set = data.Archive(args.archive, "val", 0, args.data, args.amalgamate)
        frozen = {
            key: train_set.manifest[key]
            for key in ("encoder", "codec", "image_size", "val_fraction")
        }
        frozen["objects"] = list_id(train_set.manifest["objects"])
        if args.online:  # archived latents, features as training goes
            encoder = pretrained.ImageEncoder(
                args.encoder, args.weights, tuple(args.layers), args.encoder_size
            )
            frozen |= {
                "encoder": encoder.to(device).spec(),
                "tensors": pretrained.own_tensors(encoder),
            }
            if args.compile:
                compile_frozen(encoder)
        else:
            file = Path(args.archive) / "frozen.safetensors"
            frozen["tensors"] = pretrained.read_tensors(file) if file.exists() else {}
    if not len(train_set):
        raise InputError(f"{args.archive or args.data}: no training object with two views")

    def prepare(batch: dict) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(target's posterior mean, its log-variance, condition), on the device."""
        if args.online:
            with autocast(device, args.precision):
                cond = batch.pop("cond").to(device, non_blocking=True)
                batch["cls"], batch["patch"] = encoder(cond)
                if not args.archive:
                    target = batch.pop("target").to(device, non_blocking=True)
                    batch["latent"] = codec.encode(cond)[0]
                    batch["target_mean"], batch["target_logvar"] = codec.encode(target)
        move = {
            k: v.to(device, non_blocking=True).float()
            for k, v in batch.items()
            if isinstance(v, Tensor)
        }
        return move.pop("target_mean"), move.pop("target_logvar"), move

    return train_set, val_set, prepare, frozen


def build_model(args, frozen: dict, latent_size: int) -> NovelViewModel:
    """The model that the flags and the frozen encoders' shapes ask for. Raises InputError naming the flag."""
    encoder, channels = frozen["encoder"], frozen["codec"]["channels"]
    if args.amalgamate and not encoder["feature_dim"]:
        raise InputError(
            "--amalgamate: no patch features, --layers is or was empty; --no-amalgamate does without"
        )
    torch.manual_seed(args.seed)
    try:
        model = NovelViewModel(
            cls_dim=encoder["cls_dim"],
            prediction=args.prediction,
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
    if (
        args.unconditional
    ):  # as --init extends Stable Diffusion's: what never sees a condition starts at zero
        torch.nn.init.zeros_(model.unet.input_blocks[0][0].weight[:, channels:])
    return model


@torch.no_grad()
def held_out_loss(
    models: list[NovelViewModel], val_set, prepare, args, scale: float, rank: int, world: int
) -> Tensor:
    """Mean loss (models, BINS) on --val_pairs fixed pairs at the middle timestep of each bin, with fixed noise.

    Uniform over t whatever training samples, so that runs compare. Reads nothing that training draws.
    """
    device = models[0].alpha_bar.device
    total = torch.zeros(len(models), BINS, dtype=torch.float64, device=device)
    mine = list(range(rank, args.val_pairs, world))
    for first in range(0, len(mine), args.batch_size):
        positions = mine[first : first + args.batch_size]
        mean, _, condition = prepare(val_set[positions])
        generators = [data.seeded(0, position) for position in positions]
        for b in range(BINS):
            noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators]).to(
                device
            )
            t = torch.full((len(mean),), (2 * b + 1) * TIMESTEPS // (2 * BINS), device=device)
            for row, model in zip(total, models, strict=True):
                with autocast(device, args.precision):
                    keep = 2 * [t < 0] if args.unconditional else []
                    output = model(
                        q_sample(scale * mean, t, noise, model.alpha_bar), t, condition, *keep
                    )
                row[b] += diffusion_loss(
                    output, scale * mean, noise, t, model.alpha_bar, args.prediction
                ).sum()
    if world > 1:
        dist.all_reduce(total)
    return total / args.val_pairs


def save_preview(path: Path, model: NovelViewModel, codec, val_set, prepare, args) -> None:
    """A grid of held-out pairs: condition | target | the EMA model's sample."""
    mean, _, condition = prepare(val_set[list(range(8))])
    generators = [data.seeded(0, i) for i in range(8)]
    scale = 0.0 if args.unconditional else 3.0
    views = sample.decode(
        sample.ddim(model, [condition], generators, scale=scale, precision=args.precision), codec
    )
    shown = [sample.decode(codec.scale * z, codec) for z in (condition["latent"], mean)]
    rows = [list(row) for row in zip(*shown, views, strict=True)]
    pictures.save_picture(path, pictures.labelled_grid(rows, ["condition", "target", "sample"]))


# ------------------------------------------------------------------------------------------------------------ main


def main() -> None:
    args = parse_args()
    caught = signals.catch_signals()
    device, rank, world = set_up(
        args, "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    )
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch._inductor.config.deterministic = True  # no kernel is chosen by its time
    out = Path(args.out)
    if rank == 0:
        held = durable.lock(out, "--out")  # noqa: F841 (closing it would let go)
        (out / "preempted").unlink(missing_ok=True)

    # data, model, EMA, optimiser
    train_set, val_set, prepare, frozen = open_data(args, device)
    scale = frozen["codec"]["scale"]
    with torch.compiler.set_stance("force_eager"):  # not of training's batch size
        example = prepare(train_set[[0]])
    latent_shape = example[0].shape[1:]
    model = build_model(args, frozen, latent_shape[-1])
    resumed = checkpoints.newest_checkpoint(out)
    if args.init and not resumed:
        pretrained.check_init(model, args.init, frozen["encoder"])
        pretrained.load_pretrained(
            model, pretrained.read_weights(args.init, ("unet", "cc_projection"))
        )
    codec = None
    if rank == 0 and args.preview_every and len(val_set):
        codec = pretrained.open_codec(frozen["codec"], args.vae, " (or --preview_every 0)").to(
            device
        )
    model.to(device, memory_format=torch.channels_last)
    for (
        name,
        p,
    ) in model.named_parameters():  # run as linear layers, their gradients have these strides
        if name.endswith(("proj_in.weight", "proj_out.weight")):
            p.data = p.data.flatten(1)[:, :, None, None]
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    averaged = [
        e for e, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad
    ]
    unet = [p for p in model.unet.parameters() if p.requires_grad]
    groups = [
        {"params": unet, "multiple": 1.0},
        {"params": model.cc_projection.parameters(), "multiple": args.cc_lr},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.999), fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    flops = distributed.flops_per_sample(model, example[2])

    # resume
    start, seconds = 0, 0.0
    window = torch.zeros(
        2 * BINS, dtype=torch.float64, device=device
    )  # losses by timestep since the last log line
    skips = torch.zeros(
        2, dtype=torch.int64, device=device
    )  # non-finite gradients: in a row, in all
    encoders = [frozen["encoder"]["sha256"], frozen["encoder"]["layers"], frozen["codec"]["sha256"]]
    facts = {
        "processes": world,
        "objects": list_id(train_set.names),
        "frozen": [*encoders, frozen["image_size"]],
    }
    facts |= {"encoder_pixels": frozen["encoder"]["image_size"], "held_out": frozen["val_fraction"]}
    if resumed:
        state = checkpoints.restore(resumed, args, facts, rank, model, ema, optimizer, scaler)
        start, seconds = state["step"], state["seconds"]
        skips += (
            state["skips"].clamp(max=torch.tensor([args.max_skips - 1, 2**62])).to(device)
        )  # it may be lower now
        window += state["window"].to(device) if rank == 0 else 0
        del state, resumed
    found = {
        "steps": start,
        "training objects": facts["objects"],
        "held-out objects": list_id(val_set.names),
    }
    found |= {"encoder and codec": facts["frozen"]}
    first = distributed.from_rank_0(
        found, world
    )  # nodes may see different files, or an archive as it grows
    if other := [key for key in found if found[key] != first[key]]:
        numbers = f"{other[0]}: {found[other[0]]}, rank 0 {first[other[0]]}"
        raise InputError(
            f"--out {out}, --archive or --data: rank {rank} finds other {numbers}; is one being written?"
        )
    global_batch = args.batch_size * args.accumulate * world

    if args.compile:
        model.unet.compile(options=COMPILE)  # in place: no _orig_mod in parameter names
    wrapped = model
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(
            model,
            ids,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=256,  # the compiler cuts its graph at each bucket: by default 130 for the paper's model
        )
    positions = data.batch_positions(
        start, args.steps, args.accumulate, args.batch_size, rank, world
    )
    options = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    # torchrun and terminals signal whole process groups: workers, which keep this mask, are still needed for the step
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    batches = iter(torch.utils.data.DataLoader(train_set, None, sampler=positions, **options))
    if args.compile:
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()  # the compiler's processes, too
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
    atexit.register(signals.kill_workers)
    log_path, bad = out / "log.jsonl", []
    bar = tqdm(total=args.steps, initial=start, unit="step", disable=rank > 0)
    if rank == 0:
        durable.trim_log(log_path, start)
        bar.write(
            f"{sum(p.numel() for p in trained) / 1e6:.1f} M parameters train on {len(train_set)} objects, "
            f"{global_batch} samples a step, {flops / 1e9:.1f} GFLOP a sample; steps {start} to {args.steps}"
        )

    def log(record: dict) -> None:
        if rank == 0:
            durable.append(log_path, json.dumps(record) + "\n")

    @torch.compiler.set_stance("force_eager")  # other batch sizes would each be compiled
    def validate(done: int, seconds: float) -> None:
        """Held-out loss and preview where they are due after `done` steps; on resuming, if they are not there."""
        if not len(val_set):
            return
        resuming = done == start
        logged = resuming and agree(rank == 0 and durable.logged(log_path, done, "val_loss"), world)
        if due(done, args.val_every, args) and not logged:
            raw, averages = held_out_loss(
                [model, ema], val_set, prepare, args, scale, rank, world
            ).tolist()
            record = {"step": done, "seconds": round(seconds, 2), "samples": done * global_batch}
            record |= {"val_loss": sum(raw) / BINS, "val_loss_ema": sum(averages) / BINS}
            log(record | {"val_loss_by_t": raw, "val_loss_ema_by_t": averages})
        preview = out / "previews" / f"step_{done:07d}.png"
        if (
            due(done, args.preview_every, args)
            and rank == 0
            and not (resuming and preview.exists())
        ):
            save_preview(preview, ema, codec, val_set, prepare, args)

    if start:
        validate(start, seconds)  # which a kill may have cut short
    mark, marked = start, seconds  # step and seconds of the last log line
    clock = time.perf_counter()
    for step in range(start, args.steps):
        # ------------------------------------------------------------------- one optimiser step: this is the method
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["multiple"]
        draws = step_draws(args.seed, step, global_batch, latent_shape, device)
        for micro in range(args.accumulate):
            first = (micro * world + rank) * args.batch_size
            u_t, u_drop, noise, posterior = (d[first : first + args.batch_size] for d in draws)
            batch = next(batches)
            bad += batch.pop("bad", [])
            mean, logvar, condition = prepare(batch)
            x0 = scale * (
                mean + (0.5 * logvar).exp() * posterior
            )  # a sample of the codec's posterior, scaled
            t = sample_timesteps(u_t, args.t_sampling, args.t_mean, args.t_std)
            keep = condition_dropout(u_drop, args.cond_dropout)
            if args.unconditional:
                keep = (t < 0, t < 0)
            wrapped.require_backward_grad_sync = micro == args.accumulate - 1  # DDP's no_sync
            with autocast(device, args.precision):
                output = wrapped(q_sample(x0, t, noise, model.alpha_bar), t, condition, *keep)
                losses = diffusion_loss(output, x0, noise, t, model.alpha_bar, args.prediction)
            scaler.scale(losses.mean() / args.accumulate).backward()
            window += binned(losses.detach(), t)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        overflow = ~norm.isfinite()
        if not scaler.is_enabled():
            optimizer.found_inf = (
                overflow.float()
            )  # fused AdamW then leaves the weights; nothing waits for the device
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(
            set_to_none=world == 1
        )  # DDP's gradients are views of its buckets, to be kept
        update_ema(averaged, trained, ema_decay(step, args.ema))
        # ---------------------------------------------------------------------------------------------------------
        done = step + 1
        in_a_row = torch.where(
            skips[0] < args.max_skips, (skips[0] + 1) * overflow, skips[0]
        )  # at the bound it stays
        skips = torch.stack([in_a_row, skips[1] + overflow])
        stop = agree(bool(caught), world)
        log_due = due(done, args.log_every, args)
        save_due = due(done, args.save_every, args) or stop
        bar.update()
        if not (
            log_due
            or save_due
            or due(done, args.val_every, args)
            or due(done, args.preview_every, args)
        ):
            continue

        total = window.clone()
        if world > 1:
            dist.all_reduce(total)
        in_a_row, skipped = skips.tolist()  # waits for the device
        if in_a_row >= args.max_skips:
            raise InputError(
                f"{out}: the gradient was not finite {in_a_row} steps in a row, by step {done}"
            )
        if log_due:
            window.zero_()
            sums, counts = total.view(2, BINS).tolist()
            seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            rate = (done - mark) * global_batch / (seconds - marked)
            mark, marked = done, seconds
            record = {"step": done, "seconds": round(seconds, 2), "samples": done * global_batch}
            loss, norm = sum(sums) / max(1, sum(counts)), None if in_a_row else float(norm)
            record |= {
                "loss": loss if any(counts) else None,
                "lr": lr,
                "grad_norm": norm,
                "skipped": skipped,
            }
            record |= {
                "loss_by_t": [s / c if c else None for s, c in zip(sums, counts, strict=True)]
            }
            record |= {
                "samples_per_second": round(rate, 1),
                "tflops": round(rate * flops / 1e12, 3),
            }
            log(record | {"peak_memory_gb": distributed.peak_memory(device)})
            bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, {rate:.0f} samples/s")
            if bad:
                bar.write(f"{len(bad)} unreadable so far, the last: {bad[-1]}")
        seconds += time.perf_counter() - clock  # what follows is no training time
        if (
            save_due and rank == 0
        ):  # first: a held-out image that can't be read takes no training with it
            kept = {
                "args": vars(args) | facts | {"global_batch": global_batch},
                "window": total * (not log_due),
            }
            kept |= {
                "step": done,
                "seconds": seconds,
                "skips": skips,
                "scaler": scaler.state_dict(),
            }
            kept |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save_checkpoint(out, kept, ema, frozen, args)
        if not stop or done == args.steps:  # else the next start does it
            validate(done, seconds)
        clock = time.perf_counter()
        if stop and done < args.steps:
            if rank == 0:
                durable.write_atomically(out / "preempted", Path.touch)
                bar.write(
                    f"stopped by a signal after step {done}; the same command goes on from there"
                )
            break
    bar.close()
    if rank == 0:
        print(
            f"{out}: {done if start < args.steps else start} steps in {seconds:.0f} s of training"
        )
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
