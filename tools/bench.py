"""How fast: our training step beside what one would otherwise use, on the same work, in one process; and the rest.

    python -m tools.bench all --out bench.jsonl                      # small shapes on a CPU, the paper's on a GPU
    python -m tools.bench train --compile default tuned --profile
    python -m tools.bench train --rows ours --micro_batches 64 96 128 --memory_gb 40 --checkpointing
    python -m tools.bench read --workers 0 1 2 4 8 16 --recipes fp16 fp8+pca

Rows of `train`: "ours" is train.py's step on a fixed batch of an archive, "reading" the same through train.py's loader,
"diffusers" the same around diffusers' UNet2DConditionModel (no amalgamation, full cross attention), "zero123" what
Zero-1-to-3 does: float32, eager, checkpointing, two VAE encodes and CLIP in the loop, a per-tensor EMA. Weights are
random and, without --archive and --data, so are the data. One JSON line a result, and a Markdown table.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import re
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import precompute_dino
import pretrained
import sample
import train
from lib import archives
from lib.autoencoder import AutoencoderKL
from lib.cli import HelpFormatter, InputError, one_line, out_of_memory, run_script
from lib.distributed import flops_per_sample, peak_memory, set_up
from model import NovelViewModel, condition_dropout, diffusion_loss, q_sample, sample_timesteps

# The paper's shapes; about the same ratios of UNet, VAE and ViT for one CPU core; and one for tests.
SIZES = {
    "full": dict(width=320, mult=(1, 2, 4, 4), blocks=2, heads=8, context=768, image=256, vae=(128, 2), vit_size=224,
                 vit=pretrained.DINOV2, layers=(5, 11, 17, 23), cls=1024, tokens=256, clip=pretrained.CLIP, pca=1024),
    "small": dict(width=64, mult=(1, 2, 4, 4), blocks=2, heads=4, context=192, image=128, vae=(32, 1), vit_size=96,
                  vit="vit_small_patch16_224", layers=(2, 5, 8, 11), cls=384, tokens=36, pca=384),
    "tiny": dict(width=32, mult=(1, 2), blocks=1, heads=4, context=32, image=32, vae=(32, 1), vit_size=32,
                 vit="vit_tiny_patch16_224", layers=(3, 7), cls=192, tokens=4, pca=64),
}  # fmt: skip
SCALE = AutoencoderKL.scale


def measure(
    call, seconds: float, device: torch.device, skip: int = 1, workers: int = 0
) -> tuple[float, list]:
    """(seconds, what the calls returned) of about `seconds` of calls, behind `skip` that do not count.

    Of one CPU thread without workers these are processor seconds, which other jobs on the machine do not stretch.
    """
    busy = device.type == "cpu" and torch.get_num_threads() == 1 and not workers
    clock = time.process_time if busy else time.perf_counter
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(skip):
        call()
    synchronize()
    start, elapsed, results = clock(), 0.0, []
    while elapsed < seconds or not results:
        results.append(call())
        synchronize()
        elapsed = clock() - start
    return elapsed, results


def matmul_tflops(device: torch.device, precision: str, seconds: float) -> float:
    """The rate of a large matrix product in this precision, which MFU is held against."""
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(
        n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    elapsed, calls = measure(lambda: (a @ a).shape, min(2.0, seconds), device, skip=3)
    return 2 * n**3 * len(calls) / elapsed / 1e12


# ----------------------------------------------------------------------------------------------- networks and archives


class Diffusers(nn.Module):
    """diffusers' UNet of the same shape, called as ours is; patch features, which it can't take, are left out."""

    feature_dim = 0

    def __init__(self, size: dict, plain: bool):
        super().__init__()
        from diffusers import UNet2DConditionModel  # here: only this needs it
        from diffusers.models.attention_processor import AttnProcessor

        kinds = ["CrossAttn" if stage < 3 else "" for stage in range(len(size["mult"]))]
        shape = dict(down_block_types=[f"{kind}DownBlock2D" for kind in kinds])
        shape |= dict(
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            layers_per_block=size["blocks"],
        )
        shape |= dict(
            block_out_channels=[size["width"] * mult for mult in size["mult"]], in_channels=8
        )
        heads = size["heads"]  # which diffusers calls attention_head_dim
        self.unet = UNet2DConditionModel(
            cross_attention_dim=size["context"], attention_head_dim=heads, **shape
        )
        if plain:  # as in LDM's code
            self.unet.enable_gradient_checkpointing()
            self.unet.set_attn_processor(AttnProcessor())

    def forward(self, x, t, context, features=None):
        return self.unet(x, t, context, return_dict=False)[0]


def make_model(
    size: dict, device: torch.device, spec: dict, row: str = "ours", checkpointing=False
) -> NovelViewModel:
    """Our model for an encoder's spec, or our conditioning around diffusers' UNet, with random weights."""
    torch.manual_seed(0)
    args = dict(cls_dim=spec["cls_dim"], in_channels=8, out_channels=4, context_dim=size["context"])
    with device:
        if row in ("ours", "reading"):
            args |= dict(
                model_channels=size["width"],
                channel_mult=size["mult"],
                num_res_blocks=size["blocks"],
            )
            args |= dict(
                feature_dim=spec["feature_dim"],
                feature_tokens=spec["tokens"],
                num_heads=size["heads"],
            )
            model = NovelViewModel(
                **args, latent_size=size["image"] // 8, checkpointing=checkpointing
            )
        else:
            model = NovelViewModel(
                **args, model_channels=32, channel_mult=(1,)
            )  # for its cc_projection
            model.unet = Diffusers(size, row == "zero123")
        for parameter in model.parameters():
            if (
                parameter.ndim > 1 and not parameter.any()
            ):  # zeros draw less power, which would flatter us
                nn.init.normal_(parameter, std=0.02)
    return model if row == "zero123" else model.to(memory_format=torch.channels_last)


def random_frozen(size: dict, device: torch.device, clip: bool = False):
    """(image encoder, VAE) of random weights, otherwise as open_frozen gives them."""
    name, layers = (size.get("clip", size["vit"]), ()) if clip else (size["vit"], size["layers"])
    encoder = pretrained.ImageEncoder(name, "random", layers, size["vit_size"])
    with device:
        codec = AutoencoderKL(size["vae"][0], num_res_blocks=size["vae"][1])
    codec.to(memory_format=torch.contiguous_format if clip else torch.channels_last)
    return encoder.to(device), codec.eval().requires_grad_(False)


@contextlib.contextmanager
def open_archive(args, size: dict, recipe: str):
    """data.Archive over --archive, or over 384 random views in a temporary folder; read once, into the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.archive:
            side, tokens, views = size["image"] // 8, size["tokens"], 32 * 12
            K = {"latents": 0, "fp8+pca": size["pca"]}.get(
                recipe, len(size["layers"]) * size["cls"]
            )
            encoder = dict(name="random", weights="random", layers=[], image_size=size["vit_size"], sha256="",
                           cls_dim=size["cls"], feature_dim=K, tokens=tokens)  # fmt: skip
            codec = dict(name="sd", channels=4, factor=8, scale=SCALE, sha256="", source=None)
            manifest = dict(format=archives.ARCHIVE_FORMAT, image_size=size["image"], val_fraction=0.0, encoder=encoder,
                            codec=codec, objects=[str(i) for i in range(32)])  # fmt: skip
            Path(folder, "manifest.json").write_text(json.dumps(manifest))
            shapes = {
                "latent_mean": (4, side, side),
                "latent_logvar": (4, side, side),
                "cls": (size["cls"],),
            }
            rows = {
                key: torch.randn(views, *s).half()
                for key, s in (shapes | {"patch": (tokens, K)}).items()
            }
            if recipe.startswith("fp8"):
                rows["patch"] = rows["patch"].to(torch.float8_e4m3fn)
            rows |= {
                "alpha": torch.zeros(views, tokens).byte(),
                "pose": torch.eye(3, 4).repeat(views, 1, 1),
                "view": torch.arange(12).repeat(32),
            }
            rows |= {"view_offset": torch.arange(33) * 12}
            archives.save_shard(
                archives.shard_path(folder, 0), {k: v for k, v in rows.items() if v.numel()}
            )
        archive = data.Archive(args.archive or folder, "train")
        archive.rows = archive.rows[:512]
        for shard in set(archive.rows[:, 0].tolist()):
            archives.shard_path(archive.root, shard).read_bytes()
        yield archive


def load(archive: data.Archive, batch_size: int, workers: int, device: torch.device):
    """Batches without end, from the loader that train.py builds."""
    positions, pin = data.batch_positions(0, 10**9, 1, batch_size, 0, 1), device.type == "cuda"
    return iter(
        torch.utils.data.DataLoader(
            archive, None, sampler=positions, num_workers=workers, pin_memory=pin
        )
    )


# ----------------------------------------------------------------------------------------------------- training steps


def zero123_prepare(size: dict, micro: int, device: torch.device):
    """(prepare, FLOPs a sample, CLIP's spec): Zero-1-to-3's frozen encoders on a batch of images, in float32."""
    encoder, codec = random_frozen(size, device, clip=True)
    images, pose = (
        torch.rand(2, micro, 3, size["image"], size["image"]) * 2 - 1,
        torch.randn(micro, 4),
    )

    @torch.no_grad()
    def prepare():
        target, cond = images.to(device)
        mean, logvar = codec.encode(target)
        return (
            mean,
            logvar,
            {"latent": codec.encode(cond)[0], "cls": encoder(cond)[0], "pose": pose.to(device)},
        )

    with FlopCounterMode(display=False) as counter:
        prepare()
    return prepare, counter.get_total_flops() // micro, encoder.spec()


def make_step(
    model: NovelViewModel, prepare, micro: int, accumulate: int, precision: str, plain: bool
):
    """An optimiser step, a function without arguments: train.py's fenced lines or, plain, Zero-1-to-3's."""
    device, ema = model.alpha_bar.device, copy.deepcopy(model).eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    averaged = [
        e for e, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad
    ]
    optimizer = torch.optim.AdamW(
        trained, lr=1e-4, weight_decay=0.01, fused=None if plain else True
    )
    window = torch.zeros(2 * train.BINS, dtype=torch.float64, device=device)
    numbers, shape = itertools.count(), prepare()[0].shape[1:]

    def step() -> None:
        number = next(numbers)
        decay = train.ema_decay(number, 0.9999)
        draws = train.step_draws(0, number, micro * accumulate, shape, device)
        for first in range(0, micro * accumulate, micro):
            u_t, u_drop, noise, posterior = (d[first : first + micro] for d in draws)
            mean, logvar, condition = prepare()
            x0 = SCALE * (mean + (0.5 * logvar).exp() * posterior)
            t = sample_timesteps(u_t, "uniform" if plain else "gaussian")
            keep = condition_dropout(u_drop)
            with pretrained.autocast(device, precision):
                output = model(q_sample(x0, t, noise, model.alpha_bar), t, condition, *keep)
                losses = diffusion_loss(output, x0, noise, t, model.alpha_bar, "eps")
            (losses.mean() / accumulate).backward()
            window.add_(train.binned(losses.detach(), t))
            for e, p in (
                zip(averaged, trained, strict=True) if plain else ()
            ):  # LitEma's, each micro-batch
                e.sub_((1 - decay) * (e - p.detach()))
        if not plain:
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not plain:
            train.update_ema(averaged, trained, decay)

    return step


def train_row(
    args, size: dict, device: torch.device, archive: data.Archive, row: str, mode: str, micro: int
) -> dict:
    """The measurements of one row of `train`."""
    plain, cuda, workers = (
        row == "zero123",
        device.type == "cuda",
        max(args.workers) if row == "reading" else 0,
    )
    precision = "fp32" if plain else args.precision
    # TF32 where train.py has it; for Zero-1-to-3 in convolutions, and in the product: it is the bound of what it could
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = (
        plain or precision != "fp32"
    )
    matmul = matmul_tflops(device, precision, args.seconds)
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    spec, extra = archive.manifest["encoder"], 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    if plain:
        prepare, extra, spec = zero123_prepare(size, micro, device)
    else:
        rows = {
            k: v
            for k, v in archive[list(range(micro))].items()
            if k != "patch" or row != "diffusers"
        }
        rows = {key: value.pin_memory() if cuda else value for key, value in rows.items()}
        batches = (
            load(archive, micro, workers, device) if row == "reading" else itertools.repeat(rows)
        )

        def prepare():
            move = {
                key: value.to(device, non_blocking=True).float()
                for key, value in next(batches).items()
            }
            return move.pop("target_mean"), move.pop("target_logvar"), move

    model = make_model(size, device, spec, row, args.checkpointing).train()
    flops = flops_per_sample(model, prepare()[2]) + extra
    # A.1's 1,536 samples; Zero-1-to-3's step is long, and its optimiser a trifle of it
    accumulate = args.accumulate or max(
        1, min(1536 // micro if args.size == "full" else 2, 4 if plain else 1536)
    )
    step = make_step(model, prepare, micro, accumulate, precision, plain)
    if mode != "off":
        model.unet.compile(**{"options": train.COMPILE} if mode == "tuned" else {"mode": mode})
    start = time.perf_counter()
    measure(step, 0, device, skip=0)
    first = time.perf_counter() - start
    elapsed, calls = measure(step, args.seconds, device, workers=workers)
    samples = len(calls) * accumulate * micro
    rate, compiling = samples / elapsed, first - elapsed / len(calls) if mode != "off" else 0.0
    record = {
        "precision": precision,
        "accumulate": accumulate,
        "samples": samples,
        "seconds": elapsed,
    }
    record |= {
        "samples_per_second": rate,
        "gflop_per_sample": flops / 1e9,
        "tflops": rate * flops / 1e12,
    }
    record |= {
        "matmul_tflops": matmul,
        "mfu": rate * flops / 1e12 / matmul,
        "compile_seconds": compiling,
    }
    record |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "feature_dim": spec["feature_dim"],
    }
    record |= {"memory_gb": peak_memory(device) if cuda else None}
    return record | ({"profile_ms": profile(step, device)} if args.profile else {})


KERNELS = {  # classes of GPU kernels and CPU operators by name; the first that matches counts
    "optimiser, EMA": "multi_tensor|foreach|fused_adam",
    "copies": r"triton_poi_fused(_+(to_copy|clone|copy|permute|transpose|view|cat))+_\d|mem(cpy|set)|nchwto|nhwcto|"
    "catarr|direct_copy|aten::(copy_|clone|contiguous|cat$|fill_|zero_)",
    "norm+pointwise": "triton_|elementwise|norm|reduce|aten::(gelu|silu|add_?$|mul|sub|div|sum|mean|var|rsqrt|exp)",
    "attention": "flash|fmha|sdpa|attention|softmax",
    "convolution": "conv|wgrad|dgrad|fprop",
    "gemm": "gemm|cutlass|cublas|nvjet|aten::(addmm|mm|bmm)",
}


def kernel_class(name: str) -> str:
    return next(
        (kind for kind, pattern in KERNELS.items() if re.search(pattern, name.lower())), "other"
    )


def profile(step, device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by class: of kernels on a GPU, of operators (without what they call) on a CPU."""
    kinds, cuda = torch.profiler.ProfilerActivity, device.type == "cuda"
    with torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if cuda else [kinds.CPU]
    ) as profiler:
        measure(step, 0, device, skip=0)
    result = dict.fromkeys((*KERNELS, "other"), 0.0)
    for event in profiler.key_averages():
        if (
            event.device_type == torch.autograd.DeviceType.CUDA
        ) == cuda and not event.is_user_annotation:
            spent = (
                event.self_device_time_total if cuda else event.self_cpu_time_total
            )  # in microseconds
            result[kernel_class(event.key)] += spent / 1e3
    return result


# --------------------------------------------------------------------------------------------------------- benchmarks


def bench_train(args, size: dict, device: torch.device):
    """Samples/s of an optimiser step, by micro-batch, row and compile mode; ratio: how many times faster ours is."""
    rows = [
        (row, mode) for row in args.rows for mode in (["off"] if row == "zero123" else args.compile)
    ]
    with open_archive(args, size, args.recipes[0]) as archive:
        latent, expected = (
            archive.shapes["latent_mean"],
            (4, size["image"] // 8, size["image"] // 8),
        )
        if latent != expected:
            raise InputError(
                f"--archive {args.archive}: latents of {latent}; --size {args.size} has {expected}"
            )
        for micro in args.micro_batches:
            ours = None
            for row, mode in rows:
                record = {"micro_batch": micro, "row": row, "compile": mode, "status": "ok"}
                try:
                    record |= train_row(args, size, device, archive, row, mode, micro)
                    ours = max(ours or 0, record["samples_per_second"]) if row == "ours" else ours
                    record["ratio"] = ours and ours / record["samples_per_second"]
                except ImportError as error:
                    record["status"] = f"not run: {error}"
                except RuntimeError as error:
                    if out_of_memory(error):
                        record["status"] = "out of memory"
                    elif mode in (
                        "reduce-overhead",
                        "max-autotune",
                    ):  # CUDA graphs refuse to accumulate gradients
                        record["status"] = f"failed: {one_line(error)}"
                    else:
                        raise
                gc.collect()
                torch._dynamo.reset()
                torch.cuda.empty_cache()  # does nothing on a CPU
                yield record


def bench_sample(args, size: dict, device: torch.device):
    """Seconds for 12 views of one image, encoders included: all at once, and by stochastic conditioning."""
    encoder, codec = random_frozen(size, device)
    model = make_model(size, device, encoder.spec()).eval()
    image, views = torch.rand(3, size["image"], size["image"]) * 2 - 1, 12
    poses = sample.camera_moves([360 * i / views for i in range(views)], [0.0], [0.0])
    for row in ("independent", "stochastic conditioning"):
        flags = SimpleNamespace(stochastic_conditioning=row != "independent", batch_size=16, seed=0, shared_noise=False,
                                steps=1, eta=1.0, scale=3.0, precision=args.precision, sampler="ddim")  # fmt: skip
        sample.sample_views(image, poses, model, encoder, codec, flags)  # warms up
        flags.steps = args.steps
        seconds, _ = measure(
            lambda f=flags: sample.sample_views(image, poses, model, encoder, codec, f),
            0,
            device,
            0,
        )
        yield {"row": row, "views": views, "steps": args.steps, "scale": 3.0, "seconds": seconds}


def rated(record: dict, unit: str, elapsed: float, counts: list[int]) -> dict:
    return record | {
        "seconds": elapsed,
        unit: sum(counts),
        f"{unit}_per_second": sum(counts) / elapsed,
    }


def bench_read(args, size: dict, device: torch.device):
    """Samples/s of train.py's loader from the page cache, by what the archive holds and the number of workers."""
    for recipe in ["as given"] if args.archive else args.recipes:
        with open_archive(args, size, recipe) as archive:
            size_of = sum(value.nbytes for value in archive[[0]].values())
            for workers in args.workers:
                batches = load(archive, args.micro_batches[0], workers, device)
                read = measure(
                    lambda b=batches: len(next(b)["cls"]),
                    args.seconds,
                    device,
                    2 * workers + 1,
                    workers,
                )
                yield rated(
                    {"recipe": recipe, "bytes_per_sample": size_of, "workers": workers},
                    "samples",
                    *read,
                )


def bench_archive(args, size: dict, device: torch.device):
    """Views/s of archiving: decoding in workers, the encoders alone, and both together; nothing is written."""
    encoder, codec = random_frozen(size, device)
    with tempfile.TemporaryDirectory() as folder:
        flags = SimpleNamespace(data=args.data or f"{folder}/tree", skip_bad=False, image_size=size["image"], workers=0,
                                batch_size=64, precision=args.precision, patch_dtype="fp8")  # fmt: skip
        if not args.data:
            from tools.shapes import shapes  # here: few need the renderer

            shapes(
                Path(flags.data), 8, 4, 2 * size["image"], 0, device.type, 0
            )  # Objaverse's are 512 px, too
        members = dict.fromkeys(range(10_000), (2 * data.list_objects(flags.data))[:64])

        how, cuda = (encoder, codec, flags, device), device.type == "cuda"
        fixed = next(iter(precompute_dino.ViewLoader(members, flags)))

        def encode() -> int:
            return len(precompute_dino.encode_views(fixed, *how)["object"])

        for compiled in sorted({mode != "off" for mode in args.compile}):
            if compiled:
                pretrained.compile_frozen(encoder, codec)
            mode = {"compile": "default" if compiled else "off"}
            yield rated({"row": "encode"} | mode, "views", *measure(encode, args.seconds, device))
        for row in ("decode", "decode, encode"):
            for n in args.workers:
                flags.workers = n
                batches = precompute_dino.ViewLoader(members, flags)
                batches = (
                    batches if row == "decode" else precompute_dino.encode_ahead(batches, *how)
                )
                take = map(lambda batch: len(batch["object"]), batches).__next__
                # rows have arrived, while the GPU is at the next: it is not waited for
                done = measure(take, args.seconds, torch.device("cpu"), 2 * n + 1, n or cuda)
                yield rated(
                    {"row": row, "workers": n} | ({} if row == "decode" else mode), "views", *done
                )


COLUMNS = {  # of the Markdown tables: key, format
    "train": {"micro_batch": "", "row": "", "compile": "", "samples_per_second": ".1f", "ratio": ".2f", "tflops": ".3f",
              "mfu": ".1%", "memory_gb": ".1f", "compile_seconds": ".0f", "status": ""},
    "sample": {"row": "", "views": "", "steps": "", "scale": "", "seconds": ".1f"},
    "read": {"recipe": "", "bytes_per_sample": ",", "workers": "", "samples_per_second": ".0f"},
    "archive": {"row": "", "compile": "", "workers": "", "views_per_second": ".1f"},
}  # fmt: skip


def table(columns: dict[str, str], records: list[dict]) -> str:
    """Markdown."""
    cells = [
        [format(r[k], f) if r.get(k) is not None else "-" for k, f in columns.items()]
        for r in records
    ]
    lines = [[key.replace("_", " ") for key in columns], ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    flag, rows = parser.add_argument, ["ours", "reading", "diffusers", "zero123"]
    modes = [
        "off",
        "tuned",
        "default",
        "reduce-overhead",
        "max-autotune",
        "max-autotune-no-cudagraphs",
    ]
    flag("bench", choices=[*COLUMNS, "all"], help="what to measure")
    flag("--size", choices=SIZES, help="shapes; default: full (the paper's) on a GPU, else small")
    flag("--device", default="auto", help="auto, cpu or cuda")
    flag("--precision", choices=["bf16", "fp32"], help="default: bf16 on a GPU, else fp32")
    flag(
        "--micro_batches",
        type=int,
        nargs="+",
        help="train, read; default: 48 96 192 on a GPU, else 4 8",
    )
    flag(
        "--accumulate",
        type=int,
        help="train: micro-batches a step; default: 1536 samples' worth, 2 where not full",
    )
    flag("--rows", nargs="+", choices=rows, default=rows, help="train: what to compare")
    flag("--compile", nargs="+", choices=modes, help="train: tuned is train.py's, others torch.compile's; archive: off "
         "or not; default: off, default and tuned on a GPU, else off")  # fmt: skip
    flag("--checkpointing", action="store_true", help="train: recompute our blocks in backward")
    flag("--memory_gb", type=float, help="use no more of the GPU's memory than a smaller one has")
    flag("--profile", action="store_true", help="train: a table of time by class of kernel")
    flag("--recipes", nargs="+", choices=["fp8+pca", "fp8", "fp16", "latents"], default=["fp8+pca", "fp16"],
         help="what the made-up archive holds; train takes the first")  # fmt: skip
    flag("--archive", help="train, read: a real archive of these shapes")
    flag("--data", help="archive: a real tree of renders")
    flag(
        "--workers",
        type=int,
        nargs="+",
        default=[0, 1, 2, 4],
        help="data workers; train takes the most",
    )
    flag("--steps", type=int, default=50, help="sample: DDIM steps")
    flag("--seconds", type=float, default=5, help="to measure each result for")
    flag("--out", help="JSON lines, appended to")
    args = parser.parse_args()
    for name, least in {
        "micro_batches": 1,
        "accumulate": 1,
        "memory_gb": 0,
        "workers": 0,
        "seconds": 0,
    }.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not value >= least:  # NaN is not
                raise InputError(f"--{name} {value}: at least {least}")
    sample.ddim_timesteps(args.steps)  # raises InputError
    if args.data:
        data.list_objects(args.data)  # so does this
    if args.out:
        try:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            open(args.out, "a").close()
        except OSError as error:
            raise InputError(f"--out {args.out}: could not be written ({error.strerror})") from None

    device, _, _ = set_up(args)
    cuda = device.type == "cuda"
    name = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread(s)"
    args.size = args.size or ("full" if cuda else "small")
    args.micro_batches = args.micro_batches or ([48, 96, 192] if cuda else [4, 8])
    args.compile = args.compile or (["off", "default", "tuned"] if cuda else ["off"])
    if cuda:
        name, total = (
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_properties(device).total_memory,
        )
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, 1e9 * args.memory_gb / total) if args.memory_gb else 1.0
        )
    common = {
        "device": name,
        "torch": torch.__version__,
        "precision": args.precision,
        "size": args.size,
    }
    common |= {
        "shapes": SIZES[args.size],
        "checkpointing": args.checkpointing,
        "memory_limit_gb": args.memory_gb,
    }
    benches = {
        "train": bench_train,
        "sample": bench_sample,
        "read": bench_read,
        "archive": bench_archive,
    }
    for bench in benches if args.bench == "all" else [args.bench]:
        records = []
        for record in benches[bench](args, SIZES[args.size], device):
            records.append({"bench": bench} | common | record)
            print(table(COLUMNS[bench], [record]).splitlines()[-1], flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
        print(
            f"\n{bench}: {name}, torch {torch.__version__}, {args.size}\n\n{table(COLUMNS[bench], records)}\n"
        )
        if profiles := [
            record | record["profile_ms"] for record in records if "profile_ms" in record
        ]:
            columns = dict.fromkeys(("micro_batch", "row", "compile"), "") | dict.fromkeys(
                (*KERNELS, "other"), ".1f"
            )
            print(f"milliseconds of an optimiser step\n\n{table(columns, profiles)}\n")


if __name__ == "__main__":
    run_script(main)
