"""Quality against sampling steps: which sampler, and how many steps, are enough.

    python -m studies.steps --ckpt out/demo --data out/demo/data --scale 1 --out out/steps

For DDIM (eta 1 and 0) and DPM-Solver++(2M) it measures the PSNR to the true view. For the two
without noise it also measures the PSNR to the sample that 200 steps of DDIM make of the same noise:
the solver's own error. Writes OUT.png, OUT.pdf, OUT.jsonl.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import pretrained
import sample
from data import seeded
from evaluate import condition_of, fixed_pairs, load_pairs, psnr
from lib import cli
from lib.cli import ArgumentParser, InputError, progress, run_script
from lib.distributed import open_device
from lib.files import check_writable, write_atomically, write_jsonl

WAYS = {  # name: (sampler, eta)
    "DDIM, eta 1": ("ddim", 1.0),
    "DDIM, eta 0": ("ddim", 0.0),
    "DPM-Solver++(2M)": ("dpm", 0.0),
}
CONVERGED = 200  # steps


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    sample.add_checkpoint_flags(parser)
    parser.add_argument("--data", required=True, help="renders in Zero-1-to-3's layout")
    parser.add_argument(
        "--val_fraction",
        type=cli.fraction,
        help="share of objects held out; default: the checkpoint's",
    )
    parser.add_argument("--pairs", type=cli.positive_int, default=64, help="held-out pairs")
    parser.add_argument(
        "--steps",
        type=sample.step_count,
        nargs="+",
        default=[5, 10, 20, 50, 100],
        help="numbers of steps",
    )
    parser.add_argument("--scale", type=cli.finite_float, default=3.0, help="guidance, 1 for none")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the noise")
    parser.add_argument("--batch_size", type=cli.positive_int, default=32, help="pairs at a time")
    parser.add_argument("--out", default="out/steps", help="writes OUT.png, OUT.pdf and OUT.jsonl")
    return parser.parse_args()


def load_batches(pairs: list, size: int, batch_size: int, model, encoder, codec) -> list[tuple]:
    """[(the first pair's number, true views (B,3,S,S), the model's condition), ...]"""
    batches = []
    for first in range(0, len(pairs), batch_size):
        batch = load_pairs(pairs[first : first + batch_size], size)
        condition = condition_of(batch, model, encoder, codec)
        batches.append((first, batch["target"], condition))
    return batches


def draw_curves(lines: list[dict], steps: list[int]) -> Figure:
    """A panel for each of the two scores, a curve for each way that has it."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    labels = {
        "psnr": "PSNR to the true view (dB)",
        "to_converged": f"PSNR to {CONVERGED} steps of DDIM (dB)",
    }
    for ax, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for way in WAYS:
            # A way without the score gets an empty curve, so that colours agree between panels.
            scored = [line for line in lines if line["way"] == way and line[key] is not None]
            x = [line["steps"] for line in scored]
            y = [line[key] for line in scored]
            ax.plot(x, y, label=way)
        ax.set(xlabel="steps", ylabel=label, xscale="log", xticks=steps, xticklabels=steps)
        ax.minorticks_off()
    figure.axes[0].legend(fontsize="small")
    return figure


def save_figure(figure: Figure, out: str) -> list[Path]:
    """Writes OUT.png and OUT.pdf. Raises InputError naming the file."""
    files = []
    for form in ("png", "pdf"):
        path = Path(f"{out}.{form}")
        write_atomically(
            path, lambda temporary, form=form: figure.savefig(temporary, format=form, dpi=150)
        )
        files.append(path)
    return files


def print_table(lines: list[dict], steps: list[int]) -> None:
    """Markdown: a row for each number of steps."""
    heads = ["steps", *WAYS, "DDIM, eta 0, to converged", "DPM-Solver++ to converged"]
    print("|", " | ".join(heads), "|")
    print("|" + "---|" * len(heads))
    for count in steps:
        row = [line for line in lines if line["steps"] == count]  # in the order of WAYS
        cells = [line["psnr"] for line in row]
        cells += [line["to_converged"] for line in row if line["to_converged"] is not None]
        print(f"| {count} |", " | ".join(f"{cell:.2f}" for cell in cells), "|")


def main() -> None:
    args = parse_args()
    step_counts = sorted(set(args.steps))
    log = Path(f"{args.out}.jsonl")
    check_writable(log)
    device, precision = open_device(args.device, args.precision)
    model, encoder, codec, meta = pretrained.load_checkpoint(
        args.ckpt, device, args.encoder_weights, args.vae, args.pose
    )
    val_fraction = meta["val_fraction"] if args.val_fraction is None else args.val_fraction
    pairs = fixed_pairs(
        args.data,
        val_fraction,
        "val",
        "pairs",
        count=args.pairs,
        trained_on=meta.get("objects"),
        held_out=meta["val_fraction"],
    )
    batches = load_batches(pairs, meta["image_size"], args.batch_size, model, encoder, codec)

    def sample_pairs(sampler: str, eta: float, steps: int) -> Tensor:
        """(pairs,3,S,S) in [-1,1]. The noise of pair i depends on (--seed, i) alone."""
        views = []
        for first, target, condition in batches:
            generators = [seeded(args.seed, first + i) for i in range(len(target))]
            latent = sample.sample_latents(
                model, [condition], generators, steps, eta, args.scale, precision, sampler
            )
            views.append(sample.decode(latent, codec).cpu())
        if not all(batch.isfinite().all() for batch in views):
            raise InputError(f"--ckpt {args.ckpt}: a view by {sampler} is not finite")
        return torch.cat(views)

    targets = torch.cat([target for _, target, _ in batches])
    converged = sample_pairs("ddim", 0.0, CONVERGED)
    lines = []
    for steps in progress(step_counts, unit="setting"):
        for way, (sampler, eta) in WAYS.items():
            views = sample_pairs(sampler, eta, steps)
            to_converged = None if eta else psnr(views, converged).mean().item()
            line = {
                "way": way,
                "steps": steps,
                "psnr": psnr(views, targets).mean().item(),
                "to_converged": to_converged,
                "pairs": len(pairs),
                "scale": args.scale,
                "checkpoint": args.ckpt,
            }
            lines.append(line)
        write_jsonl(log, lines)

    files = save_figure(draw_curves(lines, step_counts), args.out)
    print_table(lines, step_counts)
    print("wrote", *files)


if __name__ == "__main__":
    run_script(main)
