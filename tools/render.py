"""Meshes -> renders in the layout that data.py reads, with Blender as a Python module (bpy) and its Cycles.

    pip install -r tools/render-requirements.txt                       # Python 3.11
    python -m tools.render --meshes FOLDER --out DIR                   # rerun to go on; finished objects are skipped
    python -m tools.render --meshes FOLDER --out DIR --device cuda --size 512 --samples 128
    python -m tools.render --meshes FOLDER --out DIR --zero123         # as Zero-1-to-3's training set was rendered

FOLDER/a/b.glb becomes DIR/a/b/%03d.png (RGBA, straight alpha) and %03d.npy (world-to-camera): z up, all meshes of a
file together, longest bounding-box edge 1, centred, field of view 49.134 degrees, radius U(1.5, 2.2). Files that would
share a name, a.obj and a.stl, keep their extension in it. DIR/valid_paths.json lists what is sound,
DIR/render_report.json what was rendered, skipped as finished, and failed, and why.

--zero123 follows zero123's objaverse-rendering/scripts/blender_script.py, as read: directions of points uniform in a
cube; an area light of 300 to 600 W above the object, beside the lamp and the dark grey world of a default scene;
Filmic colours (its setup.sh takes Blender 3.2.2); 512 px, 128 samples, few bounces, and a pixel filter of .01, which
leaves edges hard; boxes of boxes as bounds; each root object, the area light too, scaled about its own origin.
Two deviations remain: another Blender, so other noise and importers; random numbers by (seed, name), theirs unseeded.
"""

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
from lib.cli import HelpFormatter, InputError, require_positive, run_script
from lib.images import MAX_PIXELS
from tools.check import write_list
from tools.shapes import look_at

EXTENSIONS = (".glb", ".gltf", ".obj", ".ply", ".stl", ".fbx")
REQUIREMENTS = "pip install -r tools/render-requirements.txt"
SETTINGS = ("views", "size", "samples", "seed", "up", "zero123")  # what changes pictures


def find_meshes(folder: Path) -> dict[str, Path]:
    """{name: path} of the meshes under a folder, sorted; names are unique even where case does not count."""
    walk = [
        (Path(os.path.relpath(top, folder)), files)
        for top, _, files in os.walk(folder, followlinks=True)
    ]
    paths = [
        top / f
        for top, files in walk
        for f in files
        if f[0] != "." and f.lower().endswith(EXTENSIONS)
    ]
    # A name must be no other mesh's, with or without its extension, nor a folder's.
    taken = Counter(
        str(p).casefold()
        for p in [*paths, *(p.with_suffix("") for p in paths), *(top for top, _ in walk)]
    )
    names = {
        (p if taken[str(p.with_suffix("")).casefold()] > 1 else p.with_suffix("")).as_posix(): p
        for p in paths
    }
    return {name: folder / names[name] for name in sorted(names)}


def make_rng(seed: int, name: str, stream: int) -> np.random.Generator:
    """Random numbers by (seed, name): stream 0 for cameras, 1 for lights."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return np.random.default_rng((seed, int.from_bytes(digest[:8], "big"), stream))


def sample_cameras(seed: int, name: str, views: int, zero123: bool) -> np.ndarray:
    """World-to-camera (V,3,4) float64, looking at the origin; row i depends on (seed, name, i) only."""
    x, y, z, r = make_rng(seed, name, 0).uniform(-1, 1, (views, 4)).T
    # Deviation: directions uniform on the sphere; Zero-1-to-3's crowd towards the corners of a cube.
    theta, phi = (
        (np.arctan2(np.hypot(x, y), z), np.arctan2(y, x)) if zero123 else (np.arccos(z), np.pi * x)
    )
    return look_at(*(torch.from_numpy(v) for v in (theta, phi, 1.85 + 0.35 * r))).numpy()


# ---- in Blender ------------------------------------------------------------------------------------------------------


def set_up(bpy, options: dict):
    """A scene with a camera and Cycles' settings; with --zero123 also its lights."""
    zero123 = options["zero123"]
    bpy.ops.wm.read_factory_settings(use_empty=not zero123)
    scene, render, cycles = bpy.context.scene, bpy.context.scene.render, bpy.context.scene.cycles
    render.engine, render.resolution_percentage = "CYCLES", 100
    render.resolution_x = render.resolution_y = options["size"]
    render.image_settings.file_format, render.image_settings.color_mode = "PNG", "RGBA"
    render.film_transparent = render.use_persistent_data = True
    render.threads_mode, render.threads = "FIXED", options["threads"]
    cycles.samples, cycles.use_denoising = options["samples"], True
    # Deviation: colours as the textures have them, and Cycles' own pixel filter (1.5) for soft edges.
    scene.view_settings.view_transform = "Filmic" if zero123 else "Standard"
    if zero123:
        cycles.filter_width = 0.01
        cycles.diffuse_bounces = cycles.glossy_bounces = 1
        cycles.transparent_max_bounces = cycles.transmission_bounces = 3
        bpy.data.objects.remove(bpy.data.objects["Cube"])
        bpy.ops.object.light_add(type="AREA")
        bpy.context.object.scale = 100, 100, 100
    else:
        cycles.denoising_prefilter = "FAST"  # half the time, to the eye the same
        scene.world, camera = bpy.data.worlds.new("World"), bpy.data.cameras.new("Camera")
        scene.camera = bpy.data.objects.new("Camera", camera)
        scene.collection.objects.link(scene.camera)
    scene.camera.data.lens, scene.camera.data.sensor_width = 35, 32
    if options["device"] == "cuda":
        preferences = bpy.context.preferences.addons["cycles"].preferences
        preferences.compute_device_type, cycles.device = "CUDA", "GPU"
        preferences.refresh_devices()
        for device in preferences.devices:
            device.use = device.type == "CUDA"
        if not any(device.use for device in preferences.devices):
            raise InputError("--device cuda: Blender finds no CUDA device")


def load_mesh(bpy, path: Path, options: dict):
    """Imports a file, z up, with its materials; meshes without any show their vertex colours."""
    kind, file = path.suffix.lower(), os.path.abspath(path)
    if kind in (".glb", ".gltf"):
        bpy.ops.import_scene.gltf(filepath=file, merge_vertices=options["zero123"])
    elif kind == ".fbx":  # Blender 4.5 brought a second importer, which reads more of them
        (bpy.ops.wm.fbx_import if "fbx_import" in dir(bpy.ops.wm) else bpy.ops.import_scene.fbx)(
            filepath=file
        )
    else:
        axes = {"format": (), "y": ("NEGATIVE_Z", "Y"), "z": ("Y", "Z")}[options["up"]]
        axes = dict(zip(("forward_axis", "up_axis"), axes, strict=False))
        getattr(bpy.ops.wm, f"{kind[1:]}_import")(filepath=file, **axes)
    if options["zero123"]:
        return
    for obj in list(bpy.data.objects):
        if obj.type in ("CAMERA", "LIGHT") and obj != bpy.context.scene.camera:
            bpy.data.objects.remove(obj)
    for image in bpy.data.images:
        if (
            image.source == "FILE" and image.users and not image.size[0]
        ):  # Blender would paint magenta
            raise ValueError(f"texture missing or unreadable: {image.filepath or image.name}")
    for mesh in bpy.data.meshes:
        if mesh.color_attributes and not any(mesh.materials):
            mesh.materials.clear()
            mesh.materials.append(bpy.data.materials.new("Vertex colours"))
            mesh.materials[0].use_nodes = True
            tree = mesh.materials[0].node_tree
            colours = tree.nodes.new("ShaderNodeVertexColor")
            colours.layer_name = mesh.color_attributes[0].name
            tree.links.new(
                colours.outputs["Color"], tree.nodes["Principled BSDF"].inputs["Base Color"]
            )


def find_bounds(bpy, zero123: bool) -> np.ndarray:
    """Lowest and highest corner (2,3) of what the scene shows. ValueError if there is nothing, or no extent."""
    bpy.context.view_layer.update()
    points = [np.empty((0, 3))]
    if zero123:  # each object's own box, which is too wide once rotated
        for obj in bpy.context.scene.objects:
            if obj.type == "MESH":
                points += [
                    np.array(
                        [obj.matrix_world @ type(obj.location)(corner) for corner in obj.bound_box]
                    )
                ]
    else:
        for instance in bpy.context.evaluated_depsgraph_get().object_instances:
            obj, matrix = instance.object, np.array(instance.matrix_world)
            if obj.type in ("MESH", "CURVE", "SURFACE", "FONT", "META") and not obj.hide_render:
                mesh = obj.to_mesh()
                vertices, used = (
                    np.empty(3 * len(mesh.vertices), np.float32),
                    np.empty(len(mesh.loops), np.int32),
                )
                mesh.vertices.foreach_get("co", vertices)
                mesh.loops.foreach_get("vertex_index", used)  # vertices of no face do not count
                points += [
                    vertices.reshape(-1, 3)[np.unique(used)] @ matrix[:3, :3].T + matrix[:3, 3]
                ]
                obj.to_mesh_clear()
    points = np.concatenate(points)
    if not len(points):
        raise ValueError("no faces")
    bounds = np.stack([points.min(0), points.max(0)])
    if not np.isfinite(bounds).all() or np.ptp(bounds, axis=0).max() <= 0:
        raise ValueError(f"no extent: bounding box {bounds.tolist()}")
    return bounds


def normalise(bpy, zero123: bool):
    """Longest edge of the bounding box 1, centred at the origin."""
    from mathutils import Matrix, Vector

    bounds, scene = find_bounds(bpy, zero123), bpy.context.scene
    scale = 1 / float(np.ptp(bounds, axis=0).max())
    roots = [
        obj for obj in scene.objects if obj.parent is None and (zero123 or obj != scene.camera)
    ]
    if zero123:
        for obj in roots:
            obj.scale = obj.scale * scale
        centre = Vector(find_bounds(bpy, zero123).mean(0))
        for obj in roots:
            obj.matrix_world.translation -= centre
        return
    # Deviation: one parent moves all; Zero-1-to-3's way tears a file of several root objects apart.
    parent = bpy.data.objects.new("Normalised", None)
    scene.collection.objects.link(parent)
    parent.matrix_world = Matrix.Scale(scale, 4) @ Matrix.Translation(-Vector(bounds.mean(0)))
    for obj in roots:
        obj.parent = parent


def light(bpy, rng: np.random.Generator, zero123: bool):
    """Lights of an object, the same in all its views: a white sky that reaches every side, a sun and a weaker one."""
    if zero123:
        area = bpy.data.objects["Area"]
        area.data.energy, area.location = (
            rng.uniform(300, 600),
            rng.uniform((-1, -1, 0.5), (1, 1, 1.5)),
        )
        return
    # Deviation: Zero-1-to-3's lamps are all above, which leaves undersides all but black.
    scene, direction = bpy.context.scene, rng.normal(size=3) + [0, 0, 1]
    scene.world.use_nodes = True
    sky = scene.world.node_tree.nodes["Background"].inputs
    sky["Color"].default_value, sky["Strength"].default_value = (1, 1, 1, 1), 0.4
    for energy, towards in (
        (1.5, direction),
        (0.6, rng.normal(size=3) - direction),
    ):  # white: at most .4 + 2.1 / pi
        sun = bpy.data.objects.new("Sun", bpy.data.lights.new("Sun", "SUN"))
        sun.data.energy, sun.data.angle = energy, 0.3
        sun.rotation_euler = type(sun.location)(towards).to_track_quat("Z", "Y").to_euler()
        scene.collection.objects.link(sun)


def render_mesh(mesh: Path, name: str, folder: Path, options: dict):
    """Renders one file into an empty folder. InputError if Blender is at fault, any other error if the file is."""
    try:
        import bpy
        from mathutils import Matrix
    except ImportError as error:
        raise InputError(
            f"bpy cannot be imported ({error}): {REQUIREMENTS}, which names its libraries"
        ) from None
    set_up(bpy, options)
    load_mesh(bpy, mesh, options)
    normalise(bpy, options["zero123"])
    light(bpy, make_rng(options["seed"], name, 1), options["zero123"])
    scene, cameras = (
        bpy.context.scene,
        sample_cameras(options["seed"], name, options["views"], options["zero123"]),
    )
    with (
        tempfile.TemporaryDirectory() as plain
    ):  # in `folder`'s path Blender would expand "#" and "{}"
        for i, pose in enumerate(cameras):
            scene.camera.matrix_world = Matrix([*pose, (0, 0, 0, 1)]).inverted()
            scene.render.filepath = f"{plain}/view.png"
            bpy.ops.render.render(write_still=True)
            shutil.move(f"{plain}/view.png", folder / f"{i:03d}.png")
            np.save(folder / f"{i:03d}.npy", pose)


# ---- processes -------------------------------------------------------------------------------------------------------


def write_object(mesh: Path, name: str, out: Path, options: dict, render):
    """OUT/name, whole or not at all."""
    part = out / ".rendering" / name
    part.mkdir(parents=True)
    try:
        render(mesh, name, part, options)
        images = [Image.open(image) for image, _ in data.list_views(part.parent, part.name)]
        if len(images) != options["views"]:
            raise ValueError(f"{len(images)} views came out")
        if not any(image.getchannel("A").getextrema()[1] for image in images):
            raise ValueError("nothing visible in any view")
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, out / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def serve(pipe, out: Path, options: dict, render):
    """A worker's life: renders each (mesh, name) it is sent, answers (what went wrong or None, was it the set-up)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (1, 2):  # Blender chatters
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    with suppress(EOFError, OSError):  # the parent has gone
        while True:
            job, error = pipe.recv(), None
            try:
                write_object(*job, out, options, render)
            except Exception as e:
                error = e
            pipe.send(
                (
                    error and (" ".join(str(error).split()) or type(error).__name__),
                    isinstance(error, InputError),
                )
            )


def render_all(
    meshes: dict[str, Path], out: Path, options: dict, workers: int, timeout: float, render
):
    """Renders in worker processes, which may hang or die; yields (name, what went wrong or None) as meshes end.

    InputError if not a mesh but the set-up is at fault.
    """
    forks = (
        "forkserver" in multiprocessing.get_all_start_methods()
    )  # it imports torch once for all workers
    context, local, processes = (
        multiprocessing.get_context("forkserver" if forks else "spawn"),
        threading.local(),
        [],
    )
    context.set_forkserver_preload(["torch"])

    def run(name):  # in a thread for each process
        if not getattr(local, "pipe", None):
            local.pipe, theirs = context.Pipe()
            local.process = context.Process(
                target=serve, args=(theirs, out, options, render), daemon=True
            )
            local.process.start()
            theirs.close()  # so that the process's death ends the pipe
            processes.append(local.process)
        error = None
        with suppress(EOFError, OSError):
            local.pipe.send((meshes[name], name))
            if local.pipe.poll(timeout):
                return name, *local.pipe.recv()
            error = f"not done after --timeout {timeout:g} seconds"
        local.pipe.close()
        local.pipe = None
        if error:
            local.process.kill()
        local.process.join()
        return name, error or f"its process died (exit code {local.process.exitcode})", False

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(run, name) for name in meshes]):
                name, error, at_setup = future.result()
                if at_setup:
                    raise InputError(error)
                yield name, error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()


def main(argv: list[str] | None = None, render=render_mesh):
    text = "Render meshes to data.py's layout, with Blender. Rerun to go on where a run ended."
    parser = argparse.ArgumentParser(
        "python -m tools.render", description=text, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add(
        "--meshes",
        type=Path,
        required=True,
        help=f"folder that is searched for {' '.join(EXTENSIONS)}",
    )
    add(
        "--out", type=Path, required=True, help="folder to write; what is finished in it is skipped"
    )
    add("--views", type=int, default=12, help="views of each object (Zero-1-to-3: 12)")
    add("--size", type=int, help="width and height in pixels (default: 256; with --zero123 512)")
    add(
        "--samples",
        type=int,
        help="samples a pixel, then denoised (default: 32; with --zero123 128)",
    )
    add("--seed", type=int, default=0, help="view i depends on this, the object's name and i only")
    text = "up axis of .obj .ply .stl files, which do not say; format: as Blender guesses, y for .obj, z for the others"
    add("--up", choices=["format", "y", "z"], default="format", help=text)
    add("--zero123", action="store_true", help="Zero-1-to-3's cameras, lights and settings")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where Cycles renders")
    add("--workers", type=int, help="processes (default: one a core, at most 16; with cuda 2)")
    add("--timeout", type=float, default=1800, help="seconds after which a mesh is given up")
    args = parser.parse_args(argv)
    defaults = {"size": 512, "samples": 128} if args.zero123 else {"size": 256, "samples": 32}
    for flag, value in (
        defaults | {"workers": 2 if args.device == "cuda" else min(os.cpu_count(), 16)}
    ).items():
        setattr(args, flag, value if getattr(args, flag) is None else getattr(args, flag))
    require_positive(args, "size", "samples", "workers", "timeout")
    for flag, low, high in (
        ("views", 2, 10**4),
        ("seed", 0, 2**63),
        ("size", 1, int(MAX_PIXELS**0.5)),
    ):
        if not low <= getattr(args, flag) <= high:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be from {low} to {high}")
    if not args.meshes.is_dir():
        raise InputError(f"--meshes {args.meshes}: no such folder")
    if not (meshes := find_meshes(args.meshes)):
        raise InputError(f"--meshes {args.meshes}: no {' '.join(EXTENSIONS)} in it")
    if render is render_mesh and importlib.util.find_spec("bpy") is None:
        raise InputError(f"bpy, Blender as a Python module, is not installed: {REQUIREMENTS}")

    out, settings = args.out.absolute(), {key: getattr(args, key) for key in SETTINGS}
    file, report = (
        out / "render_report.json",
        {"settings": settings, "rendered": [], "skipped": [], "failed": {}},
    )
    try:
        before = json.loads(file.read_text())["settings"] if file.exists() else settings
        differ = [
            f"--{key} {before[key]}, not {settings[key]}"
            for key in SETTINGS
            if before[key] != settings[key]
        ]
        if not differ:
            out.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(out / ".rendering", ignore_errors=True)  # what a killed run left
            file.write_text(json.dumps(report))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{file}: cannot be used ({error!r})") from None
    if differ:
        raise InputError(
            f"--out {args.out}: was begun with {', '.join(differ)}; choose another folder"
        )
    listed = data.list_objects(out) if (out / "valid_paths.json").exists() else []
    finished = {
        name
        for name in meshes
        if (out / name).is_dir() and len(data.list_views(out, name)) == args.views
    }
    report["skipped"], todo = (
        sorted(finished),
        {name: meshes[name] for name in meshes if name not in finished},
    )
    options = settings | {"device": args.device, "threads": max(1, os.cpu_count() // args.workers)}
    work = render_all(todo, out, options, args.workers, args.timeout, render)
    try:
        with (
            closing(work),
            tqdm(total=len(meshes), initial=len(finished), desc="render", unit="mesh") as bar,
        ):
            for name, error in work:
                if error:
                    report["failed"][name] = error
                    bar.write(f"failed: {meshes[name]}: {error}")
                else:
                    report["rendered"].append(name)
                bar.update()
    finally:  # after Ctrl-C too
        shutil.rmtree(out / ".rendering", ignore_errors=True)
        file.write_text(json.dumps(report, indent=1))
        if sound := finished.union(
            report["rendered"], (name for name in listed if (out / name).is_dir())
        ):
            write_list(out, sorted(sound))
    print(
        f"{args.out}: {', '.join(f'{len(report[key])} {key}' for key in list(report)[1:])}; {file} has more"
    )
    if not sound:
        raise InputError(f"--meshes {args.meshes}: nothing could be rendered, {file} says why")


if __name__ == "__main__":
    run_script(main)
