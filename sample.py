"""Generate views of an object from one image of it: guided DDIM (equation 3) or DPM-Solver++(2M).

    python sample.py --ckpt out/demo --image photo.png --azimuth 30 60 90 --device cpu  # the demo
    python sample.py --ckpt runs/full --image photo.png --orbit 12                      # one GPU
    python sample.py --ckpt runs/full --image photos/ --azimuth 90 --elevation 20 --steps 75
    python sample.py --ckpt runs/full --image photo.png --orbit 12 --stochastic_conditioning

Writes OUT/<image's name>/: input.png (what the model was shown), 000.png ... (one view for each
camera move), grid.png, orbit.gif where there are two views or more, and transforms.json (the views'
cameras, for 3D reconstruction).
Camera moves are relative to the input view: --azimuth turns the camera counter-clockwise about the
object as seen from above, --elevation moves it up, --distance away. --ckpt takes a run, a step
folder or a weights file of any format that pretrained.py reads.

In the order of reading:
    steps of a sampler    ddim_timesteps, ddim_step; half_log_snr, dpm_step
    what a step sees      guided_prediction (guidance), draw_condition (stochastic conditioning)
    the loop              sample_latents, draw_noise
    images and moves      condition_on, decode; camera_moves, move_names, move_between, encode_moves
    all views             sample_views, with_moves
    cameras               camera_to_world, write_transforms
    the command           flags, main

Shapes: B batch, C latent channels, H W height and width (of latents, or of images), N views.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pretrained
from data import POSE_ENCODINGS, TAN_HALF_FOV, seeded
from lib import cli
from lib.cli import ArgumentParser, InputError, run_script
from lib.distributed import open_device
from lib.files import check_writable, write_atomically
from lib.images import list_photos, load_photo, write_views
from model import TIMESTEPS, NovelViewModel, predicted_x0_eps
from pretrained import autocast, encode, image_size

# ------------------------------------------------------------------------------ steps of a sampler


def ddim_timesteps(steps: int) -> list[int]:
    """`steps` timesteps, evenly spaced from 999 down to 0. Raises InputError unless 1 to 1000.

    The sample is the x0 predicted at t = 0 (at 999, where there is only one step).
    Deviation: Zero-1-to-3 takes every (1000 // steps)-th timestep from 1 on: 1 to 981 for 50 steps.
    It leaves out 999, where sampling really starts. Its last step goes from t = 1 to alpha_bar_0,
    which leaves a little noise in the sample.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise InputError(f"--steps {steps}: must be from 1 to {TIMESTEPS}")
    return [round(t) for t in np.linspace(TIMESTEPS - 1, 0, steps)]


def ddim_step(
    x0: Tensor,
    eps: Tensor,
    alpha_bar: Tensor,
    alpha_bar_next: Tensor,
    eta: float,
    noise: Tensor | float,
) -> Tensor:
    """Equation 3 (DDIM's equation 12): from x_t to the next, less noisy latent.

    x0, eps: what the model predicts at x_t, (B,C,H,W); `eps` is the equation's F. alpha_bar,
    alpha_bar_next: scalars, which this equation calls alpha_t and alpha_{t-1}, as DDIM does. (The
    alpha_t of section 3.1 is sqrt(alpha_bar).) eta = 0 is deterministic, and eta = 1 adds as much
    noise as DDPM does (DDIM's equation 16).
    """
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    sigma = eta * variance.clamp(min=0).sqrt()
    direction = (1 - alpha_bar_next - sigma**2).clamp(min=0).sqrt() * eps
    return alpha_bar_next.sqrt() * x0 + direction + sigma * noise


def half_log_snr(alpha_bar: Tensor) -> Tensor:
    """lambda = log(alpha / sigma), the time in which DPM-Solver++ takes its steps."""
    return 0.5 * (alpha_bar / (1 - alpha_bar)).log()


def dpm_step(
    x_t: Tensor,
    x0: Tensor,
    previous_x0: Tensor | None,
    previous_alpha_bar: Tensor | None,
    alpha_bar: Tensor,
    alpha_bar_next: Tensor,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): from x_t to the next, less noisy latent.

    It is deterministic. x0: what the model predicts at x_t, (B,C,H,W). previous_x0: what it
    predicted one step before. The two give x0 in the middle of the step (second order). Without
    previous_x0 the step is of first order.
    """
    now = half_log_snr(alpha_bar)
    h = half_log_snr(alpha_bar_next) - now  # infinite where a schedule starts at zero SNR
    if previous_x0 is not None:
        x0 = x0 + 0.5 * h / (now - half_log_snr(previous_alpha_bar)) * (x0 - previous_x0)
    shrink = ((1 - alpha_bar_next) / (1 - alpha_bar)).sqrt()
    return shrink * x_t - alpha_bar_next.sqrt() * torch.expm1(-h) * x0


# -------------------------------------------------------------------------------- what a step sees


def guided_prediction(
    model: NovelViewModel, x_t: Tensor, t: Tensor, condition: dict[str, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """(x0, eps), each (B,C,H,W), under classifier-free guidance (Ho & Salimans 2022, equation 6).

    The output is null + scale * (conditional - null); a scale of 1 needs no null. Both are computed
    in one batch of 2B. x_t (B,C,H,W), t (B,).
    """
    if scale == 1:
        output = model(x_t, t, condition)
        return predicted_x0_eps(output, x_t, t, model.alpha_bar, model.prediction)
    condition_twice = {key: torch.cat([value, value]) for key, value in condition.items()}
    keep = torch.arange(2 * len(t), device=t.device) < len(t)  # the second half sees the null
    both = model(
        torch.cat([x_t, x_t]),
        torch.cat([t, t]),
        condition_twice,
        keep_context=keep,
        keep_latent=keep,
    )
    conditional, null = both.float().chunk(2)
    output = null + scale * (conditional - null)
    return predicted_x0_eps(output, x_t, t, model.alpha_bar, model.prediction)


def draw_condition(
    conditions: list[dict[str, Tensor]], generators: list[torch.Generator]
) -> dict[str, Tensor]:
    """Stochastic conditioning (Watson et al. 2022, 3DiM, section 2.2).

    Each sample draws one of the views that it may be conditioned on, with its own generator.
    conditions: one for each such view, of B rows each. Returns B rows.
    """
    if len(conditions) == 1:
        return conditions[0]
    drawn = [int(torch.randint(len(conditions), (), generator=g)) for g in generators]
    return {
        key: torch.stack([conditions[view][key][b] for b, view in enumerate(drawn)])
        for key in conditions[0]
    }


# ---------------------------------------------------------------------------------------- the loop


@torch.no_grad()
def sample_latents(
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
    """DDIM or DPM-Solver++: target latents (B,C,H,W), times the codec's scale, for `decode`.

    steps, eta: of DDIM (equation 3). scale: of the guidance (see `guided_prediction`).
    conditions: as NovelViewModel.forward takes them, B rows each. Where there are several, each
    sample draws one at every step. generators: one on the CPU for each sample, so that a sample
    does not depend on its batch. sampler: "ddim", or "dpm", which ignores eta. on_step(i, x0) is
    called with every step's predicted x0.
    """
    device = conditions[0]["latent"].device
    shape = conditions[0]["latent"].shape[1:]
    # Separate generators, so that choosing views does not change the noise.
    choosers = [torch.Generator().manual_seed(g.initial_seed() + 1) for g in generators]
    timesteps = ddim_timesteps(steps)
    alpha_bars = model.alpha_bar[timesteps]

    x = draw_noise(generators, shape, device)
    previous_x0 = None
    for i, t in enumerate(timesteps):
        condition = draw_condition(conditions, choosers)
        with autocast(device, precision):
            t_batch = torch.full((len(x),), t, device=device)
            x0, eps = guided_prediction(model, x, t_batch, condition, scale)
        if on_step is not None:
            on_step(i, x0)
        if i == steps - 1:
            break  # the last predicted x0 is the sample
        if sampler == "dpm":
            if i == steps - 2:
                previous_x0 = None  # the last step spans so much log SNR that x0 would overshoot
            previous_alpha_bar = alpha_bars[i - 1] if i > 0 else None
            x = dpm_step(x, x0, previous_x0, previous_alpha_bar, alpha_bars[i], alpha_bars[i + 1])
            previous_x0 = x0
        else:
            noise = draw_noise(generators, shape, device) if eta > 0 else 0.0
            x = ddim_step(x0, eps, alpha_bars[i], alpha_bars[i + 1], eta, noise)
    return x0


def draw_noise(
    generators: list[torch.Generator], shape: torch.Size, device: torch.device
) -> Tensor:
    """(B,*shape) of standard normal noise, each row from its own generator on the CPU."""
    rows = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(rows).to(device)


# -------------------------------------------------------------------------------- images and moves


@torch.no_grad()
def condition_on(image: Tensor, encoder, codec) -> dict[str, Tensor]:
    """The model's condition from images (B,3,H,W) in [-1,1], without the camera move ("pose")."""
    rows = encode(image, encoder, codec)
    condition = {
        "latent": rows["latent_mean"].float(),
        "cls": rows["cls"].float(),
    }
    if "patch" in rows:
        condition["patch"] = rows["patch"].float()
    return condition


@torch.no_grad()
def decode(latent: Tensor, codec) -> Tensor:
    """Latents (B,C,h,w), scaled as in training -> images (B,3,H,W) in [-1,1].

    What is not finite is NaN in them, and never a white or black pixel.
    """
    image = codec.decode(latent.float() / codec.scale)
    return image.clamp(-1, 1).where(image.isfinite(), torch.nan)


def camera_moves(azimuth: list[float], elevation: list[float], distance: list[float]) -> Tensor:
    """Poses (N,4) as the model takes them, from degrees, degrees and scene units (section 3.1).

    A list of one number goes with every entry of the others. Raises InputError when the lengths of
    the lists disagree.
    """
    given = {"azimuth": azimuth, "elevation": elevation, "distance": distance}
    count = max(len(values) for values in given.values())
    for flag, values in given.items():
        if len(values) not in (1, count):
            raise InputError(
                f"--{flag}: {len(values)} numbers; give 1 or, as another flag has them, {count}"
            )
    turn, lift, away = np.broadcast_arrays(np.radians(azimuth), np.radians(elevation), distance)
    moves = np.stack([-lift, np.sin(turn), np.cos(turn), away], axis=1)
    return torch.tensor(moves, dtype=torch.float32)


def move_names(poses: Tensor) -> list[str]:
    """Camera moves (N,4) in words: "90°", "90°, 20° up", "0°, 20° down, 0.3 away"."""
    names = []
    for polar_change, turn_sin, turn_cos, away in poses.double():
        turn = round(math.degrees(math.atan2(turn_sin, turn_cos))) % 360
        lift = round(-math.degrees(polar_change))
        name = f"{turn}°"
        if lift:
            name += f", {abs(lift)}° {'up' if lift > 0 else 'down'}"
        if abs(away) >= 0.005:
            name += f", {abs(away):.2g} {'away' if away > 0 else 'closer'}"
        names.append(name)
    return names


def move_between(start: Tensor, targets: Tensor) -> Tensor:
    """The camera moves (N,4) from the view at move `start` (4,) to those at `targets` (N,4).

    All of them are relative to the same input view. Angles are subtracted through the sine and the
    cosine of a difference.
    """
    polar_change, sin, cos, distance = start
    turn_sin = targets[:, 1] * cos - targets[:, 2] * sin
    turn_cos = targets[:, 2] * cos + targets[:, 1] * sin
    tilt = targets[:, 0] - polar_change
    return torch.stack([tilt, turn_sin, turn_cos, targets[:, 3] - distance], dim=1)


def encode_moves(moves: Tensor, view_polar: Tensor | float, encoding: str) -> Tensor:
    """Camera moves (N,4) from a view, as a model of this pose encoding takes them.

    view_polar: the view's own polar angle in radians. See data.relative_pose.
    """
    if encoding == "zero123":
        return moves
    assert encoding == "elevation", encoding
    fourth = torch.as_tensor(view_polar, dtype=moves.dtype, device=moves.device)
    return torch.cat([moves[:, :3], fourth.expand(len(moves), 1)], dim=1)


def sample_views(
    image: Tensor,
    poses: Tensor,
    model: NovelViewModel,
    encoder,
    codec,
    settings: dict,
    seed: int = 0,
    batch_size: int = 16,
    stochastic_conditioning: bool = False,
    on_step=None,
    input_elevation: float = 0.0,
) -> Tensor:
    """Views (N,3,H,W) in [-1,1], on the CPU, of an image (3,H,W) after the camera moves (N,4).

    The noise of view i depends on (seed, i) alone. settings: `sample_latents`'s keyword arguments,
    as from `sampler_settings`. With stochastic_conditioning the views come one at a time, and each
    is conditioned on the image and on the views before it. input_elevation: from which the image
    was taken, in degrees; only models of the pose encoding "elevation" read it. Raises InputError
    where a view is not finite.
    """
    device = next(model.parameters()).device
    poses = poses.to(device)
    if stochastic_conditioning:
        batch_size = 1
    no_move = torch.tensor([0.0, 0.0, 1.0, 0.0], device=device)
    seen = [(condition_on(image[None].to(device), encoder, codec), no_move)]
    views = []
    for first in range(0, len(poses), batch_size):
        targets = poses[first : first + batch_size]
        conditions = []
        for shown, move in seen:
            view_polar = math.radians(90 - input_elevation) + move[0]
            moves = encode_moves(move_between(move, targets), view_polar, model.pose_encoding)
            conditions.append(with_moves(shown, moves))
        generators = [seeded(seed, first + i) for i in range(len(targets))]
        latent = sample_latents(model, conditions, generators, on_step=on_step, **settings)
        batch = decode(latent, codec)
        if not batch.isfinite().all():
            raise InputError(
                f"view {first} holds NaN or infinity: does --precision fp32 mend it? If not, the "
                "weights of --ckpt or --vae are damaged"
            )
        views.append(batch)
        if stochastic_conditioning:
            seen.append((condition_on(batch, encoder, codec), targets[0]))
    return torch.cat(views).cpu()


def with_moves(shown: dict[str, Tensor], moves: Tensor) -> dict[str, Tensor]:
    """A condition of one view (one row) for each of the camera moves (N,4) from it: N rows."""
    rows = {key: value.expand(len(moves), *value.shape[1:]) for key, value in shown.items()}
    rows["pose"] = moves
    return rows


# ----------------------------------------------------------------------------------------- cameras


def camera_to_world(poses: Tensor, elevation: float, distance: float) -> Tensor:
    """Camera moves (N,4) -> camera-to-world matrices (N,4,4) float64, with OpenGL's axes.

    World z is up and the cameras look at the origin, x right, y up and z backwards. The input view
    is at azimuth 0, at this elevation in degrees and this distance in scene units.
    """
    polar_change, turn_sin, turn_cos, further = poses.double().unbind(dim=1)
    theta = math.pi / 2 - math.radians(elevation) + polar_change  # from +z
    phi = torch.atan2(turn_sin, turn_cos)  # from +x, counter-clockwise
    zero = torch.zeros_like(phi)
    right = torch.stack([-phi.sin(), phi.cos(), zero], dim=1)
    up = torch.stack([-theta.cos() * phi.cos(), -theta.cos() * phi.sin(), theta.sin()], dim=1)
    backwards = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], dim=1)
    centre = (distance + further)[:, None] * backwards
    matrices = torch.eye(4, dtype=torch.float64).repeat(len(poses), 1, 1)
    matrices[:, :3] = torch.stack([right, up, backwards, centre], dim=2)
    return matrices


def write_transforms(
    folder: Path, poses: Tensor, size: int, elevation: float, distance: float
) -> None:
    """FOLDER/transforms.json: the views' cameras, as nerfstudio and instant-ngp read them.

    nerfstudio takes the focal length fl_x, instant-ngp either that or camera_angle_x. The original
    Gaussian Splatting code wants transforms_train.json, transforms_test.json and file_path without
    ".png" instead. The views are RGB on white and have no alpha. poses (N,4): the views' camera
    moves; size: their side in pixels; elevation, distance: the input view's, as in camera_to_world.
    """
    focal_length = size / (2 * TAN_HALF_FOV)
    matrices = camera_to_world(poses, elevation, distance)
    transforms = {
        "camera_model": "OPENCV",  # a pinhole, as no distortion is given
        "camera_angle_x": 2 * math.atan(TAN_HALF_FOV),
        "w": size,
        "h": size,
        "fl_x": focal_length,
        "fl_y": focal_length,
        "cx": size / 2,
        "cy": size / 2,
        "frames": [
            {
                "file_path": f"{i:03d}.png",
                "transform_matrix": matrix.tolist(),
                "camera_move": name,  # no loader reads it; it is for people and visualize.py
            }
            for i, (matrix, name) in enumerate(zip(matrices, move_names(poses), strict=True))
        ],
    }
    text = json.dumps(transforms, indent=1)
    write_atomically(folder / "transforms.json", lambda path: path.write_text(text))


# ------------------------------------------------------------------------------------- the command


def step_count(text: str) -> int:
    """An argparse type: how many steps a sampler can take."""
    steps = cli.positive_int(text)
    if steps > TIMESTEPS:
        raise argparse.ArgumentTypeError(f"{text}: must be at most {TIMESTEPS}")
    return steps


def add_sampler_flags(group) -> None:
    """Flags shared by sample.py, evaluate.py, tools/ and studies/."""
    group.add_argument(
        "--sampler",
        choices=["ddim", "dpm"],
        default="ddim",
        help="dpm: DPM-Solver++(2M), which takes no eta",
    )
    group.add_argument(
        "--steps",
        type=step_count,
        default=50,
        help="sampling steps (figure 1: 200; Zero-1-to-3's demo: 75)",
    )
    group.add_argument(
        "--eta",
        type=cli.fraction,
        default=1.0,
        help="DDIM's share of fresh noise, 0 to 1 (Zero-1-to-3's demo: 1)",
    )
    group.add_argument(
        "--scale",
        type=cli.finite_float,
        default=3.0,
        help="strength of the guidance, 1 for none (Zero-1-to-3's demo: 3)",
    )
    group.add_argument("--seed", type=cli.seed, default=0, help="of the noise")


def sampler_settings(args: argparse.Namespace, precision: str) -> dict:
    """`sample_latents`'s keyword arguments from the flags of `add_sampler_flags`."""
    return {
        "steps": args.steps,
        "eta": args.eta,
        "scale": args.scale,
        "precision": precision,
        "sampler": args.sampler,
    }


def add_checkpoint_flags(group, nargs: str | None = None) -> None:
    """Flags that open a checkpoint (several, by nargs), shared by all scripts that read one."""
    group.add_argument(
        "--ckpt",
        required=True,
        nargs=nargs,
        help="a run, a step folder, a weights file, a diffusers folder or a hub name",
    )
    group.add_argument(
        "--encoder_weights", help="the image encoder's weights, where the checkpoint has none"
    )
    group.add_argument("--vae", help="the VAE's weights, where the checkpoint has none")
    group.add_argument(
        "--pose",
        choices=POSE_ENCODINGS,
        help="pose encoding of a checkpoint that is not ours; elevation: Stable Zero123's "
        "(default: zero123; ours know theirs)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument(
        "--precision", choices=["bf16", "fp16", "fp32"], help="default: bf16 on a GPU, else fp32"
    )


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_checkpoint_flags(parser.add_argument_group("model"))
    group = parser.add_argument_group("views")
    group.add_argument(
        "--image",
        required=True,
        help="a photo, or a folder of photos. An object is found by transparency or before a plain "
        "background; most ordinary photos need rembg: pip install 'rembg[cpu]'",
    )
    group.add_argument(
        "--crop",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="frame the object as Zero-1-to-3 does; --no-crop for square renders framed as in "
        "training (others are set on a white square)",
    )
    group.add_argument(
        "--azimuth",
        type=cli.degrees,
        nargs="+",
        default=[0.0],
        help="degrees, counter-clockwise as seen from above",
    )
    group.add_argument(
        "--elevation", type=cli.degrees, nargs="+", default=[0.0], help="degrees, upwards"
    )
    group.add_argument(
        "--distance",
        type=cli.scene_units,
        nargs="+",
        default=[0.0],
        help="change of distance in scene units (training is at 1.5 to 2.2)",
    )
    group.add_argument(
        "--orbit",
        type=cli.nonnegative_int,
        default=0,
        metavar="N",
        help="N views evenly around the object, of which the first is at --azimuth",
    )
    group.add_argument(
        "--input_elevation",
        type=cli.input_degrees,
        help="degrees by which the photo's camera stood above the object (default: 0); for "
        "transforms.json, and for a model of --pose elevation",
    )
    group.add_argument(
        "--input_distance",
        type=cli.positive_finite_float,
        default=1.85,
        help="that camera's, in scene units; for transforms.json",
    )
    group = parser.add_argument_group("sampler (the paper names none of its settings)")
    add_sampler_flags(group)
    group.add_argument(
        "--stochastic_conditioning",
        action="store_true",
        help="for consistency: one view at a time; each step is conditioned on the input or on an "
        "earlier view, drawn at random",
    )
    group.add_argument("--batch_size", type=cli.positive_int, default=16, help="views at a time")
    group = parser.add_argument_group("output")
    group.add_argument("--out", default="out/samples", help="folder to write")
    group.add_argument(
        "--save_x0",
        type=cli.nonnegative_int,
        default=0,
        metavar="N",
        help="steps whose predicted x0 is saved, in x0.npz (figure 1)",
    )
    return parser.parse_args()


def saved_steps(steps: int, count: int) -> list[int]:
    """Numbers of the steps whose predicted x0 is saved: `count` of them, evenly spaced.

    The last step is among them and, where there are several, the first.
    """
    return sorted({round(i) for i in np.linspace(steps - 1, 0, count)})


def orbit_azimuths(count: int, start: list[float]) -> list[float]:
    """Azimuths in degrees of `count` views evenly around the object. Raises InputError.

    start: --azimuth's list, which must be of one number.
    """
    if len(start) > 1:
        raise InputError("--azimuth: with --orbit it takes one number, where the orbit starts")
    return [start[0] + 360 * i / count for i in range(count)]


def check_cameras(args: argparse.Namespace) -> None:
    """Raises InputError for a camera beyond the object, and warns of one that looks over a pole."""
    nearest = args.input_distance + min(args.distance)
    if nearest <= 0:
        raise InputError(
            f"--distance {min(args.distance):g}: it is a change, and from --input_distance "
            f"{args.input_distance:g} the camera would come out at {nearest:g}"
        )
    for elevation in args.elevation:
        if abs(args.input_elevation + elevation) > 90:
            print(
                f"WARNING: --elevation {elevation:g}: with --input_elevation "
                f"{args.input_elevation:g} the camera passes over the pole, and is upside down; "
                "no model has seen such views"
            )


def check_distances(encoding: str, poses: Tensor) -> None:
    """Raises InputError where the camera moves away and the model's pose encoding can't say so."""
    if encoding == "elevation" and poses[:, 3].any():
        raise InputError(
            "--distance: this model is told the photo's elevation in the place of the distance"
        )


def load_photos(paths: list[Path], size: int, crop: bool) -> dict[Path, Tensor]:
    """{path: image (3,size,size)}.

    A bad photo among several is named on standard error and left out. Raises InputError where none
    is left.
    """
    if len(paths) == 1:
        return {paths[0]: load_photo(paths[0], size, crop)}
    images = {}
    for path in paths:
        try:
            images[path] = load_photo(path, size, crop)
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not images:
        raise InputError(f"--image: none of the {len(paths)} photos can be used, as said above")
    return images


def main() -> None:
    args = parse_args()
    elevation_is_told = args.input_elevation is not None
    args.input_elevation = args.input_elevation or 0.0
    azimuths = args.azimuth
    if args.orbit:
        azimuths = orbit_azimuths(args.orbit, args.azimuth)
    poses = camera_moves(azimuths, args.elevation, args.distance)
    check_cameras(args)
    labels = move_names(poses)
    paths = list_photos(args.image)
    device, precision = open_device(args.device, args.precision)
    # Photos first: opening the networks takes long.
    images = load_photos(paths, image_size(args.ckpt), args.crop)
    model, encoder, codec, _ = pretrained.load_checkpoint(
        args.ckpt, device, args.encoder_weights, args.vae, args.pose
    )
    if model.pose_encoding == "elevation" and not elevation_is_told:
        print(
            "WARNING: this model is told the photo's elevation, and takes it for 0: give "
            "--input_elevation DEGREES"
        )
    check_distances(model.pose_encoding, poses)
    for path in images:
        check_writable(Path(args.out, path.stem, "input.png"))

    timesteps = ddim_timesteps(args.steps)
    saved_timesteps = [timesteps[i] for i in saved_steps(args.steps, args.save_x0)]
    batches = len(poses)
    if not args.stochastic_conditioning:
        batches = math.ceil(len(poses) / args.batch_size)
    with cli.progress(total=len(images) * args.steps * batches, unit="step") as bar:
        for path, image in images.items():
            bar.set_description(path.name)
            trajectory = {t: [] for t in saved_timesteps}  # of each, x0 batch by batch

            def on_step(i: int, x0: Tensor, trajectory=trajectory) -> None:
                bar.update()
                if timesteps[i] in trajectory:
                    trajectory[timesteps[i]].append(decode(x0, codec).cpu())

            views = sample_views(
                image,
                poses,
                model,
                encoder,
                codec,
                sampler_settings(args, precision),
                args.seed,
                args.batch_size,
                args.stochastic_conditioning,
                on_step,
                args.input_elevation,
            )
            folder = Path(args.out, path.stem)
            write_views(folder, image, views, labels, trajectory)
            write_transforms(
                folder, poses, image.shape[-1], args.input_elevation, args.input_distance
            )
    where = Path(args.out, paths[0].stem) if len(paths) == 1 else Path(args.out)
    print(f"{len(images) * len(poses)} view(s) in {where}/")
    left_out = len(paths) - len(images)
    if left_out:
        raise InputError(
            f"--image {args.image}: {left_out} of {len(paths)} photos left out, as said above"
        )


if __name__ == "__main__":
    run_script(main)
