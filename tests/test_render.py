"""tools/render.py: names, cameras, bookkeeping with a stand-in for Blender; and Blender itself, where there is bpy."""

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
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
    """Renders a dot, unless the mesh's name asks for something else. Runs in render.py's worker processes."""
    if "crash" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in name:
        time.sleep(60)
    if "broken" in name:
        raise RuntimeError("Error: line one\nline two")
    if "setup" in name:
        raise InputError("no Blender here")
    for i, pose in enumerate(
        render.sample_cameras(options["seed"], name, options["views"], options["zero123"])
    ):
        image = Image.new("RGBA", (8, 8))
        image.putpixel((3, 4), (255, 0, 0, 0 if "invisible" in name else 255))
        image.save(folder / f"{i:03d}.png")
        np.save(folder / f"{i:03d}.npy", pose)
        if "short" in name:
            break


def call(meshes: Path, out: Path, *argv) -> dict:
    argv = ["--meshes", meshes, "--out", out, "--views", 3, "--workers", 1, *argv]
    render.main([str(a) for a in argv], render=stand_in)
    return json.loads((out / "render_report.json").read_text())


def test_names_are_unique_and_tell_files_of_one_stem_apart(tmp_path):
    touch(
        tmp_path,
        "a.obj",
        "b.obj",
        "b.stl",
        "B.PLY",
        "b.obj.glb",
        "sub/a.fbx",
        "sub.gltf",
        "a.mtl",
        ".hidden.obj",
    )
    assert render.find_meshes(tmp_path) == {
        name: tmp_path / path
        for name, path in {"B.PLY": "B.PLY", "a": "a.obj", "b.obj": "b.obj", "b.obj.glb": "b.obj.glb",
                           "b.stl": "b.stl", "sub.gltf": "sub.gltf", "sub/a": "sub/a.fbx"}.items()
    }  # fmt: skip


@pytest.mark.parametrize("zero123", [False, True])
def test_cameras_cover_the_sphere_and_look_at_the_origin(zero123):
    poses = torch.from_numpy(render.sample_cameras(0, "duck", 20000, zero123))
    centre = data.camera_centre(poses)
    radius = centre.norm(dim=1)
    assert (
        1.5 <= radius.min() < 1.501
        and 2.199 < radius.max() <= 2.2
        and radius.mean().item() == pytest.approx(1.85, abs=0.01)
    )
    torch.testing.assert_close(
        poses[:, :, 3], torch.stack([0 * radius, 0 * radius, -radius], dim=1)
    )
    # On the sphere, E[z^4] = 1/5; directions of points in a cube have less of it.
    direction = centre / radius[:, None]
    moments = (direction**4).mean(0)
    assert direction.mean(0).abs().max() < 0.02
    assert ((moments - 0.2).abs() < 0.005).all() if not zero123 else (moments < 0.19).all()


def test_a_view_depends_on_seed_name_and_its_index_only():
    cameras = render.sample_cameras(3, "duck", 12, False)
    np.testing.assert_array_equal(cameras[:4], render.sample_cameras(3, "duck", 4, False))
    for seed, name in ((4, "duck"), (3, "duck2")):
        assert np.abs(cameras - render.sample_cameras(seed, name, 12, False)).max() > 0.1


def test_bad_meshes_stop_nothing_and_a_rerun_goes_on(tmp_path, capsys):
    names = ("good", "sub/good", "crash", "broken", "invisible", "short")
    meshes, out = touch(tmp_path / "in", *(f"{name}.obj" for name in names)), tmp_path / "out"
    touch(
        out, ".rendering/crash/000.npy", "other/000.npy", "other/000.png"
    )  # a killed run's, someone else's
    report = call(meshes, out)
    assert report["rendered"] == ["good", "sub/good"] and not report["skipped"]
    assert report["failed"] == {
        "broken": "Error: line one line two",
        "crash": "its process died (exit code -11)",
        "invisible": "nothing visible in any view",
        "short": "1 views came out",
    }
    assert "2 rendered, 0 skipped, 4 failed" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == [
        "good",
        "other",
        "render_report.json",
        "sub",
        "valid_paths.json",
    ]
    assert (
        data.list_objects(out) == ["good", "sub/good"]
        and len(data.list_views(out, "sub/good")) == 3
    )

    before = (out / "good" / "000.png").stat().st_mtime_ns
    touch(meshes, "new.glb")
    for name in names[2:]:
        (meshes / f"{name}.obj").unlink()
    (meshes / "sub" / "good.obj").unlink()
    report = call(meshes, out)
    assert (report["rendered"], report["skipped"], report["failed"]) == (["new"], ["good"], {})
    assert (out / "good" / "000.png").stat().st_mtime_ns == before
    assert data.list_objects(out) == ["good", "new", "sub/good"]  # those of earlier runs stay


def test_a_mesh_that_hangs_is_given_up(tmp_path):
    with pytest.raises(
        InputError, match="--meshes .*in: nothing could be rendered, .*report.json says why"
    ):
        call(touch(tmp_path / "in", "hang.obj"), tmp_path / "out", "--timeout", 1)
    report = json.loads((tmp_path / "out" / "render_report.json").read_text())
    assert report["failed"] == {"hang": "not done after --timeout 1 seconds"}
    assert os.listdir(tmp_path / "out") == ["render_report.json"]


def test_a_fault_of_the_setup_stops_at_once(tmp_path):
    with pytest.raises(InputError, match="^no Blender here$"):
        call(touch(tmp_path / "in", "setup.obj", "z.obj"), tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--views", 1], "--views 1: "),
        (["--size", 0], "--size 0: "),
        (["--size", 99999], "--size 99999: "),
        (["--samples", -1], "--samples -1: "),
        (["--seed", -1], "--seed -1: "),
        (["--workers", 0], "--workers 0: "),
        (["--timeout", 0], "--timeout 0.0: "),
        (["--meshes", "nowhere"], "--meshes nowhere: no such folder"),
        (["--seed", 1], "was begun with --seed 0, not 1"),
    ],
)
def test_flags_are_checked(tmp_path, argv, message):
    meshes, out = touch(tmp_path / "in", "a.obj"), touch(tmp_path / "out", "render_report.json")
    settings = {"views": 3, "size": 256, "samples": 32, "seed": 0, "up": "format", "zero123": False}
    (out / "render_report.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(InputError) as error:
        call(meshes, out, *argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (out / "a").exists()


def test_missing_bpy_a_folder_without_meshes_and_a_damaged_report(tmp_path, monkeypatch):
    empty, meshes = touch(tmp_path / "empty", "readme.txt"), touch(tmp_path / "in", "a.obj")
    with pytest.raises(InputError, match="--meshes .*empty: no .glb .gltf .obj"):
        call(empty, tmp_path / "out")
    monkeypatch.setattr(render.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"bpy.* not installed: pip install -r tools/render-requirements.txt$"
    ):
        render.main(["--meshes", str(meshes), "--out", str(tmp_path / "out")])
    assert (Path(__file__).parents[1] / "tools" / "render-requirements.txt").exists()
    touch(tmp_path / "torn", "render_report.json")
    with pytest.raises(InputError, match="render_report.json: cannot be used"):
        call(meshes, tmp_path / "torn")


# ---- Blender ---------------------------------------------------------------------------------------------------------

OCTAHEDRON = np.concatenate([np.eye(3), -np.eye(3)])
FACES = [(0, 1, 2), (1, 3, 2), (3, 4, 2), (4, 0, 2), (1, 0, 5), (3, 1, 5), (4, 3, 5), (0, 4, 5)]


def write_obj(path: Path, red: np.ndarray, blue: np.ndarray):
    """Two octahedra a unit wide, z up, with materials."""
    lines = [f"mtllib {path.stem}.mtl"]
    for k, (colour, centre) in enumerate((("red", red), ("blue", blue))):
        lines += [f"usemtl {colour}", *(f"v {x} {y} {z}" for x, y, z in centre + 0.5 * OCTAHEDRON)]
        lines += ["f " + " ".join(str(6 * k + v + 1) for v in face) for face in FACES]
    path.write_text("\n".join(lines))
    path.with_suffix(".mtl").write_text(
        "newmtl red\nKd 1 0 0\nKs 0 0 0\nnewmtl blue\nKd 0 0 1\nKs 0 0 0\n"
    )


@pytest.mark.skipif(
    importlib.util.find_spec("bpy") is None, reason="bpy is optional"
)  # workers must import it first
def test_blender_puts_points_where_the_poses_say(tmp_path):
    red, shift = np.array([0.45, 0.2, 0.3]), np.array([7, -3, 2])
    (tmp_path / "in").mkdir()
    write_obj(tmp_path / "in" / "pair.obj", shift + 10 * red, shift - 10 * red)  # longest edge 10
    touch(tmp_path / "in", "garbage.glb", "garbage.ply")
    out, size = tmp_path / "out", 96
    argv = [
        "--meshes",
        tmp_path / "in",
        "--out",
        out,
        "--views",
        5,
        "--size",
        size,
        "--samples",
        8,
        "--workers",
        1,
    ]
    render.main([*map(str, argv), "--up", "z"])
    report = json.loads((out / "render_report.json").read_text())
    assert report["rendered"] == ["pair"] and sorted(report["failed"]) == [
        "garbage.glb",
        "garbage.ply",
    ]
    for image, npy in data.list_views(out, "pair"):
        rgba, pose = np.asarray(Image.open(image)).astype(float), data.read_pose(npy)
        assert rgba.shape == (size, size, 4) and rgba[..., 3].max() == 255 and rgba[0, 0, 3] == 0
        assert ((rgba[..., 3] > 0) & (rgba[..., 3] < 255)).any(), "soft edges"
        for channel, point in ((0, red), (2, -red)):
            x, y, z = pose @ [*point, 1]
            expected = (np.array([x, -y]) / -z / data.TAN_HALF_FOV + 1) * size / 2 - 0.5
            weight = rgba[..., 3] * (rgba[..., channel] > 2 * rgba[..., 2 - channel])
            found = [(weight * axis).sum() / weight.sum() for axis in np.mgrid[:size, :size][::-1]]
            np.testing.assert_allclose(found, expected, atol=0.5)
            assert rgba[..., channel][weight == 255].min() > 60, "no side black"
