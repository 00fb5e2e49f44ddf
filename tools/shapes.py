"""Makes a data set of procedural objects, sphere-traced in torch: training data without a download.

    python -m tools.shapes --out out/cars --objects 512 --views 12 --size 32
    python -m tools.shapes --out out/blocks --kind blocks --plain --objects 512

Cars have an up, a front (yellow lights) and a back (red ones), like 3DiM's (Watson et al. 2022), so
that a small model learns what a camera move means. Blocks are random unions and differences of
primitives. They have no canonical orientation and are seen from everywhere.

One light shines on all objects. Cameras are Zero-1-to-3's; the top of data.py gives the layout of
the data set. Each view also gets %03d_depth.npy: float16 depth along the optical axis, 0 for the
background.
"""

import colorsys
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from data import TAN_HALF_FOV, camera_centre
from lib.cli import ArgumentParser, InputError, nonnegative_int, positive_int, progress, run_script
from tools.check import add_workers, write_list

LIGHT = np.array([0.35, 0.2, 0.9]) / np.linalg.norm([0.35, 0.2, 0.9])  # the direction towards it
BOUND = 0.75**0.5  # objects lie in the unit cube, and so in a ball of this radius

# -------------------------------------------------------------------------------------- primitives
# All primitives share one formula, so that a batch of rays meets all of them at once (see `field`).
# Its seven numbers are ring, hx, hy, hz, rounding, slope, gap: a box of half-edges (hx, hy, hz),
# rounded by `rounding`, over local coordinates (x, y, z).
#   slope: hx grows by this much per unit of z (wedges, cones).
#   ring:  where >= 0, the box is revolved about z: its x is the distance to a circle so wide.
#   gap:   where > 0, two copies stand at z = gap and z = -gap (the wheels of an axle).


def make_primitive(
    geometry: tuple,
    palette: list,
    centre: tuple = (0, 0, 0),
    rotation: np.ndarray | None = None,
    faces: bool = False,
) -> dict:
    """A solid primitive; the rows of `rotation` are its local axes in the world.

    palette: six colours. With `faces` each is that of one local direction (+x, +y, +z, -x, -y, -z).
    Else the surface has the first; `frequency` may add a pattern of the first two.
    """
    return {
        "geometry": np.array(geometry, dtype=float),
        "rotation": np.eye(3) if rotation is None else rotation,
        "centre": np.array(centre, dtype=float),
        "palette": palette,
        "faces": faces,
        "frequency": np.zeros(3),  # the parity of floor(local * frequency) chooses the colour
        "cut": False,  # whether it carves primitive 0 instead of being added to it
    }


def resized(primitive: dict, scale: float) -> dict:
    """The primitive scaled about the origin."""
    lengths = [scale, scale, scale, scale, scale, 1, scale]  # the slope is a ratio
    return {
        **primitive,
        "geometry": primitive["geometry"] * lengths,
        "centre": primitive["centre"] * scale,
        "frequency": primitive["frequency"] / scale,
    }


def bounding_box(primitives: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(lowest, highest) corner of a union of primitives, each (3,)."""
    ring, hx, hy, hz, rounding, slope, gap = np.stack([p["geometry"] for p in primitives], axis=1)[
        ..., None
    ]
    axis_x, axis_y, axis_z = np.stack([p["rotation"] for p in primitives], axis=1)  # (K, 3) each
    centre = np.stack([p["centre"] for p in primitives])

    def across(half_x):  # how far an end's outline reaches along the world's axes
        revolved = (ring + half_x) * np.hypot(axis_x, axis_y)
        straight = half_x * abs(axis_x) + hy * abs(axis_y)
        return np.where(ring >= 0, revolved, straight)

    top = across(hx + slope * hz)
    bottom = across(hx - slope * hz)
    along = (hz + gap) * axis_z
    high = centre + np.maximum(top + along, bottom - along) + rounding
    low = centre - np.maximum(top - along, bottom + along) - rounding
    return low.min(axis=0), high.max(axis=0)


def fit_unit_cube(primitives: list[dict]) -> list[dict]:
    """Primitives moved and scaled: the longest edge of their box is 1 and it is centred.

    Cuts only take away, so they do not count.
    """
    low, high = bounding_box([p for p in primitives if not p["cut"]])
    middle = (low + high) / 2
    moved = [{**p, "centre": p["centre"] - middle} for p in primitives]
    return [resized(p, 1 / (high - low).max()) for p in moved]


# -------------------------------------------------------------------------------------------- cars
# x points to the front, y to the left, z up.

ALONG_Y = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # local z is the world's y
TYRE = (0.08, 0.08, 0.09)
GLASS = (0.16, 0.21, 0.28)
HEADLIGHT = (1.0, 0.85, 0.2)
TAIL_LIGHT = (0.85, 0.05, 0.05)


def box(half_edges, rounding: float, palette: list, centre: tuple, slope: float = 0, **options):
    """A rounded box of these outer half-edges."""
    hx, hy, hz = np.array(half_edges) - rounding
    return make_primitive((-1, hx, hy, hz, rounding, slope, 0), palette, centre, **options)


def paint(rng: np.random.Generator) -> tuple[float, float, float]:
    """A random strong colour."""
    return colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.5, 1), rng.uniform(0.45, 1))


def make_car(rng: np.random.Generator) -> list[dict]:
    """A car of random proportions and colours, its longest edge 1, centred."""
    body_size = rng.uniform((0.40, 0.16, 0.06), (0.46, 0.22, 0.11))
    colour = paint(rng)
    body = box(body_size, rng.uniform(0.02, 0.05), [colour] * 6, (0, 0, 0))
    cabin = make_cabin(rng, body_size, colour)
    wheels = make_wheels(rng, body_size)
    lights = make_lights(rng, body_size)
    car = [body, cabin, *wheels, *lights]
    if rng.uniform() < 0.4:
        car.append(make_roof_load(rng, cabin))
    return fit_unit_cube(car)


def make_cabin(rng: np.random.Generator, body_size: np.ndarray, colour: tuple) -> dict:
    """A cabin on the body that tapers upwards, with windows on its four sides."""
    length, width, height = body_size
    half_height = rng.uniform(0.05, 0.085)
    bottom = rng.uniform(0.17, 0.28)
    taper = rng.uniform(0.2, 0.85)  # below 1: steeper than 45 degrees, so that windows face ahead
    side = width * rng.uniform(0.78, 0.95)
    offset = rng.uniform(-0.22, -0.08)  # towards the back: the bonnet is the long end
    room = length - bottom - 0.02
    x = max(-room, offset)

    roof = colour
    if rng.uniform() < 0.3:
        roof = paint(rng)
    palette = [GLASS, GLASS, roof, GLASS, GLASS, roof]
    half_edges = (bottom - taper * half_height, side, half_height)
    centre = (x, 0, height + half_height - 0.02)
    return box(half_edges, 0.02, palette, centre, slope=-taper, faces=True)


def make_wheels(rng: np.random.Generator, body_size: np.ndarray) -> list[dict]:
    """Two axles of dark wheels: cylinders along y, which stick out of the body a little."""
    length, width, height = body_size
    radius = rng.uniform(0.075, 0.11)
    half_width = rng.uniform(0.03, 0.045)
    rounding = 0.015
    gap = width + 0.015 - half_width
    geometry = (0, radius - rounding, 9, half_width - rounding, rounding, 0, gap)
    wheels = []
    for end in (1, -1):
        x = end * (length - radius - rng.uniform(0.02, 0.08))
        wheels.append(make_primitive(geometry, [TYRE] * 6, (x, 0, -height), ALONG_Y))
    return wheels


def make_lights(rng: np.random.Generator, body_size: np.ndarray) -> list[dict]:
    """Two yellow lights in front, two red ones behind."""
    length, width, height = body_size
    half_width = rng.uniform(0.055, 0.075)  # large, so that 32 pixels show them
    half_height = rng.uniform(0.035, 0.05)
    rounding = 0.01
    gap = width - half_width - 0.01
    lights = []
    for end, colour in ((1, HEADLIGHT), (-1, TAIL_LIGHT)):
        half_edges = np.array([0.05, half_height, half_width]) - rounding
        geometry = (-1, *half_edges, rounding, 0, gap)
        centre = (end * (length - 0.015), 0, height - 0.6 * half_height)
        lights.append(make_primitive(geometry, [colour] * 6, centre, ALONG_Y))
    return lights


def make_roof_load(rng: np.random.Generator, cabin: dict) -> dict:
    """A box or a ball on the roof, often to one side."""
    _, half_length, half_width, half_height, rounding, slope, _ = cabin["geometry"]
    x, _, z = cabin["centre"]
    roof = z + half_height + rounding
    y = rng.uniform(-0.5, 0.5) * half_width
    if rng.uniform() < 0.3:
        radius = rng.uniform(0.05, 0.08)
        ball = (-1, 0, 0, 0, radius, 0, 0)
        return make_primitive(ball, [paint(rng)] * 6, (x, y, roof + 0.5 * radius))
    half_edges = rng.uniform((0.05, 0.04, 0.03), (0.12, 0.10, 0.06))
    return box(half_edges, 0.015, [paint(rng)] * 6, (x, y, roof + half_edges[2] - 0.01))


# ------------------------------------------------------------------------------------------ blocks

BODIES = ("sphere", "box", "pillow", "wedge", "capsule", "cylinder")  # of bodies and of cuts
PARTS = (*BODIES, "cone", "torus", "tube")


def make_block(
    kind: str, size: float, rng: np.random.Generator, plain_share: float = 0.2, plain: bool = False
) -> dict:
    """A primitive about `size` in half-extent at the origin, with random proportions and texture.

    plain_share: how often it has a single colour. With `plain` it always has; its shape stays.
    """
    a, b = rng.uniform(0, 1, 2)
    geometry = {  # ring, hx, hy, hz, rounding, slope, gap; hy = 9 where y bounds nothing
        "sphere": (-1, 0, 0, 0, 0.9, 0, 0),
        "box": (-1, 0.5 + 0.5 * a, 0.8, 0.5 + 0.5 * b, 0.02, 0, 0),
        "pillow": (-1, 0.3 + 0.4 * a, 0.5, 0.3 + 0.4 * b, 0.3, 0, 0),
        "wedge": (-1, 0.45, 0.5 + 0.4 * a, 0.5 + 0.3 * b, 0.02, -0.45 / (0.5 + 0.3 * b), 0),
        "capsule": (-1, 0, 0, 0.5 + 0.4 * a, 0.35 + 0.2 * b, 0, 0),
        "cylinder": (0, 0.4 + 0.4 * a, 9, 0.4 + 0.5 * b, 0.04, 0, 0),
        "cone": (0, 0.4, 9, 0.6 + 0.3 * b, 0.02, -0.4 / (0.6 + 0.3 * b), 0),
        "torus": (0.6 + 0.2 * a, 0, 9, 0, 0.2 + 0.15 * b, 0, 0),
        "tube": (0.55 + 0.2 * a, 0.12, 9, 0.25 + 0.4 * b, 0.03, 0, 0),
    }[kind]
    styles = ["faces", "halves", "stripes", "checks", "plain"]
    style = rng.choice(styles, p=[0.55 - plain_share, 0.2, 0.15, 0.1, plain_share])
    axis = np.eye(3)[rng.integers(3)]
    frequency = {"halves": 1e-3 * axis, "stripes": 3 * axis, "checks": np.full(3, 2.5)}
    hues = (rng.uniform() + rng.permutation(6) / 6) % 1
    palette = [colorsys.hsv_to_rgb(h, rng.uniform(0.55, 1), rng.uniform(0.7, 1)) for h in hues]
    primitive = make_primitive(geometry, palette)
    if not plain:
        primitive["faces"] = style == "faces"
        primitive["frequency"] = frequency.get(style, np.zeros(3))
    return resized(primitive, size)


def make_blocks(rng: np.random.Generator, plain: bool = False) -> list[dict]:
    """A body, two to four parts on its surface, up to two cuts; its longest edge 1, centred."""
    body = make_block(rng.choice(BODIES), 1, rng, plain_share=0.05, plain=plain)
    body["rotation"] = random_rotation(rng, np.array([0, 0, 1]), body)
    n_parts = rng.integers(2, 5)
    n_cuts = rng.integers(0, 3)
    sides = rng.permutation(np.concatenate([np.eye(3), -np.eye(3)]))
    primitives = [body]
    for side in sides[:n_parts]:
        primitives.append(make_part(rng, body, side, plain))
    for side in sides[n_parts : n_parts + n_cuts]:
        primitives.append(make_cut(rng, body, side, plain))
    return fit_unit_cube(primitives)


def is_ring(block: dict) -> bool:
    """Whether it is a torus or a tube."""
    return block["geometry"][0] > 0


def random_rotation(rng: np.random.Generator, outwards: np.ndarray, block: dict) -> np.ndarray:
    """Local axes whose z points about outwards. Rings stand on their rim: their x does."""
    tilted = outwards + rng.normal(0, 0.15, 3)
    columns = np.stack([tilted, *rng.normal(size=(2, 3))], axis=1)
    axes = np.linalg.qr(columns)[0].T
    z = axes[0] * np.sign(axes[0] @ outwards)
    rotation = np.stack([axes[1], np.cross(z, axes[1]), z])
    return np.roll(rotation, int(is_ring(block)), axis=0)


def make_part(rng: np.random.Generator, body: dict, side: np.ndarray, plain: bool) -> dict:
    """A primitive that stands on this side of the body, sunk into it by up to 60%."""
    part = make_block(rng.choice(PARTS), rng.uniform(0.3, 0.6), rng, plain=plain)
    part["rotation"] = random_rotation(rng, side, part)
    ring, hx, _, hz, rounding, _, _ = part["geometry"]
    reach = rounding + (ring + hx if is_ring(part) else hz)
    outwards = part["rotation"][0 if is_ring(part) else 2]
    part["centre"] = outwards * (surface_along(body, outwards) + rng.uniform(0.4, 0.85) * reach)
    return part


def make_cut(rng: np.random.Generator, body: dict, side: np.ndarray, plain: bool) -> dict:
    """A primitive centred on this side of the body, which carves it."""
    cut = make_block(rng.choice(BODIES), rng.uniform(0.3, 0.6), rng, plain=plain)
    cut["rotation"] = random_rotation(rng, side, cut)
    cut["cut"] = True
    outwards = cut["rotation"][2]
    cut["centre"] = outwards * surface_along(body, outwards)
    return cut


def surface_along(body: dict, direction: np.ndarray) -> float:
    """How far the body's surface is from the origin in this direction."""
    scene = pack([body])
    ray = torch.tensor(direction[:, None], dtype=torch.float32)
    along = torch.tensor(3.0)
    for _ in range(16):  # from outside to the surface, not past the centre
        along = (along - distance(scene, along * ray)[0]).clamp(min=0)
    return along.item()


# ---------------------------------------------------------------------------------- sphere tracing


def pack(primitives: list[dict], device: str = "cpu") -> dict[str, Tensor]:
    """Primitives -> what the renderer takes: each entry stacked to (K, ...), float32."""
    scene = {}
    for key in primitives[0]:
        stacked = np.stack([p[key] for p in primitives])
        scene[key] = torch.tensor(stacked, dtype=torch.float32, device=device)
    return scene


def field(geometry: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Signed distance at local x, y, z (...) to primitives (7, ...), broadcast together.

    Where there is a slope it is a lower bound, which is all that sphere tracing needs.
    """
    ring, hx, hy, hz, rounding, slope, gap = geometry
    across = torch.where(ring >= 0, torch.hypot(x, y) - ring, x).abs()
    cosine = (1 + slope**2).rsqrt()
    qx = (across - hx - slope * z) * cosine
    qy = y.abs() - hy
    qz = (z.abs() - gap).abs() - hz
    outside = (qx.relu() ** 2 + qy.relu() ** 2 + qz.relu() ** 2).sqrt()
    inside = torch.maximum(torch.maximum(qx, qy), qz).clamp(max=0)
    obtuse = (1 + slope.abs() * cosine).rsqrt()  # edges of more than 90 degrees come closer
    return (outside + inside - rounding) * obtuse


def distance(scene: dict[str, Tensor], points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """World points (3, N) -> distance to the surface (N,), the primitive there (N,), locals.

    Locals (K, 3, N) are the points in the frame of each primitive.
    """
    rotation = scene["rotation"]
    n_solid = int((scene["cut"] == 0).sum())  # cuts come last
    rotated = (rotation.flatten(0, 1) @ points).unflatten(0, (-1, 3))
    local = rotated - rotation @ scene["centre"][..., None]
    each = field(scene["geometry"].T[..., None], *local.unbind(1))  # (K, N)
    carved, carver = torch.cat([each[:1], -each[n_solid:]]).max(0)
    nearest, index = torch.cat([carved[None], each[1:n_solid]]).min(0)
    index = torch.where((index == 0) & (carver > 0), n_solid - 1 + carver, index)
    return nearest, index, local


def march(scene, origin: Tensor, direction: Tensor, start: Tensor, far: Tensor, cone: float, steps):
    """Sphere tracing of rays (3, N) from distance `start` (N,) to `far` (N,).

    A ray is a cone of half-width cone * t: what it passes is at least that far away, and it has
    met the surface where that is within twice as much.
    Returns the distance reached (N,), whether each ray met the surface (N,), and the indices of
    those that were still on their way after this many steps (M,).
    """
    t = start.clone()
    active = torch.arange(len(t), device=t.device)
    hit = torch.zeros_like(t, dtype=torch.bool)
    for _ in range(steps):
        here = t[active]
        o = origin.index_select(1, active)
        d = direction.index_select(1, active)
        free = distance(scene, torch.addcmul(o, here, d))[0]
        hit[active] = free < 2 * cone * here
        here = here + ((free - cone * here) / (1 + cone)).clamp(min=0)
        t[active] = here
        active = active[~hit[active] & (here < far[active])]
        if not len(active):
            break
    return t, hit, active


def camera_rays(w2c: Tensor, view: Tensor, x: Tensor, y: Tensor, size: int):
    """Rays through image points x, y (S, P), in pixels, of the cameras w2c[view], view (P,).

    Returns origins and unit directions (3, S * P), and cosines to the optical axis (S * P,).
    """
    x = (2 * x / size - 1) * TAN_HALF_FOV
    y = (1 - 2 * y / size) * TAN_HALF_FOV
    cosine = (x * x + y * y + 1).rsqrt()
    right, up, back = w2c[view, :, :3].permute(1, 2, 0)[:, :, None]  # (3, 1, P) each
    direction = (right * x + up * y - back) * cosine
    origin = camera_centre(w2c)[view].T[:, None].expand_as(direction)
    return origin.flatten(1), direction.flatten(1), cosine.flatten()


def shade(scene: dict[str, Tensor], points: Tensor) -> Tensor:
    """Colours (H, 3) of points on the surface (3, H)."""
    _, index, local = distance(scene, points)
    local = local.gather(0, index.expand(1, 3, -1))[0]  # (3, H): in the frame of its primitive
    steps = 1e-3 * torch.cat([torch.eye(3), -torch.eye(3)], dim=1).to(points.device)
    taps = local[:, None] + steps[..., None]  # (3, 6, H)
    ahead, behind = field(scene["geometry"].T[:, None, index], *taps).split(3)
    normal = torch.nn.functional.normalize(ahead - behind, dim=0)

    light = torch.tensor(LIGHT, dtype=torch.float32, device=points.device)
    inwards = scene["cut"][index]  # the wall of a hole faces into the cut
    lit = (normal * (scene["rotation"] @ light).T[:, index]).sum(0) * (1 - 2 * inwards)
    parity = (local * scene["frequency"].T[:, index]).floor().sum(0).long() % 2
    side = torch.cat([normal, -normal]).argmax(0)  # the local direction that the surface faces
    choice = torch.where(scene["faces"][index] > 0, side, parity)
    colour = scene["palette"][index, choice]
    return colour * (0.72 + 0.28 * lit)[:, None]  # from .44 to 1: no side is black


def render(primitives: list[dict], w2c: Tensor, size: int, device: str = "cpu"):
    """Views of an object from cameras w2c (V, 3, 4).

    Returns numpy RGBA (V, size, size, 4) uint8 with straight alpha, and depth (V, size, size)
    float16. Five rays a pixel give colour and coverage, the middle one gives the depth.
    """
    scene = pack(primitives, device)
    w2c = w2c.to(device).float()
    rgba = torch.zeros(len(w2c), size, size, 4, device=device)
    depth = torch.zeros(len(w2c), size, size, device=device)
    pixels = [torch.arange(n, device=device) for n in (len(w2c), size, size)]
    for chunk in torch.cartesian_prod(*pixels).split(1 << 16):
        near, start = pixels_near(scene, w2c, chunk, size)
        view, y, x = near.unbind(1)
        rgba[view, y, x], depth[view, y, x] = trace(scene, w2c, near, start, size)
    return (rgba * 255).round().byte().cpu().numpy(), depth.half().cpu().numpy()


def pixels_near(scene, w2c: Tensor, pixels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Those of the pixels (P, 3), as (view, y, x), in which the object may be seen (N, 3).

    Also how far their rays are free (N,): one cone around each pixel finds both, at a fifth of the
    price of its five rays.
    """
    view, y, x = pixels.unbind(1)
    origin, direction, _ = camera_rays(w2c, view, x[None] + 0.5, y[None] + 0.5, size)
    start = origin.norm(dim=0) - BOUND
    far = origin.norm(dim=0) + BOUND
    half_diagonal = 0.5**0.5 * 2 * TAN_HALF_FOV / size
    reached, near, undecided = march(scene, origin, direction, start, far, half_diagonal, steps=24)
    near[undecided] = True
    return pixels[near], reached[near]


def trace(scene, w2c: Tensor, pixels: Tensor, start: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """RGBA (N, 4) in [0, 1] and depth (N,) of pixels (N, 3), whose rays are free up to `start`."""
    view, y, x = pixels.unbind(1)
    offsets = torch.tensor([[0, 1, 3, -1, -3], [0, 3, -1, -3, 1]], device=pixels.device) / 8
    dx, dy = offsets[..., None]  # the centre and a rotated grid: (5, 1) each
    origin, direction, cosine = camera_rays(w2c, view, x + 0.5 + dx, y + 0.5 + dy, size)
    far = origin.norm(dim=0) + BOUND
    tolerance = 0.02 * 2 * TAN_HALF_FOV / size  # a fiftieth of a pixel
    # Rays along a face are the only ones that take so many steps.
    t, hit, _ = march(scene, origin, direction, start.repeat(5), far, tolerance, steps=128)

    rgb = torch.zeros(len(t), 3, device=pixels.device)
    rgb[hit] = shade(scene, (origin + t * direction)[:, hit])
    hits = hit.view(5, -1).float()
    rgb = rgb.view(5, -1, 3).sum(0) / hits.sum(0).clamp(min=1)[:, None]
    rgba = torch.cat([rgb, hits.mean(0)[:, None]], dim=1)
    return rgba, (t * cosine).view(5, -1)[0] * hits[0]


# ------------------------------------------------------------------------------ cameras, data sets


def look_at(theta, phi, radius) -> Tensor:
    """Spherical coordinates, numbers or broadcastable tensors, radians -> (..., 3, 4) float64.

    The result is world-to-camera. The camera looks at the origin with world z up. Right and up are
    the derivatives of its position by phi and -theta, so they are defined at the poles, too.
    """
    coordinates = (torch.as_tensor(v, dtype=torch.float64) for v in (theta, phi, radius))
    theta, phi, r = torch.broadcast_tensors(*coordinates)
    st, ct = theta.sin(), theta.cos()
    sp, cp = phi.sin(), phi.cos()
    zero = torch.zeros_like(r)
    right = torch.stack([-sp, cp, zero, zero], dim=-1)
    up = torch.stack([-ct * cp, -ct * sp, st, zero], dim=-1)
    back = torch.stack([st * cp, st * sp, ct, -r], dim=-1)
    return torch.stack([right, up, back], dim=-2)


HEIGHTS = {"cars": (-0.1, 0.95), "blocks": (-1, 1)}  # of the cameras, as z / r


def random_cameras(rng: np.random.Generator, kind: str, views: int, orbit: bool) -> Tensor:
    """Cameras (V, 3, 4): evenly over the part of the sphere from which the kind is seen.

    With `orbit` they go once around from view 0, counter-clockwise from above, 0 to 45 degrees up.
    """
    low, high = HEIGHTS[kind]
    draws = rng.uniform((low, -math.pi, 1.5), (high, math.pi, 2.2), (views, 3))
    z, phi, radius = torch.tensor(draws).unbind(1)
    if orbit:
        z = z[0].abs() * 0.5**0.5
        phi = phi[0] + torch.arange(views) * 2 * math.pi / views
        radius = radius[0]
    return look_at(torch.acos(z), phi, radius)


def make_object(kind: str, seed: int, index: int, plain: bool = False):
    """(primitives, random generator for its cameras) of object `index`; of (seed, index) alone."""
    rng = np.random.default_rng((seed, index))
    if kind == "cars":
        return make_car(rng), rng
    return make_blocks(rng, plain), rng


def write_object(
    out: Path,
    kind: str,
    views: int,
    size: int,
    seed: int,
    device: str,
    orbit: bool,
    plain: bool,
    digits: int,
    index: int,
) -> str:
    """Makes and renders object `index`. Returns its name."""
    primitives, rng = make_object(kind, seed, index, plain)
    w2c = random_cameras(rng, kind, views, orbit)
    rgba, depth = render(primitives, w2c, size, device)
    folder = out / f"{index:0{digits}d}"
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
    orbit: bool = False,
    plain: bool = False,
    kind: str = "cars",
) -> None:
    """Writes a data set of procedural objects, whole or not at all. See the flags of `main`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists and is not an empty folder")
    part = out.with_name(f"{out.name}.part")  # an interrupted tree must not pass for a whole one
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device")
    if device == "cuda":
        workers = 0
    digits = max(5, len(str(objects - 1)))
    work = partial(write_object, part, kind, views, size, seed, device, orbit, plain, digits)
    # Many small operations: threads only wait for each other, so processes share the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # The DataLoader serves as an ordered parallel map: collate_fn runs in the workers.
    loader = DataLoader(range(objects), batch_size=None, collate_fn=work, num_workers=workers)
    write_list(part, list(progress(loader, desc="shapes", unit="object")))
    part.replace(out)
    torch.set_num_threads(threads)


def main() -> None:
    parser = ArgumentParser(__doc__, prog="python -m tools.shapes")
    flag = parser.add_argument
    flag("--out", type=Path, required=True, help="folder to write; must be empty or absent")
    flag("--kind", choices=["cars", "blocks"], default="cars", help="what the objects are")
    flag("--objects", type=positive_int, default=512, help="number of objects")
    flag("--views", type=positive_int, default=12, help="views of each object (Zero-1-to-3: 12)")
    flag("--size", type=positive_int, default=32, help="width and height in pixels")
    flag("--seed", type=nonnegative_int, default=0, help="object i depends on this and i only")
    flag("--orbit", action="store_true", help="views evenly around the object, not anywhere")
    flag("--plain", action="store_true", help="blocks: one colour a primitive, not one a side")
    flag("--device", choices=["cpu", "cuda"], default="cpu", help="where to render")
    add_workers(parser)
    args = parser.parse_args()
    if args.plain and args.kind != "blocks":
        raise InputError("--plain: for --kind blocks; cars have a colour a part")
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
        args.kind,
    )


if __name__ == "__main__":
    run_script(main)
