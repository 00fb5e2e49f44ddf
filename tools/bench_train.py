"""The benchmark `train` of tools.bench, and what the other benchmarks share with it.

Our rows run train.py itself: its main() is given a model, batches and a clock, and stops when it
asks for one batch too many. So what is measured is the step that trains.
"""

import contextlib
import gc
import io
import itertools
import sys
import tempfile
import time
from unittest import mock

import torch

import data
import train
from lib.archives import ARCHIVE_FORMAT, save_manifest, save_shard, shard_path
from lib.autoencoder import AutoencoderKL
from lib.cli import InputError, one_line, out_of_memory
from lib.distributed import flops_per_sample, peak_memory
from tools.rivals import COMPILERS, VARIANTS, DiffusersUNet, Size, Zero123Step, fill_zeros

ROWS = ("ours", "reading", "diffusers", "zero123")
RECIPES = ("fp8+pca", "fp8", "fp16", "latents")  # what the made-up archive holds


# ------------------------------------------------------------------------------------------- clocks


def stopwatch(device: torch.device, workers: int = 0):
    """A function that waits for the device and returns seconds.

    Where one CPU thread works alone they are processor seconds.
    """
    if device.type == "cuda":

        def now() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return now
    alone = torch.get_num_threads() == 1 and workers == 0
    return time.process_time if alone else time.perf_counter


def measure(call, seconds: float, now, warm_up: int = 1) -> tuple[float, list]:
    """(seconds, what the calls returned) of calls that take about `seconds`, after a warm-up."""
    for _ in range(warm_up):
        call()
    start = now()
    elapsed = 0.0
    results = []
    while elapsed < seconds or not results:
        results.append(call())
        elapsed = now() - start
    return elapsed, results


def matmul_tflops(device: torch.device, precision: str, seconds: float) -> float:
    """The rate of a large matrix product in this precision, which MFU is a share of."""
    n = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    elapsed, calls = measure(lambda: (a @ a).shape, min(2.0, seconds), stopwatch(device), warm_up=3)
    return 2 * n**3 * len(calls) / elapsed / 1e12


class Enough(Exception):
    """Ends a measured run of train.py, where it asks for its next batch."""


def time_steps(batches, accumulate: int, seconds: float, now, record: dict, profile: bool):
    """Yields train.py's batches, and takes the time between optimiser steps.

    It fills the record: of the first step, which compiles, and of about `seconds` of whole steps
    after it. Then it raises Enough.
    """
    start = now()
    yield from itertools.islice(batches, accumulate)
    record["first_step_seconds"] = now() - start
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = now()
    steps, elapsed = 0, 0.0
    while elapsed < seconds or not steps:
        yield from itertools.islice(batches, accumulate)
        elapsed = now() - start
        steps += 1
    record["seconds"] = elapsed
    record["steps"] = steps
    if profile:
        with profiler() as profiled:
            yield from itertools.islice(batches, accumulate)
            now()
        record["profile"] = kernel_table(profiled)
    raise Enough


def profiler():
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def kernel_table(profiled) -> str:
    """Where an optimiser step's time went, by kernel on a GPU, by operator on a CPU."""
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiled.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=80)


# ------------------------------------------------------------------------------------------ archive


@contextlib.contextmanager
def open_archive(args, size: Size, recipe: str):
    """The path of --archive, or of an archive of 384 random views in a temporary folder."""
    if args.archive:
        yield args.archive
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random_archive(folder, size, recipe)
        yield folder


def write_random_archive(folder: str, size: Size, recipe: str) -> None:
    """An archive of 32 objects of 12 views, as precompute_dino.py writes it."""
    objects, views = 32, 12
    channels = {"latents": 0, "fp8+pca": size.pca}.get(recipe, len(size.layers) * size.cls)
    encoder = {
        "name": "random",
        "weights": "made up",
        "layers": list(size.layers),
        "image_size": size.vit_size,
        "sha256": "",
        "cls_dim": size.cls,
        "feature_dim": channels,
        "tokens": size.tokens,
    }
    codec = {
        "name": "sd",
        "channels": 4,
        "factor": 8,
        "scale": AutoencoderKL.scale,
        "sha256": "",
        "source": None,
    }
    manifest = {
        "format": ARCHIVE_FORMAT,
        "image_size": size.image,
        "val_fraction": 0.0,
        "objects": [str(i) for i in range(objects)],
        "encoder": encoder,
        "codec": codec,
    }
    save_manifest(folder, manifest)
    rows = objects * views
    side = size.image // 8
    tensors = {
        "latent_mean": torch.randn(rows, 4, side, side).half(),
        "latent_logvar": torch.randn(rows, 4, side, side).half(),
        "cls": torch.randn(rows, size.cls).half(),
        "alpha": torch.zeros(rows, size.tokens, dtype=torch.uint8),
        "pose": torch.eye(3, 4).repeat(rows, 1, 1),
        "view": torch.arange(views).repeat(objects),
        "view_offset": torch.arange(objects + 1) * views,
    }
    if channels:
        patch = torch.randn(rows, size.tokens, channels).half()
        tensors["patch"] = patch.to(torch.float8_e4m3fn) if recipe.startswith("fp8") else patch
    save_shard(shard_path(folder, 0), tensors)


def keep_in_page_cache(archive: data.Archive) -> None:
    """Cuts an archive to its first 512 objects, and reads them once."""
    archive.rows = archive.rows[:512]
    for shard in set(archive.rows[:, 0].tolist()):
        shard_path(archive.root, shard).read_bytes()


# ----------------------------------------------------------------------------------- training steps


def train_flags(args, size: Size, archive: str, out: str, settings: dict) -> list[str]:
    """train.py's flags for a row. It neither saves, nor logs, nor validates."""
    never = 10**9
    flags = {
        "--archive": archive,
        "--out": out,
        "--width": size.width,
        "--res_blocks": size.blocks,
        "--heads": size.heads,
        "--context_dim": size.context,
        "--batch_size": settings["micro_batch"],
        "--accumulate": settings["accumulate"],
        "--workers": max(args.workers) if settings["row"] == "reading" else 0,
        "--precision": args.precision,
        "--device": args.device,
        "--steps": never,
        "--log_every": never,
        "--save_every": never,
        "--val_every": 0,
        "--preview_every": 0,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    words += ["--channel_mult", *map(str, size.mult)]
    if settings["row"] == "diffusers":
        words.append("--no-amalgamate")
    if settings["compile"] != "off":
        words.append("--compile")
    if args.checkpointing:
        words.append("--checkpointing")
    if args.deterministic:
        words.append("--deterministic")
    return words


def run_train(flags: list[str], build_model, start_loader, compile_module=None) -> None:
    """Runs train.main until its batches raise Enough.

    So what is measured is train.py's own step. build_model and start_loader stand in for the
    functions of these names in train.py, compile_module for its compile_in_place.
    """
    replaced = {
        "build_model": build_model,
        "start_loader": start_loader,
        "compile_in_place": compile_module,
        "catch_signals": list,  # none is caught, so that Ctrl-C ends the benchmark
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(train, **replaced))
        stack.enter_context(mock.patch.object(sys, "argv", ["train.py", *flags]))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.suppress(Enough))
        train.main()


def measure_train(args, size: Size, device: torch.device, archive: str, settings: dict) -> dict:
    """A row that train.py runs: "ours", "reading" or "diffusers"."""
    row = settings["row"]
    record = {}
    original = {"build_model": train.build_model, "start_loader": train.start_loader}
    context = contextlib.ExitStack()

    def build_model(train_args, frozen, latent_size):
        with device:  # initialising a large model on the CPU takes longer than measuring it
            model = original["build_model"](train_args, frozen, latent_size)
            if row == "diffusers":
                model.unet = DiffusersUNet(size)
        fill_zeros(model)
        context.enter_context(VARIANTS[settings["variant"]](model))
        record["parameters"] = sum(p.numel() for p in model.parameters())
        record["feature_dim"] = model.unet.feature_dim
        record["flops"] = flops_per_sample(model, example_condition(size, frozen["encoder"]))
        return model

    def start_loader(train_set, *others):
        keep_in_page_cache(train_set)
        if row == "reading":
            batches = original["start_loader"](train_set, *others)
        else:
            batch = train_set[list(range(settings["micro_batch"]))]
            if device.type == "cuda":
                batch = {key: value.pin_memory() for key, value in batch.items()}
            batches = itertools.repeat(batch)
        now = stopwatch(device, max(args.workers) if row == "reading" else 0)
        return time_steps(batches, settings["accumulate"], args.seconds, now, record, args.profile)

    with context, tempfile.TemporaryDirectory() as out:
        flags = train_flags(args, size, archive, out, settings)
        run_train(flags, build_model, start_loader, COMPILERS.get(settings["compile"]))
        record["memory_gb"] = peak_memory(device) if device.type == "cuda" else None
    return record


def example_condition(size: Size, encoder: dict) -> dict:
    """A condition of one sample, whose shapes count FLOPs."""
    side = size.image // 8
    return {
        "latent": torch.zeros(1, 4, side, side),
        "cls": torch.zeros(1, encoder["cls_dim"]),
        "pose": torch.zeros(1, 4),
        "patch": torch.zeros(1, encoder["tokens"], encoder["feature_dim"]),
    }


def measure_zero123(args, size: Size, device: torch.device, settings: dict) -> dict:
    """The row "zero123"."""
    # As PyTorch does by default: TF32 in convolutions, and not in matrix products.
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False
    step = Zero123Step(size, settings["micro_batch"], settings["accumulate"], device)
    flops = step.flops_per_sample()
    if settings["compile"] != "off":
        COMPILERS[settings["compile"]](step.model.unet)
    now = stopwatch(device)
    first, _ = measure(step, 0, now, warm_up=0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, calls = measure(step, args.seconds, now, warm_up=0)
    record = {
        "first_step_seconds": first,
        "seconds": seconds,
        "steps": len(calls),
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "feature_dim": 0,
        "flops": flops,
        "memory_gb": peak_memory(device) if device.type == "cuda" else None,
    }
    if args.profile:
        with profiler() as profiled:
            step()
            now()
        record["profile"] = kernel_table(profiled)
    return record


def train_row(args, size: Size, device: torch.device, archive: str, settings: dict) -> dict:
    """The measurements of one row of `train`, and what follows from them."""
    rival = settings["row"] == "zero123"
    precision = "fp32" if rival else args.precision
    # MFU's bound is a product in TF32, where convolutions may use it.
    torch.backends.cuda.matmul.allow_tf32 = rival or precision != "fp32"
    matmul = matmul_tflops(device, precision, args.seconds)
    if rival:
        measured = measure_zero123(args, size, device, settings)
    else:
        measured = measure_train(args, size, device, archive, settings)
    flops = measured.pop("flops")
    steps = measured.pop("steps")
    first = measured.pop("first_step_seconds")
    samples = steps * settings["accumulate"] * settings["micro_batch"]
    rate = samples / measured["seconds"]
    compile_seconds = 0.0
    if settings["compile"] != "off":
        compile_seconds = first - measured["seconds"] / steps
    return {
        **measured,
        "precision": precision,
        "samples": samples,
        "samples_per_second": rate,
        "gflop_per_sample": flops / 1e9,
        "tflops": rate * flops / 1e12,
        "matmul_tflops": matmul,
        "mfu": rate * flops / 1e12 / matmul,
        "compile_seconds": compile_seconds,
    }


def micro_batches_a_step(args, micro: int, row: str) -> int:
    """As many as make A.1's 1,536 samples at the paper's shapes, otherwise 2.

    Zero-1-to-3's step is long, and its optimiser a small part of it: 4 are enough.
    """
    if args.accumulate:
        return args.accumulate
    if args.size != "full":
        return 2
    count = max(1, 1536 // micro)
    return min(count, 4) if row == "zero123" else count


def try_row(args, size: Size, device: torch.device, archive: str, settings: dict) -> dict:
    """`train_row`, or the reason why there is none: {"status": ...}."""
    try:
        return {"status": "ok", **train_row(args, size, device, archive, settings)}
    except ImportError as error:
        return {"status": f"not run: {error}"}
    except RuntimeError as error:
        if out_of_memory(error):
            return {"status": "out of memory"}
        if settings["compile"] in ("reduce-overhead", "max-autotune"):
            # CUDA graphs refuse to accumulate gradients.
            return {"status": f"failed: {one_line(error)}"}
        raise
    finally:
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()  # does nothing on a CPU


def train_settings(args) -> list[dict]:
    """The rows of one repetition, for each micro-batch."""
    settings = []
    for micro, row, mode in itertools.product(args.micro_batches, args.rows, args.compile):
        for variant in args.variants if row == "ours" else ["plain"]:
            settings.append(
                {
                    "micro_batch": micro,
                    "row": row,
                    "variant": variant,
                    "compile": mode,
                    "accumulate": micro_batches_a_step(args, micro, row),
                }
            )
    return settings


def bench_train(args, size: Size, device: torch.device):
    """Samples/s of an optimiser step. ratio: how many times faster our fastest row is."""
    with open_archive(args, size, args.recipes[0]) as archive:
        check_latents(args, size, archive)
        for repetition in range(args.repeat):
            fastest = {}  # of our rows so far, by micro-batch
            too_large = set()  # rows that ran out of memory at a smaller micro-batch
            for settings in train_settings(args):
                micro = settings["micro_batch"]
                row = (settings["row"], settings["variant"], settings["compile"])
                if row in too_large:
                    result = {"status": "out of memory, like a smaller micro-batch"}
                else:
                    result = try_row(args, size, device, archive, settings)
                if result["status"].startswith("out of memory"):
                    too_large.add(row)
                rate = result.get("samples_per_second")
                if rate and settings["row"] == "ours":
                    fastest[micro] = max(rate, fastest.get(micro, 0))
                ratio = fastest[micro] / rate if rate and micro in fastest else None
                yield {"repetition": repetition, **settings, **result, "ratio": ratio}


def check_latents(args, size: Size, archive: str) -> None:
    """Raises InputError where --archive has latents of another shape than --size."""
    found = data.Archive(archive, "train").shapes["latent_mean"]
    expected = (4, size.image // 8, size.image // 8)
    if tuple(found) != expected:
        raise InputError(
            f"--archive {archive}: latents of {found}; --size {args.size} has {expected}"
        )
