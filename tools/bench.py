"""How fast: our training step beside others, and archiving, reading, sampling.

    python -m tools.bench all --out bench.jsonl        # small shapes on a CPU, the paper's on a GPU
    python -m tools.bench train --compile default --profile
    python -m tools.bench train --rows ours --variants plain "NCHW GroupNorm" --compile default
    python -m tools.bench train --rows ours --micro_batches 64 96 128 --memory_gb 40 --checkpointing
    python -m tools.bench read --workers 0 1 2 4 8 16 --recipes fp16 fp8+pca
    OMP_NUM_THREADS=1 python -m tools.bench train --micro_batches 8 --rows ours diffusers zero123 \
        --compile off default --repeat 5                               # medians of 5 repetitions
    python -m tools.bench startup --repeat 5

Rows of `train`:
    ours        train.py itself, on one batch that stays in memory
    reading     train.py itself, reading an archive
    diffusers   train.py itself, around diffusers' UNet (no amalgamation, all of cross attention)
    zero123     what Zero-1-to-3 does: float32, checkpointed, two VAE encodes and CLIP inside the
                step, an EMA tensor by tensor; it is eager there, so with --compile off
Weights are random and, without --archive and --data, so are the data. The results are lines of JSON
and a Markdown table. On one CPU thread, times are processor seconds, as if no other job ran.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import precompute_dino
import pretrained
import sample
import train
from lib.cli import (
    ArgumentParser,
    nonnegative_float,
    nonnegative_int,
    positive_finite_float,
    positive_int,
    run_script,
)
from lib.distributed import open_device
from lib.files import append, check_writable
from model import NovelViewModel
from tools.bench_train import (
    RECIPES,
    ROWS,
    bench_train,
    keep_in_page_cache,
    measure,
    open_archive,
    stopwatch,
    train_flags,
)
from tools.rivals import COMPILERS, SIZES, VARIANTS, Size, fill_zeros, random_frozen
from tools.shapes import shapes

ROOT = Path(__file__).parents[1]
COLUMNS = {  # of the Markdown tables: key, format
    "train": {
        "micro_batch": "",
        "row": "",
        "variant": "",
        "compile": "",
        "samples_per_second": ".1f",
        "ratio": ".2f",
        "tflops": ".3f",
        "mfu": ".1%",
        "memory_gb": ".1f",
        "compile_seconds": ".0f",
        "status": "",
    },
    "sample": {"row": "", "views": "", "steps": "", "scale": "", "seconds": ".1f"},
    "read": {"recipe": "", "bytes_per_sample": ",", "workers": "", "samples_per_second": ".0f"},
    "archive": {"row": "", "compile": "", "workers": "", "views_per_second": ".1f"},
    "startup": {"row": "", "seconds": ".2f", "cpu_seconds": ".2f"},
}
SCRIPTS = ("train", "sample", "evaluate", "visualize", "precompute_dino")


# ------------------------------------------------------------------- sampling, reading, archiving


def random_model(size: Size, device: torch.device, encoder: dict) -> NovelViewModel:
    """Our model with random weights, for an encoder's spec."""
    torch.manual_seed(0)
    with device:
        model = NovelViewModel(
            cls_dim=encoder["cls_dim"],
            model_channels=size.width,
            channel_mult=size.mult,
            num_res_blocks=size.blocks,
            num_heads=size.heads,
            context_dim=size.context,
            feature_dim=encoder["feature_dim"],
            feature_tokens=encoder["tokens"],
            latent_size=size.image // 8,
        )
    fill_zeros(model)
    return model.to(memory_format=torch.channels_last)


def bench_sample(args, size: Size, device: torch.device):
    """Seconds for 12 views of one image, encoders included."""
    encoder, codec = random_frozen(size, device)
    model = random_model(size, device, encoder.spec()).eval()
    image = torch.rand(3, size.image, size.image) * 2 - 1
    views = 12
    azimuths = [360 * i / views for i in range(views)]
    moves = sample.camera_moves(azimuths, [0.0], [0.0])

    def seconds_of(steps: int, stochastic: bool) -> float:
        settings = {"steps": steps, "scale": 3.0, "precision": args.precision}

        def draw():
            return sample.sample_views(
                image,
                moves,
                model,
                encoder,
                codec,
                settings,
                stochastic_conditioning=stochastic,
            )

        return measure(draw, 0, stopwatch(device), warm_up=0)[0]

    for row in ("independent", "stochastic conditioning"):
        stochastic = row == "stochastic conditioning"
        seconds_of(1, stochastic)  # warms up
        seconds = seconds_of(args.steps, stochastic)
        yield {"row": row, "views": views, "steps": args.steps, "scale": 3.0, "seconds": seconds}


def rate_of(unit: str, elapsed: float, counts: list[int]) -> dict:
    total = sum(counts)
    return {"seconds": elapsed, unit: total, f"{unit}_per_second": total / elapsed}


def bench_read(args, size: Size, device: torch.device):
    """Samples/s of train.py's loader from the page cache, by what the archive holds and workers."""
    recipes = ["as given"] if args.archive else args.recipes
    for recipe in recipes:
        with open_archive(args, size, recipe) as root:
            archive = data.Archive(root, "train")
            keep_in_page_cache(archive)
            bytes_per_sample = sum(value.nbytes for value in archive[[0]].values())
            for workers in args.workers:
                batches = load_batches(archive, args.micro_batches[0], workers, device)

                def read(batches=batches) -> int:
                    return len(next(batches)["cls"])

                now = stopwatch(device, workers)
                elapsed, counts = measure(read, args.seconds, now, warm_up=2 * workers + 1)
                yield {
                    "recipe": recipe,
                    "bytes_per_sample": bytes_per_sample,
                    "workers": workers,
                    **rate_of("samples", elapsed, counts),
                }


def load_batches(archive: data.Archive, batch_size: int, workers: int, device: torch.device):
    """Batches from train.py's loader, without end."""
    args = SimpleNamespace(steps=10**9, batch_size=batch_size, workers=workers)
    state = SimpleNamespace(step=0, accumulate=1)
    return train.start_loader(archive, args, state, (0, 1), device)


def bench_archive(args, size: Size, device: torch.device):
    """Views/s of archiving: decoding in workers, the encoders alone, both. Nothing is written."""
    encoder, codec = random_frozen(size, device)
    with tempfile.TemporaryDirectory() as folder:
        tree = args.data or f"{folder}/tree"
        if not args.data:
            make_tree(Path(tree), size, device)
        flags = SimpleNamespace(
            data=tree,
            skip_bad=False,
            image_size=size.image,
            batch_size=64,
            precision=args.precision,
            patch_dtype="fp8",
            workers=0,
        )
        names = data.list_objects(tree)
        members = dict.fromkeys(range(10_000), (2 * names)[:64])
        yield from bench_encoders(args, members, flags, encoder, codec, device)
        for row in ("decode", "decode, encode"):
            for workers in args.workers:
                batches = precompute_dino.ViewLoader(
                    members, SimpleNamespace(**{**vars(flags), "workers": workers})
                )
                if row != "decode":
                    batches = precompute_dino.encode_ahead(batches, encoder, codec, flags, device)
                yield {"row": row, "workers": workers, **view_rate(args, batches, workers)}


def make_tree(tree: Path, size: Size, device: torch.device) -> None:
    """A few objects of twice the size that is archived, as Objaverse's renders are."""
    shapes(tree, objects=8, views=4, size=2 * size.image, seed=0, device=device.type, workers=0)


def bench_encoders(args, members: dict, flags, encoder, codec, device: torch.device):
    """Views/s of the encoders on one batch; where --compile says so, they end up compiled."""
    batch = next(iter(precompute_dino.ViewLoader(members, flags)))

    def encode() -> int:
        rows = precompute_dino.encode_views(batch, encoder, codec, flags, device)
        return len(rows["object"])

    compiled = [mode != "off" for mode in args.compile]
    for mode in sorted(set(compiled)):
        if mode:
            pretrained.compile_frozen(encoder, codec)
        elapsed, counts = measure(encode, args.seconds, stopwatch(device))
        how = "default" if mode else "off"
        yield {"row": "encode", "compile": how, **rate_of("views", elapsed, counts)}


def view_rate(args, batches, workers: int) -> dict:
    """Views/s of batches. The GPU is not waited for: it is at the next batch."""
    iterator = iter(batches)

    def take() -> int:
        return len(next(iterator)["object"])

    now = stopwatch(torch.device("cpu"), workers or torch.cuda.is_available())
    return rate_of("views", *measure(take, args.seconds, now, warm_up=2 * workers + 1))


# ---------------------------------------------------------------------------------------- start-up


def run_timed(words: list) -> tuple[float, float]:
    """(seconds, processor seconds) of a script. Raises CalledProcessError where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu_seconds


def bench_startup(args, size: Size, device: torch.device):
    """Medians of what each script takes for --help, and train.py for one step, new and resumed."""
    for name in SCRIPTS:
        times = [run_timed([f"{name}.py", "--help"]) for _ in range(args.repeat)]
        yield startup_row(f"{name}.py --help", times)

    settings = {
        "row": "ours",
        "micro_batch": args.micro_batches[0],
        "accumulate": 1,
        "compile": "off",
    }
    first, resumed = [], []
    with open_archive(args, size, args.recipes[0]) as archive:
        for _ in range(args.repeat):
            with tempfile.TemporaryDirectory() as out:
                words = ["train.py", *train_flags(args, size, archive, out, settings)]
                first.append(run_timed([*words, "--steps", 1]))
                resumed.append(run_timed([*words, "--steps", 2]))
    yield startup_row("train.py, one step and a checkpoint", first)
    yield startup_row("train.py, resumed for one step more", resumed)


def startup_row(row: str, times: list[tuple[float, float]]) -> dict:
    seconds, cpu_seconds = zip(*times, strict=True)
    return {
        "row": row,
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
    }


# ------------------------------------------------------------------------------------------- tables


def table(columns: dict[str, str], records: list[dict]) -> str:
    """A Markdown table of the records."""
    lines = [
        [key.replace("_", " ") for key in columns],
        ["---"] * len(columns),
    ]
    for record in records:
        cells = []
        for key, form in columns.items():
            value = record.get(key)
            cells.append("-" if value is None else format(value, form))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def medians(records: list[dict]) -> list[dict]:
    """Of the repetitions of each row, the one whose rate is the median."""
    groups = {}
    for record in records:
        key = tuple(record.get(k) for k in ("micro_batch", "row", "variant", "compile"))
        groups.setdefault(key, []).append(record)
    chosen = []
    for group in groups.values():
        rates = [record.get("samples_per_second", 0) for record in group]
        chosen.append(group[rates.index(statistics.median_low(rates))])
    return chosen


# ------------------------------------------------------------------------------------------ command

BENCHES = {
    "train": bench_train,
    "sample": bench_sample,
    "read": bench_read,
    "archive": bench_archive,
    "startup": bench_startup,
}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m tools.bench")
    flag = parser.add_argument
    flag("bench", choices=[*BENCHES, "all"], help="what to measure")
    flag("--size", choices=SIZES, help="shapes; default: full (the paper's) on a GPU, else small")
    flag("--device", default="auto", help="auto, cpu or cuda")
    flag("--precision", choices=["bf16", "fp32"], help="default: bf16 on a GPU, else fp32")
    flag("--seconds", type=nonnegative_float, default=5, help="to measure each result for")
    flag("--out", type=Path, help="JSON lines, appended to")
    flag("--memory_gb", type=positive_finite_float, help="use no more of the GPU's memory")
    flag(
        "--micro_batches",
        type=positive_int,
        nargs="+",
        help="train, read; default: 48 96 192 on a GPU, else 4 8",
    )
    flag(
        "--workers",
        type=nonnegative_int,
        nargs="+",
        default=[0, 1, 2, 4],
        help="read, archive: data workers; train takes the most",
    )
    flag(
        "--compile",
        nargs="+",
        choices=["off", *COMPILERS],
        help="train: default is train.py's, others are torch.compile's modes; archive: off or not; "
        "default: off default on a GPU, else off",
    )
    flag(
        "--repeat",
        type=positive_int,
        default=1,
        help="train, startup: repetitions, which alternate between rows; the table shows medians",
    )
    flag("--steps", type=sample.step_count, default=50, help="sample: DDIM steps")
    flag("--archive", help="train, read: a real archive of these shapes")
    flag("--data", help="archive: a real tree of renders")
    flag(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=["fp8+pca", "fp16"],
        help="what the made-up archive holds; train takes the first",
    )
    add_train_flags(parser.add_argument_group("train"))
    return parser.parse_args()


def add_train_flags(group) -> None:
    flag = group.add_argument
    flag("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to compare")
    flag(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=["plain"],
        help="of our own code: speed tricks without a number",
    )
    flag(
        "--accumulate",
        type=positive_int,
        help="micro-batches a step; default: 1536 samples' worth at full size, else 2",
    )
    flag("--checkpointing", action="store_true", help="recompute our blocks in backward")
    flag("--deterministic", action="store_true", help="train.py's flag, for what it costs")
    flag("--profile", action="store_true", help="a table of one step's kernels")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({capability}), {torch.get_num_threads()} thread(s)"


def limit_memory(device: torch.device, memory_gb: float | None) -> None:
    if device.type == "cuda" and memory_gb:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * memory_gb / total))


def fill_defaults(args: argparse.Namespace) -> tuple[argparse.Namespace, torch.device]:
    """The flags with the defaults that depend on the device, and the device."""
    device, precision = open_device(args.device, args.precision)
    cuda = device.type == "cuda"
    filled = {
        **vars(args),
        "device": str(device),
        "precision": precision,
        "size": args.size or ("full" if cuda else "small"),
        "micro_batches": args.micro_batches or ([48, 96, 192] if cuda else [4, 8]),
        "compile": args.compile or (["off", "default"] if cuda else ["off"]),
    }
    return argparse.Namespace(**filled), device


def run_bench(name: str, args, device: torch.device) -> None:
    """Measures, prints a line a result and a table at the end, and appends to --out."""
    size = SIZES[args.size]
    common = {
        "bench": name,
        "device": device_name(device),
        "torch": torch.__version__,
        "precision": args.precision,
        "size": args.size,
        "shapes": dataclasses.asdict(size),
        "checkpointing": args.checkpointing,
        "deterministic": args.deterministic,
        "memory_limit_gb": args.memory_gb,
    }
    records = []
    for result in BENCHES[name](args, size, device):
        record = {**common, **result}
        records.append(record)
        print(table(COLUMNS[name], [record]).splitlines()[-1], flush=True)
        if args.out:
            append(args.out, json.dumps(record) + "\n")
    shown = medians(records) if name == "train" else records
    print(f"\n{name}: {common['device']}, torch {torch.__version__}, {args.size}\n")
    print(f"{table(COLUMNS[name], shown)}\n")
    for record in records:
        if "profile" in record:
            print(f"one step of {record['row']}, compile {record['compile']}")
            print(record["profile"])


def main() -> None:
    args, device = fill_defaults(parse_args())
    if args.data:
        data.list_objects(args.data)  # raises InputError
    if args.out:
        check_writable(args.out)
    limit_memory(device, args.memory_gb)
    for name in BENCHES if args.bench == "all" else [args.bench]:
        run_bench(name, args, device)


if __name__ == "__main__":
    run_script(main)
