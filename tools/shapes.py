"""The `shapes` data set: procedural objects, sphere-traced in torch, for trying everything without downloads.

Unions and differences of textured primitives with different colours on every side, so that what a model makes of the
camera move shows; rendered with Zero-1-to-3's cameras to RGBA and depth.
"""

import argparse
import colorsys
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import TAN_HALF_FOV, camera_centre
from lib.cli import HelpFormatter, InputError, require_positive, run_script
from tools.check import add_workers, write_list

# K primitives, all of one formula: the distance to a box of half-edges (hx,hy,hz), rounded by `rounding`, whose hx
# grows by `slope` per unit of z (wedges, cones), over local (x,y,z), or (rho - ring,y,z) where ring >= 0 (revolved).
# Primitive 0 is the body, the next are added to it, and those marked `cut`, which come last, carve it.
KINDS = (
    "sphere",
    "box",
    "pillow",
    "wedge",
    "capsule",
    "cylinder",
    "cone",
    "torus",
    "tube",
)  # bodies, cuts: first six


def make_primitive(kind: str, size: float, rng: np.random.Generator, plain: float = 0.2) -> dict:
    """A primitive about `size` in half-extent at the origin, with random proportions and texture."""
    a, b = rng.uniform(0, 1, 2)
    geometry = {  # ring, hx, hy, hz, rounding, slope; hy = 9 where y bounds nothing
        "sphere": (-1, 0, 0, 0, 0.9, 0),
        "box": (-1, 0.5 + 0.5 * a, 0.8, 0.5 + 0.5 * b, 0.02, 0),
        "pillow": (-1, 0.3 + 0.4 * a, 0.5, 0.3 + 0.4 * b, 0.3, 0),
        "wedge": (-1, 0.45, 0.5 + 0.4 * a, 0.5 + 0.3 * b, 0.02, -0.45 / (0.5 + 0.3 * b)),
        "capsule": (-1, 0, 0, 0.5 + 0.4 * a, 0.35 + 0.2 * b, 0),
        "cylinder": (0, 0.4 + 0.4 * a, 9, 0.4 + 0.5 * b, 0.04, 0),
        "cone": (0, 0.4, 9, 0.6 + 0.3 * b, 0.02, -0.4 / (0.6 + 0.3 * b)),
        "torus": (0.6 + 0.2 * a, 0, 9, 0, 0.2 + 0.15 * b, 0),
        "tube": (0.55 + 0.2 * a, 0.12, 9, 0.25 + 0.4 * b, 0.03, 0),
    }[kind]
    # A colour for each of the six local directions, or the parity of floor(local * frequency) chooses one of two:
    # frequency 0 gives a plain colour, a tiny one two halves, one axis stripes, three axes checks.
    style = rng.choice(
        ["faces", "halves", "stripes", "checks", "plain"], p=[0.55 - plain, 0.2, 0.15, 0.1, plain]
    )
    axis = np.eye(3)[rng.integers(3)]
    frequency = {"halves": 1e-3 * axis, "stripes": 3 * axis, "checks": np.full(3, 2.5)}.get(
        style, np.zeros(3)
    )
    hues = (rng.uniform() + rng.permutation(6) / 6) % 1
    palette = [colorsys.hsv_to_rgb(hue, rng.uniform(0.55, 1), rng.uniform(0.7, 1)) for hue in hues]
    return {"geometry": np.array(geometry) * [*[size] * 5, 1], "rotation": np.eye(3), "centre": np.zeros(3),
            "cut": False, "frequency": frequency / size, "faces": style == "faces", "palette": palette}  # fmt: skip


def pack(primitives: list[dict], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Primitives -> what the renderer takes: each entry stacked to (K,...), float32."""
    return {key: torch.tensor(np.stack([p[key] for p in primitives]), dtype=torch.float32, device=device)
            for key in primitives[0]}  # fmt: skip


def make_object(rng: np.random.Generator) -> list[dict]:
    """A body, two to four parts on its surface, up to two cuts: longest bounding-box edge 1, centred (cuts ignored)."""
    body, n_parts, n_cuts = (
        make_primitive(rng.choice(KINDS[:6]), 1, rng, 0.05),
        rng.integers(2, 5),
        rng.integers(0, 3),
    )
    primitives, sides = [], rng.permutation(np.concatenate([np.eye(3), -np.eye(3)]))
    for i, out in enumerate([np.eye(3)[2], *sides[: n_parts + n_cuts]]):
        # Local z points outwards, give or take, but rings stand on their rim, with x outwards.
        q = np.linalg.qr(
            np.stack([out + rng.normal(0, 0.15, 3), *rng.normal(size=(2, 3))], axis=1)
        )[0].T
        out, size = q[0] * np.sign(q[0] @ out), rng.uniform(0.3, 0.6)
        part = (
            make_primitive(rng.choice(KINDS if i <= n_parts else KINDS[:6]), size, rng)
            if i
            else body
        )
        ring, hx, _, hz, rounding, _ = part["geometry"]
        frame = np.stack(
            [q[1] * np.linalg.det(np.stack([q[1], q[2], out])), q[2], out]
        )  # a rotation
        part["rotation"], part["cut"] = np.roll(frame, ring > 0, axis=0), i > n_parts
        if i:
            along, ray, solid = torch.tensor(3.0), torch.tensor(out[:, None]).float(), pack([body])
            for _ in range(16):  # from outside to the body's surface, not past its centre
                along = (along - distance(solid, along * ray)[0]).clamp(min=0)
            reach = (
                0
                if part["cut"]
                else rng.uniform(0.4, 0.85) * ((ring + hx if ring > 0 else hz) + rounding)
            )
            part["centre"] = out * (along.item() + reach)
        primitives.append(part)

    # Bounds: each primitive's support along the world's axes (K,3), at either end of its z.
    solids = primitives[: n_parts + 1]
    ring, hx, hy, hz, rounding, slope = np.stack([p["geometry"] for p in solids], axis=1)[..., None]
    ax, ay, az = np.stack([p["rotation"] for p in solids], axis=1)
    reach = [np.where(ring >= 0, (ring + hx + slope * z) * np.hypot(ax, ay), (hx + slope * z) * abs(ax) + hy * abs(ay))
             for z in (hz, -hz)]  # fmt: skip
    centres, z = np.stack([p["centre"] for p in solids]), hz * az
    high = (centres + np.maximum(reach[0] + z, reach[1] - z) + rounding).max(0)
    low = (centres - np.maximum(reach[0] - z, reach[1] + z) - rounding).min(0)
    scale = 1 / (high - low).max()
    for p in primitives:
        p["centre"], p["frequency"] = (
            (p["centre"] - (high + low) / 2) * scale,
            p["frequency"] / scale,
        )
        p["geometry"] = p["geometry"] * [*[scale] * 5, 1]
    return primitives


def field(
    geometry: torch.Tensor, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """Signed distance (a lower bound at slopes) at local x, y, z (...) to primitives (6,...), broadcast together."""
    ring, hx, hy, hz, rounding, slope = geometry
    across = torch.where(ring >= 0, torch.hypot(x, y) - ring, x).abs()
    cosine = (1 + slope**2).rsqrt()
    qx, qy, qz = (across - hx - slope * z) * cosine, y.abs() - hy, z.abs() - hz
    outside = (qx.relu() ** 2 + qy.relu() ** 2 + qz.relu() ** 2).sqrt()
    inside = torch.maximum(torch.maximum(qx, qy), qz).clamp(max=0)
    return (outside + inside - rounding) * (
        1 + slope.abs() * cosine
    ).rsqrt()  # the factor: edges more obtuse than 90


def distance(
    shape: dict[str, torch.Tensor], points: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """World points (3,N) -> distance to the surface (N,), index of the nearest primitive (N,), locals (K,3,N)."""
    rotation, n_solid = shape["rotation"], int((shape["cut"] == 0).sum())
    local = (rotation.flatten(0, 1) @ points).unflatten(0, (-1, 3)) - rotation @ shape["centre"][
        ..., None
    ]
    each = field(shape["geometry"].T[..., None], *local.unbind(1))  # (K,N)
    carved, carver = torch.cat([each[:1], -each[n_solid:]]).max(0)
    nearest, index = torch.cat([carved[None], each[1:n_solid]]).min(0)
    return nearest, torch.where((index == 0) & (carver > 0), n_solid - 1 + carver, index), local


def march(shape, origin, direction, t, far, cone: float, steps: int):
    """Sphere tracing of rays (3,N) from t (N,), which it moves: whether each met the surface; those undecided (M,).

    What a ray passes is free to a width of cone * t on either side; it meets what is within twice that.
    """
    active, hit = torch.arange(len(t), device=t.device), torch.zeros_like(t, dtype=torch.bool)
    for _ in range(steps):
        here, o, d = t[active], origin.index_select(1, active), direction.index_select(1, active)
        free = distance(shape, torch.addcmul(o, here, d))[0]
        hit[active] = free < 2 * cone * here
        t[active] = here = here + ((free - cone * here) / (1 + cone)).clamp(min=0)
        active = active[~hit[active] & (here < far[active])]
        if not len(active):
            break
    return hit, active


def render(
    primitives: list[dict], w2c: torch.Tensor, size: int, light: np.ndarray, device: str = "cpu"
):
    """Cameras (V,3,4) -> numpy RGBA uint8 (V,size,size,4), straight alpha, and depth float16 (V,size,size).

    Five rays a pixel give colour and coverage; depth is along the optical axis at the pixel's centre, 0 for background.
    """
    shape, w2c, light = (
        pack(primitives, device),
        w2c.to(device).float(),
        torch.tensor(light, device=device).float(),
    )
    pixel, centre, bound = (
        2 * TAN_HALF_FOV / size,
        camera_centre(w2c),
        0.75**0.5,
    )  # objects lie in the unit cube

    def rays(
        view, y, x
    ):  # view (P,), pixel coordinates (S,P) -> origins, unit directions (3,SP), cosines to the axis
        x, y = x * pixel - TAN_HALF_FOV, TAN_HALF_FOV - y * pixel
        cosine, w = (
            (x * x + y * y + 1).rsqrt(),
            w2c[view, :, :3].permute(1, 2, 0)[..., None, :],
        )  # w: (3,3,1,P)
        direction = (w[0] * x + w[1] * y - w[2]) * cosine
        return (
            centre[view].T[:, None].expand_as(direction).flatten(1),
            direction.flatten(1),
            cosine.flatten(),
        )

    rgba, depth = (
        torch.zeros(len(w2c), size, size, 4, device=device),
        torch.zeros(len(w2c), size, size, device=device),
    )
    pixels = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (len(w2c), size, size)))
    dx, dy = (
        torch.tensor([[0, 1, 3, -1, -3], [0, 3, -1, -3, 1]], device=device)[..., None] / 8
    )  # centre, rotated grid
    for view, y, x in (chunk.unbind(1) for chunk in pixels.split(1 << 16)):
        # First a cone around each pixel, to its first touch of the object; its five rays need only start from there.
        origin, direction, _ = rays(view, y[None] + 0.5, x[None] + 0.5)
        t, far = origin.norm(dim=0) - bound, origin.norm(dim=0) + bound
        near, undecided = march(
            shape, origin, direction, t, far, pixel * 0.5**0.5, steps=24
        )  # half its diagonal
        near[undecided] = True
        view, y, x, t, far = view[near], y[near], x[near], t[near].repeat(5), far[near].repeat(5)
        origin, direction, cosine = rays(view, y + 0.5 + dy, x + 0.5 + dx)  # (3,5P)
        hit, _ = march(
            shape, origin, direction, t, far, pixel * 0.02, steps=128
        )  # so many only along a face

        _, index, local = distance(shape, (origin + t * direction)[:, hit])
        local = local.gather(0, index.expand(1, 3, -1))[
            0
        ]  # (3,H), in the frame of the nearest primitive
        taps = (
            local[:, None]
            + 1e-3 * torch.cat([torch.eye(3), -torch.eye(3)], dim=1).to(device)[..., None]
        )  # (3,6,H)
        ahead, behind = field(shape["geometry"].T[:, None, index], *taps).split(3)
        normal = torch.nn.functional.normalize(ahead - behind, dim=0)  # (3,H)
        lit = (normal * (shape["rotation"] @ light).T[:, index]).sum(0) * (1 - 2 * shape["cut"])[
            index
        ]
        parity = (local * shape["frequency"].T[:, index]).floor().sum(0).long() % 2
        side = torch.cat([normal, -normal]).argmax(0)  # the local direction that the surface faces
        colour = shape["palette"][
            index, torch.where(shape["faces"][index] > 0, side, parity)
        ]  # (H,3)
        rgb = torch.zeros(len(t), 3, device=device)
        rgb[hit] = (
            colour * (0.72 + 0.28 * lit)[:, None]
        )  # wrapped Lambert, from .44 to 1: no side black

        cover = hit.view(5, -1).float()
        rgb = rgb.view(5, -1, 3).sum(0) / cover.sum(0).clamp(min=1)[:, None]
        rgba[view, y, x] = torch.cat([rgb, cover.mean(0)[:, None]], dim=1)
        depth[view, y, x] = (t * cosine).view(5, -1)[0] * cover[0]
    return (rgba * 255).round().byte().cpu().numpy(), depth.half().cpu().numpy()


def look_at(theta, phi, radius) -> torch.Tensor:
    """Spherical coordinates (numbers or broadcastable tensors, radians) -> (...,3,4) float64 world-to-camera.

    The camera looks at the origin with world z up. Right and up are the derivatives of its position by phi and -theta,
    which unlike cross products with z stay defined at the poles.
    """
    theta, phi, r = torch.broadcast_tensors(
        *(torch.as_tensor(v, dtype=torch.float64) for v in (theta, phi, radius))
    )
    st, ct, sp, cp, zero = theta.sin(), theta.cos(), phi.sin(), phi.cos(), torch.zeros_like(r)
    right, up, back = (
        (-sp, cp, zero, zero),
        (-ct * cp, -ct * sp, st, zero),
        (st * cp, st * sp, ct, -r),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in (right, up, back)], dim=-2)


def write_object(
    out: Path,
    views: int,
    size: int,
    seed: int,
    device: str,
    orbit: bool,
    plain: bool,
    digits: int,
    index: int,
) -> str:
    """Makes and renders object `index`, which depends on (seed, index) only. Returns its name."""
    rng, folder = np.random.default_rng((seed, index)), out / f"{index:0{digits}d}"
    primitives, light = make_object(rng), rng.normal(size=3) + [0, 0, 1]
    if plain:
        primitives = [p | {"faces": False, "frequency": np.zeros(3)} for p in primitives]
    z, phi, radius = torch.tensor(
        rng.uniform((-1, -math.pi, 1.5), (1, math.pi, 2.2), (views, 3))
    ).unbind(1)
    if orbit:  # from view 0 once around, counter-clockwise from above, 0 to 45 degrees up
        z, phi, radius = (
            z[0].abs() * 0.5**0.5,
            phi[0] + torch.arange(views) * 2 * math.pi / views,
            radius[0],
        )
    w2c = look_at(torch.acos(z), phi, radius)
    rgba, depth = render(primitives, w2c, size, light / np.linalg.norm(light), device)
    folder.mkdir(parents=True)
    for i in range(views):
        Image.fromarray(rgba[i]).save(folder / f"{i:03d}.png")
        np.save(folder / f"{i:03d}.npy", w2c[i].float().numpy())
        np.save(folder / f"{i:03d}_depth.npy", depth[i])
    return folder.name


def shapes(
    out: Path,
    objects: int,
    views: int,
    size: int,
    seed: int,
    device: str,
    workers: int,
    orbit=False,
    plain=False,
):
    """Writes a data set of procedural objects."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists and is not an empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device")
    work = partial(
        write_object, out, views, size, seed, device, orbit, plain, max(5, len(str(objects - 1)))
    )
    workers = 0 if device == "cuda" else workers
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # many small operations: threads only wait for each other; processes share the work
    loader = DataLoader(range(objects), batch_size=None, collate_fn=work, num_workers=workers)
    write_list(out, list(tqdm(loader, desc="shapes", unit="object")))
    torch.set_num_threads(threads)


def main() -> None:
    text = "Render procedural objects: RGBA, poses and depth."
    parser = argparse.ArgumentParser(description=text, formatter_class=HelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; must be empty or absent"
    )
    parser.add_argument("--objects", type=int, default=512, help="number of objects")
    parser.add_argument(
        "--views", type=int, default=12, help="views of each object (Zero-1-to-3: 12)"
    )
    parser.add_argument("--size", type=int, default=64, help="width and height in pixels")
    parser.add_argument("--seed", type=int, default=0, help="object i depends on this and i only")
    parser.add_argument(
        "--orbit", action="store_true", help="views evenly around the object instead of anywhere"
    )
    parser.add_argument(
        "--plain", action="store_true", help="a colour a primitive instead of one on every side"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to render")
    add_workers(parser)
    args = parser.parse_args()
    require_positive(args, "objects", "views", "size")
    shapes(
        args.out,
        args.objects,
        args.views,
        args.size,
        args.seed,
        args.device,
        args.workers,
        args.orbit,
        args.plain,
    )


if __name__ == "__main__":
    run_script(main)
