"""data.py and tools.check: hand calculations of images and poses, trees with planted defects."""

import json
import math
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import call, script
from PIL import Image
from torch.utils.data import DataLoader

import data
from lib import images
from lib.cli import InputError, run_script
from tools import check
from tools.shapes import look_at

# ------------------------------------------------------------------------------------------ images


def png16(colour_type: int, pixels: np.ndarray) -> bytes:
    """A 16-bit PNG (H,W,C), which PIL reads but does not write for more than one channel."""

    def chunk(kind, body):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


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
    assert image.shape == (3, 4, 4)
    assert image.dtype == cover.dtype == torch.float32
    found = image[:, 1, 2] / 2 + 0.5
    torch.testing.assert_close(found, torch.tensor(rgb).float(), atol=1e-6, rtol=0)
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
    rgba = np.zeros((8, 8, 4), np.uint8)  # black where transparent, which must not be seen
    rgba[:, ::2] = (0, 255, 0, 255)  # opaque green stripes
    Image.fromarray(rgba).save(tmp_path / "x.png")
    image, alpha = images.load_image(tmp_path / "x.png", 2)
    torch.testing.assert_close(alpha, torch.full((2, 2), 0.5), atol=0.05, rtol=0)
    torch.testing.assert_close(image[1], torch.ones(2, 2))
    torch.testing.assert_close(image[0], 1 - 2 * alpha)


def test_exif_turns_the_picture_upright(tmp_path):
    picture = Image.new("RGB", (4, 8), "white")
    picture.paste("black", (0, 0, 4, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "x.png", exif=exif)
    image, _ = images.load_image(tmp_path / "x.png", 8)
    assert (image[:, 0] == 1).all()
    assert (image[:, -1] == -1).all()


def test_bad_images_name_the_file(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "text.png", "empty.png", "absent.png"):
        with pytest.raises(InputError, match=f"{name}: unreadable image") as error:
            images.load_image(tmp_path / name, 8)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(InputError, match="x.png: image too large"):
        images.open_image(tmp_path / "x.png")


# ------------------------------------------------------------------------------------------- poses


def test_relative_pose_of_hand_computed_cameras():
    # Cameras at (2,0,0) looking along -x, at (0,1.5,0) along -y, at (0,0,3) along -z.
    front = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, -2]])
    left = torch.tensor([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, -1.5]])
    top = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, -3]])
    torch.testing.assert_close(data.camera_centre(left), torch.tensor([0, 1.5, 0]))
    moves = data.relative_pose(front, torch.stack([left, top, front]))
    expected = torch.tensor([[0, 1, 0, -0.5], [-math.pi / 2, 0, 1, 1], [0, 0, 1, 0]])
    torch.testing.assert_close(moves, expected, atol=1e-6, rtol=0)
    # Across phi = pi, where atan2 jumps, a move of 20 degrees is still one of 20 degrees.
    move = data.relative_pose(look_at(1, math.radians(170), 2), look_at(1, math.radians(-170), 2))
    twenty_degrees = torch.tensor([0, math.sin(math.pi / 9), math.cos(math.pi / 9), 0])
    torch.testing.assert_close(move, twenty_degrees)


def test_stable_zero123s_pose_of_hand_computed_cameras():
    """Its fourth number is radians(90 - elevation) of the input, not the change of distance."""
    input_view = look_at(math.radians(90 - 30), 0, 1.5)  # 30 degrees up
    target = look_at(math.radians(90 - 10), math.radians(90), 2.0)
    move = data.relative_pose(input_view, target, "elevation")
    torch.testing.assert_close(move, torch.tensor([math.radians(20), 1, 0, math.radians(60)]))


def test_look_at_sees_the_origin_ahead_and_z_up_even_at_the_poles():
    theta = torch.tensor([0, 0.3, 1.5, 3, math.pi])[:, None]
    phi = torch.linspace(-3, 3, 7)
    w2c = look_at(theta, phi, 1.8)
    assert w2c.shape == (5, 7, 3, 4)
    rotation = w2c[..., :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).double().expand(5, 7, 3, 3))
    assert (torch.linalg.det(rotation) > 0).all()
    origin = torch.tensor([0, 0, -1.8]).double().expand(5, 7, 3)
    torch.testing.assert_close(w2c[..., 3], origin)
    assert (rotation[1:-1, :, 1, 2] > 0).all()  # +z is up
    assert rotation[:, :, 0, 2].abs().max() == 0  # no roll
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


def inverted(w2c: np.ndarray) -> np.ndarray:
    """World-to-camera (3,4) -> camera-to-world (3,4)."""
    rotation = w2c[:, :3].T
    return np.concatenate([rotation, -rotation @ w2c[:, 3:]], axis=1)


def test_odd_poses_are_told_apart():
    pose = look_at(1.1, 0.4, 1.8).numpy()
    assert data.check_pose(pose) == []
    assert data.check_pose(inverted(pose)) == ["pose looks like camera-to-world"]
    opencv = pose * [[1], [-1], [-1]]
    assert data.check_pose(opencv) == ["object behind camera (OpenCV axes?)"]
    aside = pose + [[0, 0, 0, 0.5], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert data.check_pose(aside) == ["camera does not look at the origin"]
    centimetres = pose * [1, 1, 1, 100]
    assert ["distance" in note for note in data.check_pose(centimetres)] == [True]
    both = data.check_pose(inverted(centimetres))
    assert "camera-to-world" in both[0] and "distance" in both[1]


def test_a_tree_of_odd_poses_gets_one_line_of_warning(tree, tmp_path, capsys):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    names = data.list_objects(root)
    data.warn_of_odd_poses(root, names)
    assert capsys.readouterr().out == ""
    for name in names[:7]:
        np.save(root / name / "000.npy", inverted(np.load(root / name / "000.npy")))
    (root / names[8] / "000.npy").write_bytes(b"")  # for others to name
    data.warn_of_odd_poses(root, names)
    printed = capsys.readouterr().out
    assert printed.startswith("WARNING: pose looks like camera-to-world: 7 (")
    assert printed.count("\n") == 1
    assert f"{root / names[0] / '000.npy'}" in printed


# ------------------------------------------------------------------------------------------- trees


def test_scan_finds_nested_and_linked_objects_and_the_list_overrides_it(tmp_path, capsys):
    root = tmp_path / "root"
    for folder in (root / "b", root / "a" / "2", root / "a" / "10", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        np.save(folder / "000.npy", np.eye(3, 4))
    (root / "c").symlink_to(tmp_path / "elsewhere")
    # Under two names an object might be trained on and held out.
    (root / "a" / "again").symlink_to(root / "b")
    (root / "notes").mkdir()
    (root / "a" / "loop").symlink_to(root)
    shutil.copytree(root / "b", root / ".rendering" / "b")  # what tools.render has half-written
    assert data.list_objects(root) == ["a/10", "a/2", "a/again", "c"]
    assert data.list_objects(root) == ["a/10", "a/2", "a/again", "c"]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1  # said once
    assert f"{root} has no valid_paths.json" in printed
    (root / "valid_paths.json").write_text('["b", "a/2"]')
    assert data.list_objects(root) == ["b", "a/2"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "text", ["{", "{}", "[1]", '["a", "a"]', '["a", "./a"]', '["/etc"]', '["a/../../b"]', "[]"]
)
def test_bad_lists_are_refused(tmp_path, text):
    (tmp_path / "valid_paths.json").write_text(text)
    with pytest.raises(InputError, match=str(tmp_path)):
        data.list_objects(tmp_path)


def test_a_list_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "valid_paths.json").write_text('["b", "ä"]', encoding="utf-8-sig")
    assert data.list_objects(tmp_path) == ["b", "ä"]


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False])
def test_names_beyond_ascii_in_an_ascii_locale(tree, tmp_path, monkeypatch, listed):
    shutil.copytree(tree / "00000", tmp_path / "tree" / "ähre")
    if listed:
        text = json.dumps(["ähre"], ensure_ascii=False)
        (tmp_path / "tree" / "valid_paths.json").write_text(text, encoding="utf-8")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    monkeypatch.setenv("PYTHONUTF8", "0")
    done = script("tools.check", "--data", tmp_path / "tree", "--workers", 1)
    assert "1 objects, 1 of them sound; 4 sound views" in done.stdout
    monkeypatch.undo()
    assert data.list_objects(tmp_path / "tree") == ["ähre"]


@pytest.mark.slow
def test_names_that_are_no_text_are_printed(tree, tmp_path, monkeypatch):
    name = os.fsdecode(b"bad\xff")
    shutil.copytree(tree / "00000", tmp_path / "tree" / name)
    (tmp_path / "tree" / name / "000.png").unlink()
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    done = script("tools.check", "--data", tmp_path / "tree", "--workers", 1, check=False)
    assert r"bad\udcff/000.npy" in done.stdout


def test_empty_or_absent_trees_are_refused(tmp_path):
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=str(root)):
            data.list_objects(root)


def test_views_need_both_files_and_come_by_index(tmp_path):
    complete = ["010.npy", "010.png", "002.npy", "002.jpg", "002.webp", "1000.npy", "1000.WEBP"]
    for name in [*complete, "000.png", "001.npy", "002_depth.npy", "0003.npy", "0003.png"]:
        (tmp_path / name).touch()
    views = data.list_views(tmp_path.parent, tmp_path.name)
    assert [(image.name, pose.name) for image, pose in views] == [
        ("002.jpg", "002.npy"),
        ("010.png", "010.npy"),
        ("1000.WEBP", "1000.npy"),
    ]
    with pytest.raises(InputError, match="absent"):
        data.list_views(tmp_path, "absent")


@pytest.mark.parametrize(
    ("objects", "fraction", "n_train"),
    [(64, 0.125, 56), (100, 0.01, 99), (10, 0.9, 1), (800_000, 0.01, 792_000), (5, 0, 5)],
)
def test_split_counts_are_exact_and_keep_the_order(objects, fraction, n_train):
    names = [str(i) for i in range(objects)]
    train = data.split_objects(names, fraction, "train")
    val = data.split_objects(names, fraction, "val")
    assert len(train) == n_train
    assert train + val == names == data.split_objects(names, fraction, "all")


# ------------------------------------------------------------------------------------------- pairs


def test_pairs_are_distinct_deterministic_and_cover_an_epoch():
    view_counts = [4, 2, 12, 3]

    def draw(position: int, seed: int) -> tuple[int, int, int]:
        epoch, index = data.object_at(position, seed, len(view_counts))
        return index, *data.draw_pair(seed, epoch, index, view_counts[index])

    draws = [draw(position, 0) for position in range(400)]
    assert draws == [draw(position, 0) for position in range(400)]
    assert draws != [draw(position, 1) for position in range(400)]
    for index, cond, target in draws:
        assert cond != target
        assert max(cond, target) < view_counts[index]
    for first in range(0, 400, 4):
        assert sorted(index for index, _, _ in draws[first : first + 4]) == [0, 1, 2, 3]
    of_object_2 = {(cond, target) for index, cond, target in draws if index == 2}
    assert len(of_object_2) > 40  # of 132 ordered pairs, 100 drawn


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_process_reads_its_slice_of_the_global_batch(accumulate, world):
    read = []
    for rank in range(world):
        for positions in data.batch_positions(
            3, 5, accumulate, 8 // (accumulate * world), rank, world
        ):
            read += positions
    assert sorted(read) == list(range(24, 40))


def test_a_pair_of_images_is_what_the_files_hold(tree):
    names = data.list_objects(tree)
    pairs = data.ImagePairs(str(tree), names, 32, seed=3)
    batch = pairs[[5, 40]]
    for row, position in enumerate((5, 40)):
        epoch, index = data.object_at(position, 3, len(names))
        views = data.draw_pair(3, epoch, index, 4)
        poses = []
        for key, view in zip(("cond", "target"), views, strict=True):
            image, _ = images.load_image(tree / names[index] / f"{view:03d}.png", 32)
            assert torch.equal(batch[key][row], image)
            pose = data.read_pose(tree / names[index] / f"{view:03d}.npy")
            poses.append(torch.from_numpy(pose))
        assert torch.equal(batch["pose"][row], data.relative_pose(*poses))


# ------------------------------------------------------------------------------- check, and errors


def run_check(capsys, *argv) -> tuple[int, str]:
    """(exit code, what it printed) of tools.check."""
    with pytest.raises(SystemExit) as stop:
        call(check, *argv, "--workers", 0)
    return stop.value.code, capsys.readouterr().out


def test_check_counts_planted_defects_and_lists_the_sound(tree, tmp_path, capsys):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    (root / "valid_paths.json").unlink()
    torn = (root / "00000/001.png").read_bytes()[:100]
    (root / "00000/001.png").write_bytes(torn)  # unreadable, so the object is not sound
    np.save(root / "00001/002.npy", np.full((3, 4), np.nan))  # this one isn't, either
    (root / "00002/003.npy").unlink()  # three views are left
    for view in range(3):
        (root / f"00003/{view:03d}.png").unlink()  # one view is left
    Image.new("RGB", (32, 32)).save(root / "00004/000.png")
    for path in (root / "00005").glob("00?.npy"):
        np.save(path, inverted(np.load(path)))
    np.save(root / "00006/001.npy", np.load(root / "00006/001.npy") * [1, 1, 1, 100])

    code, printed = run_check(capsys, "--data", root)
    assert code == 1
    for line in (
        f"defect: unreadable image: 1 ({root}/00000/001.png)",
        f"defect: NaN or infinity in pose: 1 ({root}/00001/002.npy)",
        f"defect: missing pose: 1 ({root}/00002/003.png)",
        f"defect: missing image: 3 ({root}/00003/000.npy",
        f"defect: fewer than two sound views: 1 ({root}/00003)",
        f"note: image without alpha: 1 ({root}/00004/000.png)",
        "note: pose looks like camera-to-world: 4 (",
        "note: camera's distance is far from 1.5 to 2.2",
    ):
        assert line in printed
    defects = re.findall(r"^defect: .*?: (\d+) \(", printed, re.MULTILINE)
    assert sorted(defects) == ["1", "1", "1", "1", "3"]
    sound = json.loads((root / "valid_paths.json").read_text())
    assert sound == ["00002", *(f"{i:05d}" for i in range(4, 12))]


def test_check_leaves_a_list_as_it_is_and_writes_another_on_demand(tree, tmp_path, capsys):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    (root / "00000/001.png").write_bytes(b"")
    (root / "valid_paths.json").write_text('["00002", "00000", "gone", "00001"]')
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(InputError, match="--list .*notes.md: exists"):
        call(check, "--data", root, "--list", tmp_path / "notes.md")
    code, printed = run_check(capsys, "--data", root, "--list", tmp_path / "sound.json")
    assert code == 1
    assert "defect: unreadable image: 1" in printed
    assert "defect: missing folder: 1" in printed
    assert (root / "valid_paths.json").read_text() == '["00002", "00000", "gone", "00001"]'
    assert json.loads((tmp_path / "sound.json").read_text()) == ["00002", "00001"]


@pytest.mark.slow
def test_shapes_pass_check_by_the_command_line_and_are_not_written_over(tree):
    done = script("tools.check", "--data", tree, "--workers", 2)
    assert "12 of them sound; 48 sound views" in done.stdout
    assert "defect" not in done.stdout + done.stderr
    done = script("tools.shapes", "--out", tree, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: --out {tree}: exists and is not an empty folder\n"


def broken_item(item):
    raise InputError(f"{item}.png: unreadable")


def test_a_workers_input_error_is_one_line_too():
    loader = DataLoader([7], batch_size=None, collate_fn=broken_item, num_workers=1)
    with pytest.raises(SystemExit) as error:
        run_script(lambda: list(loader))
    assert error.value.code == "error: 7.png: unreadable"
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                "79.11 GiB of which 1.50 GiB is free. If reserved but unallocated memory is large "
                "try setting PYTORCH_CUDA_ALLOC_CONF."
            ),
            "CUDA out of memory. Tried to allocate 2.00 GiB; a smaller --batch",
        ),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED .*; a smaller --batch",
        ),
        (
            RuntimeError("GET was unable to find an engine to execute this computation"),
            "GET was unable to find an engine .*; a smaller --batch",
        ),
    ],
)
def test_a_full_gpu_is_one_line(error, line):
    def fill():
        raise error

    with pytest.raises(SystemExit, match=f"^error: {line}"):
        run_script(fill)
