"""data.py: images and poses against hand calculations, trees with planted defects, shapes against their own cameras."""

import json
import math
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import script
from PIL import Image
from torch.utils.data import DataLoader

import data
from lib import images
from lib.cli import InputError, run_script
from tools import shapes
from tools.check import check
from tools.shapes import look_at


def png16(colour_type: int, pixels: np.ndarray) -> bytes:
    """A 16-bit PNG (H,W,C), which PIL reads but does not write for more than one channel."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "colour", "rgb", "alpha"),
    [
        ("RGBA", (255, 0, 0, 128), (1, 127 / 255, 127 / 255), 128 / 255),  # half of red on white
        ("RGBA", (10, 20, 30, 0), (1, 1, 1), 0),
        ("LA", (0, 51), (0.8, 0.8, 0.8), 0.2),
        ("RGB", (0, 51, 255), (0, 0.2, 1), 1),
        ("L", 51, (0.2, 0.2, 0.2), 1),
        ("1", 1, (1, 1, 1), 1),
        ("I;16", 30000, (30000 / 65535,) * 3, 1),
    ],
)
def test_png_is_composited_onto_white(tmp_path, mode, colour, rgb, alpha):
    Image.new(mode, (8, 8), colour).save(tmp_path / "x.png")
    image, cover = images.load_image(tmp_path / "x.png", 4)
    assert image.shape == (3, 4, 4) and image.dtype == cover.dtype == torch.float32
    torch.testing.assert_close(
        image[:, 1, 2] / 2 + 0.5, torch.tensor(rgb).float(), atol=1e-6, rtol=0
    )
    assert cover[1, 2] == pytest.approx(alpha, abs=1e-6)


def test_palette_transparency_cmyk_jpeg_webp_and_16_bit_colour(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "p.png", transparency=1)
    assert (images.load_image(tmp_path / "p.png", 4)[0] == 1).all()

    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save(tmp_path / "w.webp", lossless=True)
    (tmp_path / "a.png").write_bytes(png16(6, np.tile([65535, 0, 0, 65535], (4, 4, 1))))
    for name in ("c.jpg", "w.webp", "a.png"):
        red = images.load_image(tmp_path / name, 4)[0][:, 0, 0]
        torch.testing.assert_close(red, torch.tensor([1.0, -1, -1]), atol=0.02, rtol=0)


def test_resizing_averages_and_keeps_no_halo(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, ::2] = (
        0,
        255,
        0,
        255,
    )  # opaque green stripes; black where transparent, which must not be seen
    Image.fromarray(rgba).save(tmp_path / "x.png")
    image, alpha = images.load_image(tmp_path / "x.png", 2)
    torch.testing.assert_close(alpha, torch.full((2, 2), 0.5), atol=0.05, rtol=0)
    torch.testing.assert_close(image[1], torch.ones(2, 2))
    torch.testing.assert_close(image[0], 1 - 2 * alpha)


def test_exif_turns_the_picture_upright(tmp_path):
    picture, exif = Image.new("RGB", (4, 8), "white"), Image.Exif()
    picture.paste("black", (0, 0, 4, 4))  # the upper half
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "x.png", exif=exif)
    image, _ = images.load_image(tmp_path / "x.png", 8)
    assert (image[:, 0] == 1).all() and (image[:, -1] == -1).all()


def test_bad_images_name_the_file(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "x.png"
    )
    whole = (tmp_path / "x.png").read_bytes()
    for name, content in (
        ("cut.png", whole[: len(whole) // 2]),
        ("text.png", b"hello"),
        ("empty.png", b""),
    ):
        (tmp_path / name).write_bytes(content)
    for name in ("cut.png", "text.png", "empty.png", "absent.png"):
        with pytest.raises(InputError, match=f"{name}: unreadable image") as error:
            images.load_image(tmp_path / name, 8)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(InputError, match="x.png: image too large"):
        images.open_image(tmp_path / "x.png")


# ---- poses -----------------------------------------------------------------------------------------------------------


def test_relative_pose_of_hand_computed_cameras():
    front = torch.tensor(
        [[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, -2]]
    )  # at (2,0,0), looks along -x
    left = torch.tensor(
        [[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, -1.5]]
    )  # at (0,1.5,0), looks along -y
    top = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, -3]])  # at (0,0,3), looks down
    torch.testing.assert_close(data.camera_centre(left), torch.tensor([0, 1.5, 0]))
    moves = data.relative_pose(front, torch.stack([left, top, front]))
    expected = torch.tensor([[0, 1, 0, -0.5], [-math.pi / 2, 0, 1, 1], [0, 0, 1, 0]])
    torch.testing.assert_close(moves, expected, atol=1e-6, rtol=0)
    # Across phi = pi, where atan2 jumps, a move of 20 degrees is still one of 20 degrees.
    move = data.relative_pose(look_at(1, math.radians(170), 2), look_at(1, math.radians(-170), 2))
    torch.testing.assert_close(
        move, torch.tensor([0, math.sin(math.pi / 9), math.cos(math.pi / 9), 0])
    )


def test_look_at_sees_the_origin_ahead_and_z_up_even_at_the_poles():
    theta, phi = torch.tensor([0, 0.3, 1.5, 3, math.pi])[:, None], torch.linspace(-3, 3, 7)
    w2c = look_at(theta, phi, 1.8)
    assert w2c.shape == (5, 7, 3, 4)
    rotation = w2c[..., :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).double().expand(5, 7, 3, 3))
    assert (torch.linalg.det(rotation) > 0).all()
    torch.testing.assert_close(w2c[..., 3], torch.tensor([0, 0, -1.8]).double().expand(5, 7, 3))
    assert (rotation[1:-1, :, 1, 2] > 0).all() and rotation[
        :, :, 0, 2
    ].abs().max() == 0  # +z is up, no roll
    x = 1.8 * torch.sin(theta) * torch.cos(phi)
    torch.testing.assert_close(data.camera_centre(w2c)[..., 0], x.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.eye(4), "wrong-shaped pose"),
        (np.full((3, 4), np.nan), "NaN or infinity"),
        (2 * np.eye(3, 4), "not a rigid motion"),
        (np.diag([1.0, 1, -1, 1])[:3], "not a rigid motion"),  # a reflection
        (np.array([["a"] * 4] * 3), "wrong-shaped pose"),
        (np.array([[{}] * 4] * 3, dtype=object), "unreadable pose"),  # a pickle
    ],
)
def test_bad_poses_name_the_file_and_the_reason(tmp_path, array, reason):
    np.save(tmp_path / "000.npy", array)
    with pytest.raises(InputError, match=f"000.npy: .*{reason}"):
        data.read_pose(tmp_path / "000.npy")


# ---- trees -----------------------------------------------------------------------------------------------------------


def test_scan_finds_nested_and_linked_objects_and_the_list_overrides_it(tmp_path):
    root = tmp_path / "root"
    for folder in (root / "b", root / "a" / "2", root / "a" / "10", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        np.save(folder / "000.npy", np.eye(3, 4))
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "again").symlink_to(
        root / "b"
    )  # on the other side of a split it would be trained on and held out
    (root / "notes").mkdir()
    (root / "a" / "loop").symlink_to(root)
    assert data.list_objects(root) == ["a/10", "a/2", "a/again", "c"]
    (root / "valid_paths.json").write_text('["b", "a/2"]')
    assert data.list_objects(root) == ["b", "a/2"]


@pytest.mark.parametrize(
    "text", ["{", "{}", "[1]", '["a", "a"]', '["a", "./a"]', '["/etc"]', '["a/../../b"]', "[]"]
)
def test_bad_lists_are_refused(tmp_path, text):
    (tmp_path / "valid_paths.json").write_text(text)
    with pytest.raises(InputError, match=str(tmp_path)):
        data.list_objects(tmp_path)


def test_empty_or_absent_trees_are_refused(tmp_path):
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=str(root)):
            data.list_objects(root)


def test_views_need_both_files_and_come_by_index(tmp_path):
    for name in ("010.npy", "010.png", "002.npy", "002.jpg", "000.png", "001.npy", "002_depth.npy", "1000.npy",
                 "1000.webp", "002.webp"):  # fmt: skip
        (tmp_path / name).touch()
    views = data.list_views(tmp_path.parent, tmp_path.name)
    assert [(image.name, npy.name) for image, npy in views] == [
        ("002.jpg", "002.npy"), ("010.png", "010.npy"), ("1000.webp", "1000.npy")]  # fmt: skip
    with pytest.raises(InputError, match="absent"):
        data.list_views(tmp_path, "absent")


def test_split_counts_are_exact_and_keep_the_order():
    for n, fraction, n_train in (
        (64, 0.125, 56),
        (100, 0.01, 99),
        (10, 0.9, 1),
        (800_000, 0.01, 792_000),
        (5, 0, 5),
    ):
        names = [str(i) for i in range(n)]
        train, val = (data.split_objects(names, fraction, split) for split in ("train", "val"))
        assert len(train) == n_train and train + val == names == data.split_objects(
            names, fraction, "all"
        )


# ---- check and errors ------------------------------------------------------------------------------------------------


def test_check_counts_planted_defects_and_lists_the_sound(tree, tmp_path, capsys):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    (root / "valid_paths.json").unlink()
    (root / "00000/001.png").write_bytes(
        (root / "00000/001.png").read_bytes()[:100]
    )  # unreadable: object unsound
    np.save(root / "00001/002.npy", np.full((3, 4), np.nan))  # so is this
    (root / "00002/003.npy").unlink()  # three views are left
    for view in range(3):
        (root / f"00003/{view:03d}.png").unlink()  # one view is left
    Image.new("RGB", (32, 32)).save(root / "00004/000.png")
    for npy in (root / "00005").glob("00?.npy"):
        w2c = np.load(npy)
        np.save(
            npy, np.concatenate([w2c[:, :3].T, -w2c[:, :3].T @ w2c[:, 3:]], axis=1)
        )  # camera-to-world
    assert check(root, workers=0) == 1 + 1 + 1 + 3 + 1
    printed = capsys.readouterr().out
    for line in (
        f"defect: unreadable image: 1 ({root}/00000/001.png)",
        f"defect: NaN or infinity in pose: 1 ({root}/00001/002.npy)",
        f"defect: missing pose: 1 ({root}/00002/003.png)",
        f"defect: missing image: 3 ({root}/00003/000.npy",
        f"defect: fewer than two sound views: 1 ({root}/00003)",
        f"note: image without alpha: 1 ({root}/00004/000.png)",
        "note: pose looks like camera-to-world: 4 (",
    ):
        assert line in printed
    sound = json.loads((root / "valid_paths.json").read_text())
    assert sound == ["00002", *(f"{i:05d}" for i in range(4, 12))]
    (root / "valid_paths.json").write_text('["00000", "gone"]')
    assert check(root, workers=0) == 2  # the unreadable image, the missing folder
    assert (root / "valid_paths.json").read_text() == '["00000", "gone"]'


def test_shapes_pass_check_by_the_command_line_and_are_not_written_over(tree):
    done = script("tools.check", "--data", tree, "--workers", 2)
    assert (
        "12 of them sound; 48 sound views" in done.stdout
        and "defect" not in done.stdout + done.stderr
    )
    done = script("tools.shapes", "--out", tree, check=False)
    assert (
        done.returncode == 1
        and done.stderr == f"error: --out {tree}: exists and is not an empty folder\n"
    )


def broken_item(item):
    raise InputError(f"{item}.png: unreadable")


def test_a_workers_input_error_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as error:
        run_script(
            lambda: list(DataLoader([7], batch_size=None, collate_fn=broken_item, num_workers=1))
        )
    assert error.value.code == "error: 7.png: unreadable"
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_a_full_gpu_is_one_line():
    def fill():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB "
            "is free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF."
        )

    def fill_for_a_product():
        raise RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
        )

    def fill_for_a_convolution():
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    with pytest.raises(
        SystemExit, match="^error: GET was unable to find an engine .*; a smaller --batch"
    ):
        run_script(fill_for_a_convolution)
    with pytest.raises(
        SystemExit,
        match="^error: CUDA out of memory. Tried to allocate 2.00 GiB; a smaller --batch",
    ):
        run_script(fill)
    with pytest.raises(
        SystemExit, match="^error: CUDA error: CUBLAS_STATUS_ALLOC_FAILED .*; a smaller --batch"
    ):
        run_script(fill_for_a_product)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_a_sphere_appears_where_the_camera_says():
    """Centroid, coverage and depth of a small off-centre sphere against its projection."""
    centre, radius, size = np.array([0.3, -0.2, 0.25]), 0.1, 96
    ball = shapes.make_primitive("sphere", radius / 0.9, np.random.default_rng(0)) | {
        "centre": centre
    }
    generator = torch.Generator().manual_seed(0)
    z, phi, r = torch.rand(3, 6, generator=generator).double()
    w2c = look_at(torch.acos(2 * z - 1), 6.28 * phi, 1.5 + 0.7 * r)
    rgba, depth = shapes.render([ball], w2c, size, np.array([0, 0, 1.0]))
    x, y, z = (w2c[:, :, :3] @ torch.tensor(centre) + w2c[:, :, 3]).T.numpy()
    alpha = rgba[..., 3] / 255
    assert set(np.unique(rgba[..., 3])) > {0, 255}  # edges are antialiased
    pixels = np.arange(size) + 0.5
    for i in range(6):
        # 35 / 16 is the focal length in half image widths; image x grows to the right and y down.
        expected = size / 2 * np.array([1 + 35 / 16 * x[i] / -z[i], 1 - 35 / 16 * y[i] / -z[i]])
        found = (
            np.array([(alpha[i].sum(0) * pixels).sum(), (alpha[i].sum(1) * pixels).sum()])
            / alpha[i].sum()
        )
        assert np.abs(found - expected).max() < 0.3
        assert alpha[i].sum() == pytest.approx(
            math.pi * (35 / 32 * size * radius / -z[i]) ** 2, rel=0.08
        )
        column, row = expected.astype(int)
        assert depth[i, row, column] == pytest.approx(-z[i] - radius, abs=0.01)
        assert depth[i][alpha[i] == 0].max() == 0


def test_plain_objects_have_a_colour_a_primitive(tmp_path):
    shapes.shapes(tmp_path / "faces", 2, 4, 32, 0, "cpu", 0)
    shapes.shapes(tmp_path / "plain", 2, 4, 32, 0, "cpu", 0, plain=True)
    for path in sorted((tmp_path / "faces").glob("*/*.png")):
        other = tmp_path / "plain" / path.relative_to(tmp_path / "faces")
        faces, plain = (np.asarray(Image.open(p)) for p in (path, other))
        assert (faces[..., 3] == plain[..., 3]).all() and (
            faces != plain
        ).any()  # the same shapes, other colours
        solid, palette = plain[plain[..., 3] == 255][:, :3] / 255.0, []
        for p in shapes.make_object(np.random.default_rng((0, int(path.parent.name)))):
            palette.append(np.array(p["palette"][0]) / np.linalg.norm(p["palette"][0]))
        likeness = (solid / np.linalg.norm(solid, axis=1, keepdims=True) @ np.array(palette).T).max(
            1
        )
        assert np.mean(likeness > 0.999) > 0.7  # shading keeps the direction; pixels on edges mix


def test_objects_depend_on_seed_and_index_only_and_fill_the_unit_cube(tree, tmp_path):
    for index in (3, 7):
        shapes.write_object(
            tmp_path, 3, 32, 0, "cpu", False, False, 5, index
        )  # fewer views, others left out
        for file in sorted((tmp_path / f"{index:05d}").iterdir()):
            assert file.read_bytes() == (tree / f"{index:05d}" / file.name).read_bytes()
    assert shapes.make_object(np.random.default_rng((1, 3)))[0]["palette"] != (
        shapes.make_object(np.random.default_rng((0, 3)))[0]["palette"])  # fmt: skip

    for index in range(
        4
    ):  # back to world coordinates, depth spans a box of longest edge 1 about the origin
        primitives = [
            p for p in shapes.make_object(np.random.default_rng((0, index))) if not p["cut"]
        ]
        theta, phi = (
            torch.tensor([0.1, 1, 1.57, 1.57, 1.57, 1.57, 3]),
            torch.tensor([0, 0.5, 0, 1.57, 3.1, 4.7, 1]),
        )
        w2c = look_at(theta, phi, 2)
        _, depth = shapes.render(primitives, w2c, 64, np.array([0, 0, 1.0]))
        view, y, x = np.nonzero(depth)
        d = depth[view, y, x].astype(np.float64)
        camera = np.stack(
            [((x + 0.5) / 32 - 1) * d * 16 / 35, (1 - (y + 0.5) / 32) * d * 16 / 35, -d], axis=1
        )
        w2c = w2c.numpy()[view]
        world = np.einsum("nij,ni->nj", w2c[:, :, :3], camera - w2c[:, :, 3])
        low, high = world.min(0), world.max(0)
        assert (high - low).max() == pytest.approx(1, abs=0.06) and np.abs(high + low).max() < 0.08


def test_sides_differ():
    """Mean colours of opposite views of the same object: what a model must know the camera for."""
    apart = []
    for index in range(6):
        primitives = shapes.make_object(np.random.default_rng((0, index)))
        w2c = look_at(torch.tensor(1.2), torch.arange(4) * math.pi / 2, 1.8)
        rgba, _ = shapes.render(primitives, w2c, 24, np.array([0, 0, 1.0]))
        colour = (rgba[..., :3] * (rgba[..., 3:] / 255)).sum((1, 2)) / (rgba[..., 3:] / 255).sum(
            (1, 2)
        )
        apart.append(np.abs(colour[:2] - colour[2:]).mean())
    assert np.median(apart) > 25  # of 255


def test_orbits_go_once_around(tmp_path):
    shapes.shapes(tmp_path / "orbit", 1, 4, 16, 0, "cpu", 0, orbit=True)
    poses = torch.stack(
        [
            torch.from_numpy(data.read_pose(npy))
            for _, npy in data.list_views(tmp_path / "orbit", "00000")
        ]
    )
    moves = data.relative_pose(poses[:1], poses)
    quarter = torch.tensor([[0.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, -1, 0], [0, -1, 0, 0]])
    torch.testing.assert_close(moves, quarter, atol=1e-5, rtol=0)
