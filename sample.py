"""Generate views of an object from one image of it: DDIM (Song et al. 2020a; equation 3) or DPM-Solver++(2M), guided.

    python sample.py --ckpt out/demo --image photo.png --azimuth 30 60 90 --device cpu      # a CPU, make demo's
    python sample.py --ckpt runs/full --image photo.png --orbit 12                          # one GPU
    python sample.py --ckpt runs/full --image photos/ --azimuth 90 --elevation 20 --steps 50 --scale 3
    python sample.py --ckpt runs/full --image photo.png --orbit 12 --stochastic_conditioning    # for consistency

Writes OUT/<image's name>/: input.png (what the model was shown), 000.png ... (a view a pose), grid.png, orbit.gif.
Camera moves are relative to the input view: --azimuth turns the camera counter-clockwise about the object seen from
above, --elevation moves it up, --distance away. --ckpt takes a run, a step folder or a weights file of any format that
pretrained.py reads.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import pretrained
from data import seeded
from lib.checkpoints import image_size
from lib.cli import HelpFormatter, InputError, require_positive, run_script
from lib.distributed import set_up
from lib.images import list_photos, load_photo, write_views
from model import TIMESTEPS, NovelViewModel, predicted_x0_eps
from pretrained import autocast, encode

# ------------------------------------------------------------------------------------------------------------- DDIM


def ddim_timesteps(steps: int) -> list[int]:
    """`steps` timesteps, evenly spaced, noisiest first. Raises InputError unless 1 <= steps <= 1000.

    Deviation: starts at 999, where the noise is strongest and sampling really starts; Zero-1-to-3 leaves it out. The
    last step returns its predicted x0; Zero-1-to-3's goes from t = 1 to alpha_bar_0.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise InputError(f"--steps {steps}: between 1 and {TIMESTEPS}")
    return [round(TIMESTEPS * (1 - i / steps)) - 1 for i in range(steps)]


def ddim_step(x0, eps, alpha_bar, alpha_bar_next, eta: float, noise) -> Tensor:
    """Equation 3: from x_t to the next, less noisy latent, given the predicted x0 and eps; eta = 0 is deterministic.

    Its alpha is the cumulative product alpha_bar; sigma is eta times the posterior's standard deviation.
    """
    sigma = (
        eta
        * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))
        .clamp(min=0)
        .sqrt()
    )
    direction = (1 - alpha_bar_next - sigma**2).clamp(min=0).sqrt() * eps
    return alpha_bar_next.sqrt() * x0 + direction + sigma * noise


def dpm_step(x_t, x0, last_x0, alpha_bars) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), of second order by the previous step's x0, without noise.

    alpha_bars: of the previous step (None at the first, which is of first order), of this one, and of the next.
    """
    previous, here, there = (
        None if ab is None else 0.5 * (ab / (1 - ab)).log() for ab in alpha_bars
    )  # log SNR / 2
    h = there - here  # infinite at the first step of a schedule that ends at zero SNR
    if last_x0 is not None:
        x0 = x0 + 0.5 * h / (here - previous) * (x0 - last_x0)
    shrink = ((1 - alpha_bars[2]) / (1 - alpha_bars[1])).sqrt()
    return shrink * x_t - alpha_bars[2].sqrt() * torch.expm1(-h) * x0


def guided_prediction(model: NovelViewModel, x_t: Tensor, t: Tensor, condition: dict, scale: float):
    """(x0, eps) under classifier-free guidance: null + scale * (conditional - null), in one batch of twice the size."""
    if scale == 1:
        output = model(x_t, t, condition)
    else:
        twice = {key: torch.cat([value, value]) for key, value in condition.items()}
        keep = torch.arange(2 * len(t), device=t.device) < len(t)
        output = model(
            torch.cat([x_t, x_t]), torch.cat([t, t]), twice, keep_context=keep, keep_latent=keep
        )
        conditional, null = output.float().chunk(2)
        output = null + scale * (conditional - null)
    return predicted_x0_eps(output, x_t, t, model.alpha_bar, model.prediction)


def draw_condition(conditions: list[dict], generators: list[torch.Generator]) -> dict[str, Tensor]:
    """Stochastic conditioning (Watson et al. 2022, 3DiM, section 2.2): each sample draws a view, each step."""
    if len(conditions) == 1:
        return conditions[0]
    drawn = [
        int(torch.randint(len(conditions), (), generator=generator)) for generator in generators
    ]
    return {
        key: torch.stack([conditions[j][key][b] for b, j in enumerate(drawn)])
        for key in conditions[0]
    }


@torch.no_grad()
def ddim(
    model: NovelViewModel,
    conditions: list[dict[str, Tensor]],
    generators: list[torch.Generator],
    steps: int = 50,
    eta: float = 1.0,
    scale: float = 3.0,
    precision: str = "fp32",
    sampler: str = "ddim",
    on_step=None,
) -> Tensor:
    """Sample target latents (B,C,H,W), unscaled by the codec's factor still: divide by codec.scale to decode.

    conditions: as NovelViewModel.forward takes them, B rows each; of several each step draws one a sample. generators:
    a CPU generator a sample, so that a sample does not depend on its batch; sampler: "ddim", or "dpm", which has no
    eta; on_step(i, x0) is called with each step's predicted x0.
    """
    device, shape = conditions[0]["latent"].device, conditions[0]["latent"].shape[1:]
    choosers = [
        torch.Generator().manual_seed(g.initial_seed() + 1) for g in generators
    ]  # lest draws shift the noise

    def noise() -> Tensor:
        return torch.stack(
            [torch.randn(shape, generator=generator) for generator in generators]
        ).to(device)

    timesteps = ddim_timesteps(steps)
    alpha_bars = [None, *model.alpha_bar[timesteps]]
    x, last_x0 = noise(), None
    for i, t in enumerate(timesteps):
        with autocast(device, precision):
            ts = torch.full((len(x),), t, device=device)
            x0, eps = guided_prediction(model, x, ts, draw_condition(conditions, choosers), scale)
        if on_step:
            on_step(i, x0)
        if i + 1 == steps:
            return x0
        if sampler == "dpm":
            x, last_x0 = dpm_step(x, x0, last_x0, alpha_bars[i : i + 3]), x0
        else:
            x = ddim_step(x0, eps, *alpha_bars[i + 1 : i + 3], eta, noise() if eta else 0)


# --------------------------------------------------------------------------------------- images and poses in, views out


@torch.no_grad()
def condition_on(image: Tensor, encoder, codec) -> dict[str, Tensor]:
    """The model's condition from images (B,3,H,W) in [-1,1], but for the camera moves ("pose")."""
    rows = encode(image, encoder, codec)
    rows["latent"] = rows.pop("latent_mean")
    return {key: value.float() for key, value in rows.items() if key != "latent_logvar"}


def decode(latent: Tensor, codec) -> Tensor:
    """Latents as the UNet has them (B,C,h,w) -> images (B,3,H,W) in [-1,1]."""
    with torch.no_grad():
        return codec.decode(latent.float() / codec.scale).clamp(-1, 1)


def camera_moves(azimuth: list[float], elevation: list[float], distance: list[float]) -> Tensor:
    """Poses (N,4) from degrees, degrees and scene units; a list of one goes with every entry of the others.

    Raises InputError when the lists' lengths disagree.
    """
    given = {"azimuth": azimuth, "elevation": elevation, "distance": distance}
    n = max(map(len, given.values()))
    for flag, values in given.items():
        if len(values) not in (1, n) or not np.isfinite(values).all():
            raise InputError(f"--{flag}: finite numbers, 1 or, as another flag has them, {n}")
    a, e, d = np.broadcast_arrays(np.radians(azimuth), np.radians(elevation), distance)
    return torch.tensor(np.stack([-e, np.sin(a), np.cos(a), d], axis=1), dtype=torch.float32)


def move_between(a: Tensor, b: Tensor) -> Tensor:
    """The camera move (N,4) from the view at move a (4,) to those at b (N,4), all relative to the same input view."""
    sin, cos = b[:, 1] * a[2] - b[:, 2] * a[1], b[:, 2] * a[2] + b[:, 1] * a[1]
    return torch.stack([b[:, 0] - a[0], sin, cos, b[:, 3] - a[3]], dim=1)


def add_sampler_flags(group) -> None:
    """Flags shared by sample.py, evaluate.py and tools/."""
    group.add_argument(
        "--sampler", choices=["ddim", "dpm"], default="ddim", help="dpm: DPM-Solver++(2M), no eta"
    )
    group.add_argument(
        "--steps",
        type=int,
        default=50,
        help="sampling steps (figure 1: 200; Zero-1-to-3's demo: 75)",
    )
    group.add_argument(
        "--eta",
        type=float,
        default=1.0,
        help="DDIM's stochasticity, 0 to 1 (Zero-1-to-3's demo: 1)",
    )
    group.add_argument(
        "--scale", type=float, default=3.0, help="guidance, 1 for none (Zero-1-to-3's demo: 3)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the noise")


def check_sampler_flags(args: argparse.Namespace) -> None:
    """Raises InputError naming the flag."""
    require_positive(args, "batch_size", "steps")
    ddim_timesteps(args.steps)
    if not (0 <= args.eta <= 1 and math.isfinite(args.scale)):
        raise InputError(f"--eta {args.eta} --scale {args.scale}: eta is 0 to 1, scale a number")


def sampler_flags(args: argparse.Namespace) -> dict:
    """`ddim`'s arguments from the flags."""
    return {key: getattr(args, key) for key in ("steps", "eta", "scale", "precision", "sampler")}


def add_checkpoint_flags(group, nargs: str | None = None) -> None:
    """Flags that open a checkpoint (or several, by nargs), shared by sample.py, evaluate.py and tools/."""
    group.add_argument(
        "--ckpt", required=True, nargs=nargs, help="a run, a step folder, or a weights file"
    )
    group.add_argument(
        "--encoder_weights",
        help="the image encoder's weights, where the checkpoint's are elsewhere",
    )
    group.add_argument("--vae", help="the VAE's weights, where the checkpoint's are elsewhere")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument(
        "--precision", choices=["bf16", "fp16", "fp32"], help="default: bf16 on a GPU, else fp32"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    group = parser.add_argument_group("model")
    add_checkpoint_flags(group)
    group = parser.add_argument_group("views")
    group.add_argument("--image", required=True, help="an image, or a folder of images")
    group.add_argument("--crop", action=argparse.BooleanOptionalAction, default=True, help="frame the object as "
                       "Zero-1-to-3 does; --no-crop for renders framed as in training")  # fmt: skip
    group.add_argument(
        "--azimuth",
        type=float,
        nargs="+",
        default=[0.0],
        help="degrees, counter-clockwise from above",
    )
    group.add_argument("--elevation", type=float, nargs="+", default=[0.0], help="degrees, upwards")
    group.add_argument(
        "--distance",
        type=float,
        nargs="+",
        default=[0.0],
        help="change (training is at 1.5 to 2.2)",
    )
    group.add_argument(
        "--orbit", type=int, default=0, help="views evenly around the object instead of --azimuth"
    )
    group = parser.add_argument_group("sampler (the paper names none of its settings)")
    add_sampler_flags(group)
    group.add_argument("--stochastic_conditioning", action="store_true", help="for consistency: one view at a time, "
                       "each step conditioned on the input or an earlier view, drawn at random")  # fmt: skip
    group.add_argument(
        "--shared_noise", action="store_true", help="the same noise for all views of an image"
    )
    group.add_argument("--batch_size", type=int, default=16, help="views at a time")
    group = parser.add_argument_group("output")
    group.add_argument("--out", default="out/samples", help="folder to write")
    group.add_argument(
        "--save_x0",
        type=int,
        default=0,
        metavar="N",
        help="predicted x0 to save (figure 1), in x0.npz",
    )
    args = parser.parse_args()
    check_sampler_flags(args)
    if args.orbit:
        args.azimuth = [360 * i / args.orbit for i in range(args.orbit)]
    poses = camera_moves(args.azimuth, args.elevation, args.distance)
    paths = list_photos(args.image)
    device, _, _ = set_up(args)
    size = image_size(args.ckpt)
    images = [load_photo(path, size, args.crop) for path in paths]  # before what takes long
    model, encoder, codec, _ = pretrained.load_checkpoint(
        args.ckpt, device, args.encoder_weights, args.vae
    )
    saved = {i: ddim_timesteps(args.steps)[i] for i in saved_steps(args.steps, args.save_x0)}
    batches = -(-len(poses) // (1 if args.stochastic_conditioning else args.batch_size))
    with tqdm(total=len(paths) * args.steps * batches, unit="step") as bar:
        for path, image in zip(paths, images, strict=True):
            bar.set_description(path.name)
            trajectory: dict[int, list[Tensor]] = {}  # timestep: the predicted x0, batch by batch

            def on_step(i: int, x0: Tensor, trajectory=trajectory) -> None:
                bar.update()
                if i in saved:
                    trajectory.setdefault(saved[i], []).append(decode(x0, codec).cpu())

            views = sample_views(image, poses, model, encoder, codec, args, on_step)
            labels = args.azimuth if len(args.azimuth) == len(views) else range(len(views))
            write_views(
                Path(args.out) / path.stem,
                image,
                views,
                [f"{label:.0f}" for label in labels],
                trajectory,
            )
    print(
        f"{len(paths) * len(poses)} view(s) in {args.out}/"
        + (f"{paths[0].stem}/" if len(paths) == 1 else "")
    )


def saved_steps(steps: int, n: int) -> list[int]:
    """Which of the DDIM steps' predicted x0 are saved: n of them, evenly, the last and, of several, the first."""
    return sorted({round(i) for i in np.linspace(steps - 1, 0, n)})


def sample_views(image: Tensor, poses: Tensor, model, encoder, codec, args, on_step=None) -> Tensor:
    """Views (N,3,H,W) of an image (3,H,W) from camera moves (N,4). View i's noise depends on (args.seed, i) alone.

    With args.stochastic_conditioning they come one at a time, and each is conditioned on those before it, too.
    """
    device = next(model.parameters()).device
    poses, stochastic = poses.to(device), args.stochastic_conditioning
    size, views = 1 if stochastic else args.batch_size, []
    seen = [
        (
            condition_on(image[None].to(device), encoder, codec),
            torch.tensor([0.0, 0, 1, 0], device=device),
        )
    ]
    for first in range(0, len(poses), size):
        target = poses[first : first + size]
        conditions = []
        for shown, move in seen:
            rows = {
                key: value.expand(len(target), *value.shape[1:]) for key, value in shown.items()
            }
            conditions.append(rows | {"pose": move_between(move, target)})
        generators = [
            seeded(args.seed, 0 if args.shared_noise else first + i) for i in range(len(target))
        ]
        views.append(
            decode(
                ddim(model, conditions, generators, on_step=on_step, **sampler_flags(args)), codec
            )
        )
        if stochastic:
            seen.append((condition_on(views[-1], encoder, codec), target[0]))
    return torch.cat(views).cpu()


if __name__ == "__main__":
    run_script(main)
