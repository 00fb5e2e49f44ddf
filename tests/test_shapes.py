"""tools/shapes.py: procedural objects against their own cameras."""

import math

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image

import data
from lib.cli import InputError
from tools import shapes
from tools.shapes import look_at

KINDS = ["cars", "blocks"]


def mean_colour(rgba: np.ndarray) -> np.ndarray:
    """Of the visible part of views (V, H, W, 4): (V, 3)."""
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha).sum((1, 2)) / alpha.sum((1, 2))


def world_points(depth: np.ndarray, w2c: torch.Tensor) -> np.ndarray:
    """What depth maps (V, S, S) of cameras (V, 3, 4) show, in world coordinates: (N, 3)."""
    view, y, x = np.nonzero(depth)
    d = depth[view, y, x].astype(np.float64)
    half = depth.shape[1] / 2
    right = ((x + 0.5) / half - 1) * d * 16 / 35
    up = (1 - (y + 0.5) / half) * d * 16 / 35
    camera = np.stack([right, up, -d], axis=1)
    w2c = w2c.numpy()[view]
    return np.einsum("nij,ni->nj", w2c[:, :, :3], camera - w2c[:, :, 3])


def test_a_sphere_appears_where_the_camera_says():
    """Centroid, coverage and depth of a small off-centre sphere against its projection."""
    centre = np.array([0.3, -0.2, 0.25])
    radius = 0.1
    size = 96
    ball = shapes.make_primitive((-1, 0, 0, 0, radius, 0, 0), [(1, 0, 0)] * 6, centre)
    generator = torch.Generator().manual_seed(0)
    z, phi, r = torch.rand(3, 6, generator=generator).double()
    w2c = look_at(torch.acos(2 * z - 1), 6.28 * phi, 1.5 + 0.7 * r)
    rgba, depth = shapes.render([ball], w2c, size)
    x, y, z = (w2c[:, :, :3] @ torch.tensor(centre) + w2c[:, :, 3]).T.numpy()
    alpha = rgba[..., 3] / 255
    assert set(np.unique(rgba[..., 3])) > {0, 255}  # edges are antialiased
    pixels = np.arange(size) + 0.5
    for i in range(6):
        # 35 / 16 is the focal length in half image widths; image x grows right and y down.
        projected = np.array([1 + 35 / 16 * x[i] / -z[i], 1 - 35 / 16 * y[i] / -z[i]])
        expected = size / 2 * projected
        found = np.array([(alpha[i].sum(0) * pixels).sum(), (alpha[i].sum(1) * pixels).sum()])
        assert np.abs(found / alpha[i].sum() - expected).max() < 0.3
        area = math.pi * (35 / 32 * size * radius / -z[i]) ** 2
        assert alpha[i].sum() == pytest.approx(area, rel=0.08)
        column, row = expected.astype(int)
        assert depth[i, row, column] == pytest.approx(-z[i] - radius, abs=0.01)
        assert depth[i][alpha[i] == 0].max() == 0


def test_a_gap_makes_two_copies():
    """The wheels of an axle: distances to a ball at z = .3 and one at z = -.3."""
    pair = shapes.pack([shapes.make_primitive((-1, 0, 0, 0, 0.1, 0, 0.3), [(0, 0, 0)] * 6)])
    points = torch.tensor([[0, 0, 0.3], [0, 0, -0.5], [0, 0, 0], [0.4, 0, 0]]).T
    found, _, _ = shapes.distance(pair, points)
    torch.testing.assert_close(found, torch.tensor([-0.1, 0.1, 0.2, 0.4]))


def test_plain_blocks_have_a_colour_a_primitive(tmp_path):
    shapes.shapes(tmp_path / "faces", 2, 4, 32, 0, "cpu", 0, kind="blocks")
    shapes.shapes(tmp_path / "plain", 2, 4, 32, 0, "cpu", 0, plain=True, kind="blocks")
    for path in sorted((tmp_path / "faces").glob("*/*.png")):
        other = tmp_path / "plain" / path.relative_to(tmp_path / "faces")
        faces = np.asarray(Image.open(path))
        plain = np.asarray(Image.open(other))
        assert (faces[..., 3] == plain[..., 3]).all()  # the same shapes
        assert (faces != plain).any()  # in other colours
        solid = plain[plain[..., 3] == 255][:, :3] / 255.0
        palette = []
        primitives, _ = shapes.make_object("blocks", 0, int(path.parent.name))
        for p in primitives:
            palette.append(np.array(p["palette"][0]) / np.linalg.norm(p["palette"][0]))
        directions = solid / np.linalg.norm(solid, axis=1, keepdims=True)
        likeness = (directions @ np.array(palette).T).max(1)
        assert np.mean(likeness > 0.999) > 0.7  # shading keeps the direction; edges mix


@pytest.mark.parametrize("kind", KINDS)
def test_objects_depend_on_seed_and_index_only(kind, tmp_path):
    shapes.shapes(tmp_path / "all", 5, 4, 32, 0, "cpu", 0, kind=kind)
    for index in (2, 4):  # fewer views, other objects left out
        shapes.write_object(tmp_path, kind, 3, 32, 0, "cpu", False, False, 5, index)
        for file in sorted((tmp_path / f"{index:05d}").iterdir()):
            same = tmp_path / "all" / f"{index:05d}" / file.name
            assert file.read_bytes() == same.read_bytes()
    mine, _ = shapes.make_object(kind, 0, 3)
    other, _ = shapes.make_object(kind, 1, 3)
    assert mine[0]["palette"] != other[0]["palette"]


@pytest.mark.parametrize("kind", KINDS)
def test_objects_fill_the_unit_cube(kind):
    """Back in world coordinates, depth spans a box of longest edge 1 about the origin."""
    theta = torch.tensor([0.1, 1, 1.57, 1.57, 1.57, 1.57, 3])
    phi = torch.tensor([0, 0.5, 0, 1.57, 3.1, 4.7, 1])
    w2c = look_at(theta, phi, 2)
    for index in range(4):
        primitives, _ = shapes.make_object(kind, 0, index)
        _, depth = shapes.render([p for p in primitives if not p["cut"]], w2c, 64)
        world = world_points(depth, w2c)
        low = world.min(0)
        high = world.max(0)
        assert (high - low).max() == pytest.approx(1, abs=0.06)
        assert np.abs(high + low).max() < 0.08


def test_sides_of_blocks_differ():
    """Mean colours of opposite views of the same object: what a model must know the camera for."""
    apart = []
    for index in range(6):
        primitives, _ = shapes.make_object("blocks", 0, index)
        w2c = look_at(torch.tensor(1.2), torch.arange(4) * math.pi / 2, 1.8)
        colour = mean_colour(shapes.render(primitives, w2c, 24)[0])
        apart.append(np.abs(colour[:2] - colour[2:]).mean())
    assert np.median(apart) > 25  # of 255


def test_cars_show_yellow_lights_in_front_and_red_ones_behind():
    """From phi = 0 the camera sees the front, from phi = pi the back."""
    w2c = look_at(torch.tensor(1.3), torch.tensor([0, math.pi]), 1.8)
    for index in range(4):
        primitives, _ = shapes.make_object("cars", 0, index)
        for p in primitives:  # all but the lights in grey
            if p["palette"][0] not in (shapes.HEADLIGHT, shapes.TAIL_LIGHT):
                p["palette"] = [(0.5, 0.5, 0.5)] * 6
        views = shapes.render(primitives, w2c, 48)[0].astype(int)
        yellow = (views[..., 1] - views[..., 2] > 60).sum((1, 2))  # in front, behind
        red = (views[..., 0] - views[..., 1] > 60).sum((1, 2))
        assert yellow[0] > 20 and yellow[1] < 0.3 * yellow[0]
        assert red[1] > 20 and red[0] < 0.3 * red[1]


def test_cars_are_seen_from_above_the_ground_and_blocks_from_everywhere(tmp_path):
    lowest = {}
    for kind in KINDS:
        shapes.shapes(tmp_path / kind, 1, 60, 8, 0, "cpu", 0, kind=kind)
        views = data.list_views(tmp_path / kind, "00000")
        poses = torch.stack([torch.from_numpy(data.read_pose(npy)) for _, npy in views])
        centre = data.camera_centre(poses)
        radius = centre.norm(dim=1)
        assert radius.min() >= 1.5 and radius.max() <= 2.2
        lowest[kind] = (centre[:, 2] / radius).min()
    assert lowest["cars"] >= -0.1 and lowest["blocks"] < -0.5


@pytest.mark.parametrize("kind", KINDS)
def test_orbits_go_once_around(kind, tmp_path):
    shapes.shapes(tmp_path / "orbit", 1, 4, 16, 0, "cpu", 0, orbit=True, kind=kind)
    views = data.list_views(tmp_path / "orbit", "00000")
    poses = torch.stack([torch.from_numpy(data.read_pose(npy)) for _, npy in views])
    moves = data.relative_pose(poses[:1], poses)
    quarters = [[0.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, -1, 0], [0, -1, 0, 0]]
    torch.testing.assert_close(moves, torch.tensor(quarters), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objects", 0], "--objects 0"),
        (["--seed", -1], "--seed -1"),
        (["--plain"], "--plain"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_wrong_flags_are_named(flags, message, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=message):
        call(shapes, "--out", tmp_path / "x", *flags)


def test_a_data_set_is_not_written_over(tree, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        call(shapes, "--out", tree)
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        call(shapes, "--out", tmp_path / "file")


def test_an_interrupted_data_set_is_made_anew(tmp_path, monkeypatch):
    """Its objects must not pass for all of them."""
    flags = ["--out", tmp_path / "tree", "--objects", 3, "--views", 2, "--size", 16]
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "write_list", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(shapes, *flags, "--seed", 1, "--workers", 0)
    assert not (tmp_path / "tree").exists()
    call(shapes, *flags, "--workers", 0)
    call(shapes, *flags[2:], "--out", tmp_path / "whole", "--workers", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree", "whole"]
    for file in (tmp_path / "whole").rglob("*.png"):
        same = tmp_path / "tree" / file.relative_to(tmp_path / "whole")
        assert same.read_bytes() == file.read_bytes()


def interrupt(*_) -> None:
    raise KeyboardInterrupt
