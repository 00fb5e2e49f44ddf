"""tools/render.py: names, cameras, and what it keeps account of, with a stand-in for Blender.

Where bpy is installed, Blender itself, too.
"""

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import data
from lib.cli import InputError
from tools import render


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not a mesh")
    return folder


def stand_in(mesh: Path, name: str, folder: Path, options: dict):
    """Renders a dot, unless the mesh's name asks for something else. Runs in a worker process."""
    if "crash" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in name:
        time.sleep(60)
    if "broken" in name:
        raise RuntimeError("Error: line one\nline two")
    if "setup" in name:
        raise InputError("no Blender here")
    views = 1 if "short" in name else options["views"]
    poses = render.sample_cameras(options["seed"], name, views, options["zero123"])
    for i, pose in enumerate(poses):
        image = Image.new("RGBA", (8, 8))
        image.putpixel((3, 4), (255, 0, 0, 0 if "invisible" in name else 255))
        image.save(folder / f"{i:03d}.png")
        np.save(folder / f"{i:03d}.npy", pose)


def read_report(out: Path) -> dict:
    return json.loads((out / "render_report.json").read_text())


def run(meshes: Path, out: Path, *argv) -> dict:
    """Run the script with the stand-in for Blender; returns its report."""
    argv = ["--meshes", meshes, "--out", out, "--views", 3, "--workers", 1, *argv]
    render.main([str(a) for a in argv], render=stand_in)
    return read_report(out)


# ----------------------------------------------------------------------------- names and cameras


def test_names_are_unique_and_tell_files_of_one_stem_apart(tmp_path):
    expected = {
        "B.PLY": "B.PLY",
        "a": "a.obj",
        "b.obj": "b.obj",
        "b.obj.glb": "b.obj.glb",
        "b.stl": "b.stl",
        "sub.gltf": "sub.gltf",
        "sub/a": "sub/a.fbx",
    }
    touch(tmp_path, *expected.values(), "a.mtl", ".hidden.obj")
    found = render.find_meshes(tmp_path)
    assert found == {name: tmp_path / path for name, path in expected.items()}
    assert list(found) == sorted(found)


@pytest.mark.parametrize("zero123", [False, True])
def test_cameras_cover_the_sphere_and_look_at_the_origin(zero123):
    poses = torch.from_numpy(render.sample_cameras(0, "duck", 20000, zero123))
    centre = data.camera_centre(poses)
    radius = centre.norm(dim=1)
    assert 1.5 <= radius.min() < 1.501
    assert 2.199 < radius.max() <= 2.2
    assert radius.mean().item() == pytest.approx(1.85, abs=0.01)
    origin = torch.stack([0 * radius, 0 * radius, -radius], dim=1)  # as the cameras see it
    torch.testing.assert_close(poses[:, :, 3], origin)

    direction = centre / radius[:, None]
    assert direction.mean(0).abs().max() < 0.02
    # E[z^4] is 1/5 on the sphere, and smaller for directions of points in a cube.
    moments = (direction**4).mean(0)
    if zero123:
        assert (moments < 0.19).all()
    else:
        assert ((moments - 0.2).abs() < 0.005).all()


def test_a_view_depends_on_seed_name_and_its_index_only():
    cameras = render.sample_cameras(3, "duck", 12, False)
    np.testing.assert_array_equal(cameras[:4], render.sample_cameras(3, "duck", 4, False))
    for seed, name in ((4, "duck"), (3, "duck2")):
        others = render.sample_cameras(seed, name, 12, False)
        assert np.abs(cameras - others).max() > 0.1


# ------------------------------------------------------------------------- files that are at fault


@pytest.mark.parametrize(
    ("obj", "mtl", "message"),
    [
        ("mtllib a.mtl\nusemtl red\n", "newmtl red\n", None),
        ("mtllib gone.mtl\nusemtl red\n", "newmtl red\n", None),  # Blender reads a.mtl, too
        ("mtllib gone.mtl\nusemtl red\n", None, "material red is missing: there is no gone.mtl"),
        ("usemtl red\n", None, "material red is missing: no .mtl file defines it"),
        (
            "mtllib a.mtl\nusemtl blue\n  usemtl red 1\n",
            "newmtl blue\nnewmtl red\n",
            "material red 1 is missing: no .mtl file defines it",
        ),
        ("mtllib gone.mtl\nv 0 0 0\n", None, None),  # nothing uses a material
        ("usemtl\nusemtl (null)\n", None, None),
    ],
)
def test_an_obj_file_whose_material_is_missing_is_refused(tmp_path, obj, mtl, message):
    (tmp_path / "a.obj").write_text(obj)
    if mtl is not None:
        (tmp_path / "a.mtl").write_text(mtl)
    if message is None:
        render.check_obj_materials(tmp_path / "a.obj")
        return
    with pytest.raises(ValueError) as error:
        render.check_obj_materials(tmp_path / "a.obj")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Error: line one\nline two", "Error: line one line two"),
        ("", "RuntimeError"),
        (
            "Error: Python: Traceback (most recent call last):\n  File x.py, line 25, in texture\n"
            "    textures[index]\n    ~~~~~~~^^^^^^^\nIndexError: list index out of range\n\n"
            "Location: ops.py:109\n",
            "in Blender: IndexError: list index out of range",
        ),
    ],
)
def test_an_error_of_blenders_becomes_one_line(message, line):
    assert render.plain_message(RuntimeError(message)) == line


def test_bad_meshes_stop_nothing_and_a_rerun_goes_on(tmp_path, capsys):
    bad = ("crash", "broken", "invisible", "short")
    meshes = touch(tmp_path / "in", "good.obj", "sub/good.obj", *(f"{name}.obj" for name in bad))
    out = tmp_path / "out"
    touch(out, ".rendering/crash/000.npy", "other/000.npy", "other/000.png")  # not this run's
    report = run(meshes, out)
    assert report["rendered"] == ["good", "sub/good"]
    assert report["skipped"] == []
    assert report["failed"] == {
        "broken": "Error: line one line two",
        "crash": "its process died (exit code -11)",
        "invisible": "nothing visible in any view",
        "short": "1 views came out",
    }
    assert "2 rendered, 0 skipped, 4 failed" in capsys.readouterr().out
    files = ["good", "other", "render_report.json", "sub", "valid_paths.json"]
    assert sorted(os.listdir(out)) == files
    assert data.list_objects(out) == ["good", "sub/good"]
    assert len(data.list_views(out, "sub/good")) == 3

    before = (out / "good" / "000.png").stat().st_mtime_ns
    touch(meshes, "new.glb")
    (meshes / "sub" / "good.obj").unlink()
    for name in bad:
        (meshes / f"{name}.obj").unlink()
    report = run(meshes, out)
    assert (report["rendered"], report["skipped"], report["failed"]) == (["new"], ["good"], {})
    assert (out / "good" / "000.png").stat().st_mtime_ns == before
    assert data.list_objects(out) == ["good", "new", "sub/good"]  # those of earlier runs stay


def test_a_mesh_that_hangs_is_given_up(tmp_path):
    message = "--meshes .*in: nothing could be rendered, .*report.json says why"
    with pytest.raises(InputError, match=message):
        run(touch(tmp_path / "in", "hang.obj"), tmp_path / "out", "--timeout", 1)
    failed = read_report(tmp_path / "out")["failed"]
    assert failed == {"hang": "not done after --timeout 1 seconds"}
    assert os.listdir(tmp_path / "out") == ["render_report.json"]


def test_a_fault_of_the_setup_stops_at_once(tmp_path):
    with pytest.raises(InputError, match="^no Blender here$"):
        run(touch(tmp_path / "in", "setup.obj", "z.obj"), tmp_path / "out")


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--views", 1], "--views 1: "),
        (["--size", 0], "--size 0: "),
        (["--size", 99999], "--size 99999: "),
        (["--samples", -1], "--samples -1: "),
        (["--seed", -1], "--seed -1: "),
        (["--workers", 0], "--workers 0: "),
        (["--timeout", 0], "--timeout 0: "),
        (["--timeout", "inf"], "--timeout inf: "),
        (["--up", "x"], "--up invalid choice: 'x'"),
        (["--meshes", "nowhere"], "--meshes nowhere: no such folder"),
        (["--meshes", ROOT / "docs"], "docs: no .glb .gltf .obj"),
        (["--seed", 1], "was begun with --seed 0, not 1"),
        (["--out", "torn"], "render_report.json: cannot be used"),
    ],
)
def test_refusals(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    meshes = touch(tmp_path / "in", "a.obj")
    out = touch(tmp_path / "out", "render_report.json")
    settings = {"views": 3, "size": 256, "samples": 32, "seed": 0, "up": "format", "zero123": False}
    (out / "render_report.json").write_text(json.dumps({"settings": settings}))
    touch(tmp_path / "torn", "render_report.json")
    with pytest.raises(InputError) as error:
        run(meshes, out, *argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (out / "a").exists()


@pytest.mark.skipif(importlib.util.find_spec("bpy") is not None, reason="bpy is installed")
def test_a_missing_bpy_is_named(tmp_path):
    meshes = touch(tmp_path / "in", "a.obj")
    with pytest.raises(InputError, match="bpy.* not installed: pip install -r (.*)$") as error:
        render.main(["--meshes", str(meshes), "--out", str(tmp_path / "out")])
    assert (ROOT / str(error.value).split()[-1]).exists()


# -------------------------------------------------------------------------------------- Blender

# find_spec does not import bpy: the worker processes must be the first to do so.
needs_blender = pytest.mark.skipif(
    importlib.util.find_spec("bpy") is None, reason="bpy is optional"
)
OCTAHEDRON = np.concatenate([np.eye(3), -np.eye(3)])
FACES = [(0, 1, 2), (1, 3, 2), (3, 4, 2), (4, 0, 2), (1, 0, 5), (3, 1, 5), (4, 3, 5), (0, 4, 5)]


def write_obj(path: Path, red: np.ndarray, blue: np.ndarray):
    """Two octahedra a unit wide, z up, with materials."""
    lines = [f"mtllib {path.stem}.mtl"]
    for colour, centre, first in (("red", red, 1), ("blue", blue, 7)):
        lines.append(f"usemtl {colour}")
        lines += [f"v {x} {y} {z}" for x, y, z in centre + 0.5 * OCTAHEDRON]
        lines += [f"f {first + a} {first + b} {first + c}" for a, b, c in FACES]
    path.write_text("\n".join(lines))
    materials = "newmtl red\nKd 1 0 0\nKs 0 0 0\nnewmtl blue\nKd 0 0 1\nKs 0 0 0\n"
    path.with_suffix(".mtl").write_text(materials)


def write_glb(path: Path, textures: list[dict]):
    """A triangle whose colour is texture 0."""
    corners = np.eye(3, dtype="<f4").tobytes()
    scene = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
        "textures": textures,
        "accessors": [
            {
                "bufferView": 0,
                "componentType": 5126,
                "count": 3,
                "type": "VEC3",
                "min": [0, 0, 0],
                "max": [1, 1, 1],
            }
        ],
        "bufferViews": [{"buffer": 0, "byteLength": len(corners)}],
        "buffers": [{"byteLength": len(corners)}],
    }
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    chunks = len(text).to_bytes(4, "little") + b"JSON" + text
    chunks += len(corners).to_bytes(4, "little") + b"BIN\0" + corners
    header = b"glTF" + (2).to_bytes(4, "little") + (12 + len(chunks)).to_bytes(4, "little")
    path.write_bytes(header + chunks)


def run_blender(meshes: Path, out: Path, *argv) -> dict:
    argv = ["--meshes", meshes, "--out", out, "--samples", 8, "--workers", 1, *argv]
    render.main([str(a) for a in argv])
    return read_report(out)


@needs_blender
@pytest.mark.slow
def test_blender_puts_points_where_the_poses_say(tmp_path):
    red = np.array([0.45, 0.2, 0.3])
    shift = np.array([7, -3, 2])
    (tmp_path / "in").mkdir()
    write_obj(tmp_path / "in" / "pair.obj", shift + 10 * red, shift - 10 * red)  # longest edge 10
    touch(tmp_path / "in", "garbage.glb", "garbage.ply")
    out, size = tmp_path / "out", 96
    report = run_blender(tmp_path / "in", out, "--views", 5, "--size", size, "--up", "z")
    assert report["rendered"] == ["pair"]
    assert sorted(report["failed"]) == ["garbage.glb", "garbage.ply"]
    for image, npy in data.list_views(out, "pair"):
        rgba = np.asarray(Image.open(image)).astype(float)
        pose = data.read_pose(npy)
        alpha = rgba[..., 3]
        assert rgba.shape == (size, size, 4)
        assert alpha.max() == 255
        assert alpha[0, 0] == 0
        assert ((alpha > 0) & (alpha < 255)).any(), "soft edges"
        for channel, point in ((0, red), (2, -red)):
            x, y, z = pose @ [*point, 1]
            expected = (np.array([x, -y]) / -z / data.TAN_HALF_FOV + 1) * size / 2 - 0.5
            weight = alpha * (rgba[..., channel] > 2 * rgba[..., 2 - channel])
            rows, columns = np.mgrid[:size, :size]
            found = [(weight * axis).sum() / weight.sum() for axis in (columns, rows)]
            np.testing.assert_allclose(found, expected, atol=0.5)
            assert rgba[..., channel][weight == 255].min() > 60, "no side black"


@needs_blender
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--zero123"]])
def test_what_blender_would_paint_magenta_or_grey_fails(tmp_path, flags):
    (tmp_path / "in").mkdir()
    write_obj(tmp_path / "in" / "good.obj", np.zeros(3), np.ones(3))
    write_obj(tmp_path / "in" / "grey.obj", np.zeros(3), np.ones(3))
    (tmp_path / "in" / "grey.mtl").unlink()
    write_glb(tmp_path / "in" / "no_image.glb", [{}])
    write_glb(tmp_path / "in" / "no_texture.glb", [])
    report = run_blender(tmp_path / "in", tmp_path / "out", "--views", 2, "--size", 16, *flags)
    assert report["rendered"] == ["good"]
    assert report["failed"] == {
        "grey": "material blue is missing: there is no grey.mtl",
        "no_image": "material Material_0: a texture without an image",
        "no_texture": "in Blender: IndexError: list index out of range",
    }
