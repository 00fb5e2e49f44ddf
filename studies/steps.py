"""Quality against sampling steps: which sampler, and how many steps, are enough.

    python -m studies.steps --ckpt out/demo --data out/demo/data --pairs 64 --scale 1 --out out/steps

For DDIM (eta 1 and 0) and DPM-Solver++(2M): PSNR to the true view, and, for the two without noise, PSNR to the sample
that 200 steps of DDIM make of the same noise, which is the solver's own error. Writes OUT.png, OUT.pdf, OUT.jsonl.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import pretrained
import sample
import visualize
from evaluate import fixed_pairs, load_pairs, psnr
from lib.cli import HelpFormatter, require_positive, run_script
from lib.distributed import set_up
from lib.files import check_writable, write_jsonl

WAYS = {
    "DDIM, eta 1": ("ddim", 1.0),
    "DDIM, eta 0": ("ddim", 0.0),
    "DPM-Solver++(2M)": ("dpm", 0.0),
}
CONVERGED = 200


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    sample.add_checkpoint_flags(parser)
    parser.add_argument("--data", required=True, help="renders in Zero-1-to-3's layout")
    parser.add_argument(
        "--val_fraction", type=float, help="share of objects held out; default: the checkpoint's"
    )
    parser.add_argument("--pairs", type=int, default=64, help="held-out pairs")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[5, 10, 20, 50, 100], help="numbers of steps"
    )
    parser.add_argument("--scale", type=float, default=3.0, help="guidance, 1 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--batch_size", type=int, default=32, help="pairs at a time")
    parser.add_argument("--out", default="out/steps", help="writes OUT.png, OUT.pdf and OUT.jsonl")
    args = parser.parse_args()
    require_positive(args, "pairs", "batch_size")
    args.steps, log = sorted(set(args.steps)), Path(f"{args.out}.jsonl")
    for steps in args.steps:
        sample.ddim_timesteps(steps)  # raises InputError
    check_writable(log)
    device, _, _ = set_up(args)
    model, encoder, codec, meta = pretrained.load_checkpoint(
        args.ckpt, device, args.encoder_weights, args.vae
    )
    fraction = meta["val_fraction"] if args.val_fraction is None else args.val_fraction
    pairs = fixed_pairs(args.data, fraction, "val", "pairs", args.pairs, meta.get("objects"))
    batches = []
    for first in range(0, len(pairs), args.batch_size):
        batch = load_pairs(pairs[first : first + args.batch_size], meta["image_size"])
        condition = sample.condition_on(batch["cond"].to(device), encoder, codec) | {
            "pose": batch["pose"].to(device)
        }
        batches.append((first, batch["target"], condition))

    def views(sampler: str, eta: float, steps: int) -> torch.Tensor:
        """(pairs,3,S,S): pair i's noise depends on (--seed, i) alone."""
        out = []
        for first, target, condition in batches:
            noise = [sample.seeded(args.seed, first + i) for i in range(len(target))]
            latent = sample.ddim(
                model, [condition], noise, steps, eta, args.scale, args.precision, sampler
            )
            out.append(sample.decode(latent, codec).cpu())
        return torch.cat(out)

    targets, limit = torch.cat([target for _, target, _ in batches]), views("ddim", 0.0, CONVERGED)
    lines = []
    for steps in tqdm(args.steps, unit="setting"):
        for way, (sampler, eta) in WAYS.items():
            made = views(sampler, eta, steps)
            error = None if eta else psnr(made, limit).mean().item()
            lines.append({"way": way, "steps": steps, "psnr": psnr(made, targets).mean().item(), "to_converged": error,
                          "pairs": len(pairs), "scale": args.scale, "checkpoint": args.ckpt})  # fmt: skip
        write_jsonl(log, lines)
    figure = Figure(figsize=(6, 2.6))
    labels = {
        "psnr": "PSNR to the true view (dB)",
        "to_converged": f"PSNR to {CONVERGED} steps of DDIM (dB)",
    }
    for ax, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for way in WAYS:
            points = [
                (line["steps"], line[key])
                for line in lines
                if line["way"] == way and line[key] is not None
            ]
            ax.plot(*zip(*points, strict=True), label=way) if points else ax.plot([], [])
        ax.set(
            xlabel="steps", ylabel=label, xscale="log", xticks=args.steps, xticklabels=args.steps
        )
        ax.minorticks_off()
    figure.axes[0].legend()
    written = visualize.save(figure, args.out)
    print(
        "| steps |",
        " | ".join(WAYS),
        "| DDIM, eta 0, to converged | DPM-Solver++ to converged |\n|---|---|---|---|---|---|",
    )
    for steps in args.steps:
        one, two, three = (line for line in lines if line["steps"] == steps)
        cells = [
            one["psnr"],
            two["psnr"],
            three["psnr"],
            two["to_converged"],
            three["to_converged"],
        ]
        print(f"| {steps} |", " | ".join(f"{cell:.2f}" for cell in cells), "|")
    print("wrote", *written)


if __name__ == "__main__":
    run_script(main)
