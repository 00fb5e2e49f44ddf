"""Render meshes to the layout that data.py reads, with Blender (bpy) and its Cycles.

    pip install -r tools/render-requirements.txt                       # Python 3.11
    python -m tools.render --meshes FOLDER --out DIR                   # run it again to go on
    python -m tools.render --meshes FOLDER --out DIR --device cuda --size 512 --samples 128
    python -m tools.render --meshes FOLDER --out DIR --zero123         # as Zero-1-to-3 rendered

FOLDER/a/b.glb becomes DIR/a/b/%03d.png (RGBA, straight alpha) and %03d.npy (world-to-camera). World
z is up. All meshes of a file stay together; their bounding box is centred, and its longest edge is
1. The field of view is 49.134 degrees, the radius U(1.5, 2.2). Files that would share a name, such
as a.obj and a.stl, keep their extension in it.

DIR/valid_paths.json lists the objects that are complete. DIR/render_report.json lists what was
rendered, what was skipped because it was finished, and what failed, and why. A file fails, too,
where a texture or a material that it uses is missing.

--zero123 follows objaverse-rendering/scripts/blender_script.py of the zero123 repository:
- Camera directions are those of points uniform in a cube.
- An area light of 300 to 600 W hangs above the object, beside the lamp and the dark grey world of
  Blender's default scene. Colours are Filmic (its setup.sh takes Blender 3.2.2).
- 512 px, 128 samples, few bounces, and a pixel filter of .01, which leaves edges hard.
- Bounds are boxes of the objects' own boxes. Each root object, the area light too, is scaled about
  its own origin.
Three deviations remain. Another Blender has other noise and other importers. Random numbers come
from (seed, name); theirs are unseeded. Theirs renders files whose textures are missing.
"""

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import queue
import shutil
import signal
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from lib.cli import (
    ArgumentParser,
    InputError,
    positive_finite_float,
    positive_int,
    progress,
    run_script,
    seed,
)
from lib.images import MAX_PIXELS
from tools.check import write_list
from tools.shapes import look_at

EXTENSIONS = (".glb", ".gltf", ".obj", ".ply", ".stl", ".fbx")
REQUIREMENTS = "pip install -r tools/render-requirements.txt"
SETTINGS = ("views", "size", "samples", "seed", "up", "zero123")  # the flags that change pictures
MAX_VIEWS = 10_000
MAX_SIZE = int(MAX_PIXELS**0.5)


def find_meshes(folder: Path) -> dict[str, Path]:
    """{name: path} of the meshes under a folder, sorted by name.

    The name is the path inside the folder without its extension. It keeps the extension where
    another mesh or a folder would have the same name in a file system that ignores case.
    """
    folders = []
    meshes = []
    for top, _, files in os.walk(folder, followlinks=True):
        inside = Path(os.path.relpath(top, folder))
        folders.append(inside)
        for file in files:
            if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                meshes.append(inside / file)

    stems = [mesh.with_suffix("") for mesh in meshes]
    claims = Counter(str(path).casefold() for path in [*folders, *meshes, *stems])
    found = {}
    for mesh, stem in zip(meshes, stems, strict=True):
        name = stem if claims[str(stem).casefold()] == 1 else mesh
        found[name.as_posix()] = folder / mesh
    return dict(sorted(found.items()))


def make_rng(seed: int, name: str, stream: int) -> np.random.Generator:
    """Random numbers that depend on (seed, name): stream 0 is for cameras, 1 for lights."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return np.random.default_rng((seed, int.from_bytes(digest[:8], "big"), stream))


def sample_cameras(seed: int, name: str, views: int, zero123: bool) -> np.ndarray:
    """World-to-camera (V,3,4) float64. Row i depends on (seed, name, i) only.

    The cameras look at the origin from a distance of 1.5 to 2.2.
    """
    x, y, z, r = make_rng(seed, name, 0).uniform(-1, 1, (views, 4)).T
    if zero123:
        theta = np.arctan2(np.hypot(x, y), z)
        phi = np.arctan2(y, x)
    else:
        # Deviation: directions are uniform on the sphere. Zero-1-to-3's crowd towards the corners
        # of a cube.
        theta = np.arccos(z)
        phi = np.pi * x
    radius = 1.85 + 0.35 * r
    return look_at(*(torch.from_numpy(value) for value in (theta, phi, radius))).numpy()


# ------------------------------------------------------------------------ in Blender: one object


def render_mesh(mesh: Path, name: str, folder: Path, options: dict) -> None:
    """Renders a mesh file into an empty folder: %03d.png and %03d.npy, a pair a view.

    options: the flags in SETTINGS, the device and the number of threads. Raises InputError where
    the set-up is at fault, and any other error where the file is.
    """
    try:
        import bpy
        from mathutils import Matrix
    except ImportError as error:
        raise InputError(
            f"bpy cannot be imported ({error}): {REQUIREMENTS}, which names its libraries"
        ) from None
    zero123 = options["zero123"]
    make_scene(bpy, options)
    load_mesh(bpy, mesh, options["up"], zero123)
    if zero123:
        normalise_as_zero123(bpy)
    else:
        normalise(bpy)
    add_lights(bpy, make_rng(options["seed"], name, 1), zero123)

    scene = bpy.context.scene
    cameras = sample_cameras(options["seed"], name, options["views"], zero123)
    # Blender would expand "#" and "{}" in the path of `folder`.
    with tempfile.TemporaryDirectory() as plain_folder:
        scene.render.filepath = f"{plain_folder}/view.png"
        for i, pose in enumerate(cameras):
            scene.camera.matrix_world = Matrix([*pose, (0, 0, 0, 1)]).inverted()
            bpy.ops.render.render(write_still=True)
            shutil.move(scene.render.filepath, folder / f"{i:03d}.png")
            np.save(folder / f"{i:03d}.npy", pose)


def make_scene(bpy, options: dict) -> None:
    """A scene with a camera and Cycles' settings, and with --zero123 its lights."""
    zero123 = options["zero123"]
    bpy.ops.wm.read_factory_settings(use_empty=not zero123)
    scene = bpy.context.scene
    render = scene.render
    render.engine = "CYCLES"
    render.resolution_x = options["size"]
    render.resolution_y = options["size"]
    render.resolution_percentage = 100
    render.image_settings.file_format = "PNG"
    render.image_settings.color_mode = "RGBA"
    render.film_transparent = True
    render.use_persistent_data = True
    render.threads_mode = "FIXED"
    render.threads = options["threads"]
    scene.cycles.samples = options["samples"]
    scene.cycles.use_denoising = True
    # Deviation: colours as the textures have them, and Cycles' own pixel filter (1.5) for soft
    # edges.
    scene.view_settings.view_transform = "Filmic" if zero123 else "Standard"
    if zero123:
        change_default_scene(bpy)
    else:
        scene.cycles.denoising_prefilter = "FAST"  # half the time; we saw no difference
        scene.world = bpy.data.worlds.new("World")
        camera = bpy.data.cameras.new("Camera")
        scene.camera = bpy.data.objects.new("Camera", camera)
        scene.collection.objects.link(scene.camera)
    scene.camera.data.lens = 35
    scene.camera.data.sensor_width = 32
    if options["device"] == "cuda":
        use_cuda(bpy)


def change_default_scene(bpy) -> None:
    """Turns Blender's default scene into that of zero123's blender_script.py."""
    cycles = bpy.context.scene.cycles
    cycles.filter_width = 0.01
    cycles.diffuse_bounces = 1
    cycles.glossy_bounces = 1
    cycles.transparent_max_bounces = 3
    cycles.transmission_bounces = 3
    bpy.data.objects.remove(bpy.data.objects["Cube"])
    bpy.ops.object.light_add(type="AREA")
    bpy.context.object.scale = 100, 100, 100


def use_cuda(bpy) -> None:
    """Makes Cycles render on all CUDA devices. Raises InputError where there is none."""
    preferences = bpy.context.preferences.addons["cycles"].preferences
    preferences.compute_device_type = "CUDA"
    preferences.refresh_devices()
    for device in preferences.devices:
        device.use = device.type == "CUDA"
    if not any(device.use for device in preferences.devices):
        raise InputError("--device cuda: Blender finds no CUDA device")
    bpy.context.scene.cycles.device = "GPU"


def load_mesh(bpy, path: Path, up: str, zero123: bool) -> None:
    """Imports a file with its materials, world z up.

    Raises ValueError where a texture or a material is missing, and Blender's own RuntimeError where
    the file cannot be read.
    """
    import_mesh(bpy, path, up, zero123)
    check_textures(bpy)
    if not zero123:
        for obj in list(bpy.data.objects):
            if obj.type in ("CAMERA", "LIGHT") and obj != bpy.context.scene.camera:
                bpy.data.objects.remove(obj)
        show_vertex_colours(bpy)


def import_mesh(bpy, path: Path, up: str, zero123: bool) -> None:
    kind = path.suffix.lower()
    file = os.path.abspath(path)
    if kind in (".glb", ".gltf"):
        bpy.ops.import_scene.gltf(filepath=file, merge_vertices=zero123)
    elif kind == ".fbx":
        # Blender 4.5 brought a second importer, which reads more files.
        if "fbx_import" in dir(bpy.ops.wm):
            bpy.ops.wm.fbx_import(filepath=file)
        else:
            bpy.ops.import_scene.fbx(filepath=file)
    else:
        if kind == ".obj":
            check_obj_materials(path)
        axes = {
            "format": {},
            "y": {"forward_axis": "NEGATIVE_Z", "up_axis": "Y"},
            "z": {"forward_axis": "Y", "up_axis": "Z"},
        }[up]
        import_file = getattr(bpy.ops.wm, f"{kind[1:]}_import")
        import_file(filepath=file, **axes)


def check_obj_materials(path: Path) -> None:
    """Raises ValueError where an OBJ uses a material that is not defined; Blender makes it grey.

    As in Blender's importer, the rest of a `mtllib` line is one file's name, and the .mtl file
    beside the OBJ counts, too.
    """
    libraries = [path.with_suffix(".mtl")]
    used = set()
    with open(path, "rb") as file:
        for line in file:
            keyword, _, rest = line.strip().partition(b" ")
            if keyword == b"mtllib":
                libraries.append(path.parent / os.fsdecode(rest.strip().strip(b'"')))
            elif keyword == b"usemtl":
                used.add(rest.strip())
    used -= {b"", b"(null)"}  # some exporters write these for "no material"

    defined = set()
    for library in libraries:
        if library.is_file():
            for line in library.read_bytes().splitlines():
                keyword, _, rest = line.strip().partition(b" ")
                if keyword == b"newmtl":
                    defined.add(rest.strip())
    missing = sorted(used - defined)
    if missing:
        lost = [library.name for library in libraries[1:] if not library.is_file()]
        reason = f"there is no {lost[0]}" if lost else "no .mtl file defines it"
        raise ValueError(f"material {os.fsdecode(missing[0])} is missing: {reason}")


def check_textures(bpy) -> None:
    """Raises ValueError where a texture has no image; Blender would paint it magenta."""
    for image in bpy.data.images:
        if image.source == "FILE" and image.users and not image.size[0]:
            raise ValueError(f"texture missing or unreadable: {image.filepath or image.name}")
    for material in bpy.data.materials:
        if not material.users or not material.node_tree:
            continue
        for node in material.node_tree.nodes:
            is_used = any(output.is_linked for output in node.outputs)
            if node.type == "TEX_IMAGE" and node.image is None and is_used:
                raise ValueError(f"material {material.name}: a texture without an image")


def show_vertex_colours(bpy) -> None:
    """Gives meshes that have vertex colours and no material one that shows them."""
    for mesh in bpy.data.meshes:
        if not mesh.color_attributes or any(mesh.materials):
            continue
        material = bpy.data.materials.new("Vertex colours")
        material.use_nodes = True
        tree = material.node_tree
        colours = tree.nodes.new("ShaderNodeVertexColor")
        colours.layer_name = mesh.color_attributes[0].name
        surface = tree.nodes["Principled BSDF"]
        tree.links.new(colours.outputs["Color"], surface.inputs["Base Color"])
        mesh.materials.clear()
        mesh.materials.append(material)


def bounds_of(points: list[np.ndarray]) -> np.ndarray:
    """Lowest and highest corner (2,3) of points, a list of (N,3). ValueError without an extent."""
    stacked = np.concatenate([np.empty((0, 3)), *points])
    if not len(stacked):
        raise ValueError("no faces")
    bounds = np.stack([stacked.min(0), stacked.max(0)])
    if not np.isfinite(bounds).all() or np.ptp(bounds, axis=0).max() <= 0:
        raise ValueError(f"no extent: bounding box {bounds.tolist()}")
    return bounds


def visible_points(bpy) -> list[np.ndarray]:
    """World coordinates (N,3) of the vertices of each object that is rendered."""
    bpy.context.view_layer.update()
    points = []
    for instance in bpy.context.evaluated_depsgraph_get().object_instances:
        obj = instance.object
        if obj.type not in ("MESH", "CURVE", "SURFACE", "FONT", "META") or obj.hide_render:
            continue
        matrix = np.array(instance.matrix_world)
        mesh = obj.to_mesh()
        vertices = np.empty(3 * len(mesh.vertices), np.float32)
        mesh.vertices.foreach_get("co", vertices)
        used = np.empty(len(mesh.loops), np.int32)
        mesh.loops.foreach_get("vertex_index", used)
        used = np.unique(used)  # a vertex without a face is not seen
        points.append(vertices.reshape(-1, 3)[used] @ matrix[:3, :3].T + matrix[:3, 3])
        obj.to_mesh_clear()
    return points


def box_corners(bpy) -> list[np.ndarray]:
    """World coordinates (8,3) of each mesh object's own box, which is too wide once rotated."""
    from mathutils import Vector

    bpy.context.view_layer.update()
    points = []
    for obj in bpy.context.scene.objects:
        if obj.type == "MESH":
            corners = [obj.matrix_world @ Vector(corner) for corner in obj.bound_box]
            points.append(np.array(corners))
    return points


def normalise(bpy) -> None:
    """Scales and moves the scene: longest edge of the bounding box 1, centred at the origin."""
    from mathutils import Matrix, Vector

    bounds = bounds_of(visible_points(bpy))
    scale = 1 / float(np.ptp(bounds, axis=0).max())
    centre = Vector(bounds.mean(0))
    scene = bpy.context.scene
    # Deviation: one parent moves all objects. Zero-1-to-3's way tears a file of several root
    # objects apart.
    roots = [obj for obj in scene.objects if obj.parent is None and obj != scene.camera]
    parent = bpy.data.objects.new("Normalised", None)
    scene.collection.objects.link(parent)
    parent.matrix_world = Matrix.Scale(scale, 4) @ Matrix.Translation(-centre)
    for obj in roots:
        obj.parent = parent


def normalise_as_zero123(bpy) -> None:
    """As `normalise`, by zero123's boxes, and each root object on its own."""
    from mathutils import Vector

    scale = 1 / float(np.ptp(bounds_of(box_corners(bpy)), axis=0).max())
    roots = [obj for obj in bpy.context.scene.objects if obj.parent is None]
    for obj in roots:
        obj.scale = obj.scale * scale
    centre = Vector(bounds_of(box_corners(bpy)).mean(0))
    for obj in roots:
        obj.matrix_world.translation -= centre


def add_lights(bpy, rng: np.random.Generator, zero123: bool) -> None:
    """Lights of an object, the same in all its views.

    A white sky reaches every side; a sun and a weaker one from elsewhere give it shape. What is
    white shows at most .4 + 2.1 / pi.
    """
    from mathutils import Vector

    if zero123:
        area = bpy.data.objects["Area"]
        area.data.energy = rng.uniform(300, 600)
        area.location = rng.uniform((-1, -1, 0.5), (1, 1, 1.5))
        return
    # Deviation: Zero-1-to-3's lamps are all above, which leaves undersides nearly black.
    scene = bpy.context.scene
    scene.world.use_nodes = True
    sky = scene.world.node_tree.nodes["Background"].inputs
    sky["Color"].default_value = (1, 1, 1, 1)
    sky["Strength"].default_value = 0.4
    direction = rng.normal(size=3) + [0, 0, 1]
    opposite = rng.normal(size=3) - direction
    for energy, towards in ((1.5, direction), (0.6, opposite)):
        sun = bpy.data.objects.new("Sun", bpy.data.lights.new("Sun", "SUN"))
        sun.data.energy = energy
        sun.data.angle = 0.3
        sun.rotation_euler = Vector(towards).to_track_quat("Z", "Y").to_euler()
        scene.collection.objects.link(sun)


# -------------------------------------------------------------- in worker processes: one by one


def plain_message(error: Exception) -> str:
    """An error's message in one line; of a traceback that Blender passes on, the error alone."""
    lines = str(error).strip().splitlines()
    if any("Traceback" in line for line in lines):
        # Calls are indented, and bpy adds a line "Location: ..." of its own.
        lines = [line for line in lines if line[:1].strip() and not line.startswith("Location:")]
        lines = ["in Blender:", lines[-1]]
    return " ".join(" ".join(lines).split()) or type(error).__name__


def write_object(mesh: Path, name: str, out: Path, options: dict, render) -> None:
    """Renders a mesh to OUT/name, which appears whole or not at all. Raises what went wrong."""
    part = out / ".rendering" / name
    part.mkdir(parents=True)
    try:
        render(mesh, name, part, options)
        views = data.list_views(part.parent, part.name)
        if len(views) != options["views"]:
            raise ValueError(f"{len(views)} views came out")
        opacity = [Image.open(image).getchannel("A").getextrema()[1] for image, _ in views]
        if not any(opacity):
            raise ValueError("nothing visible in any view")
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, out / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def serve(pipe, out: Path, options: dict, render) -> None:
    """What a worker process does: renders each (mesh, name) that it is sent.

    It answers with (what went wrong or None, whether the set-up is at fault).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # Blender prints much
        os.dup2(nowhere, stream)
    with suppress(EOFError, OSError):  # the parent process has gone
        while True:
            mesh, name = pipe.recv()
            answer = (None, False)
            try:
                write_object(mesh, name, out, options, render)
            except Exception as error:
                answer = (plain_message(error), isinstance(error, InputError))
            pipe.send(answer)


class Worker:
    """A process that renders one mesh after the other. When it hangs or dies another takes over."""

    def __init__(self, context, arguments: tuple, timeout: float):
        self.context = context
        self.arguments = arguments  # of `serve`, without the pipe
        self.timeout = timeout
        self.process = None

    def start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(
            target=serve, args=(theirs, *self.arguments), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does

    def render(self, mesh: Path, name: str) -> tuple[str | None, bool]:
        """What went wrong, or None, and whether the set-up is at fault rather than the mesh."""
        if self.process is None:
            self.start()
        process = self.process
        try:
            self.pipe.send((mesh, name))
            if self.pipe.poll(self.timeout):
                return self.pipe.recv()
            process.kill()
            reason = f"not done after --timeout {self.timeout:g} seconds"
        except (EOFError, OSError):
            process.join()
            reason = f"its process died (exit code {process.exitcode})"
        process.join()
        self.pipe.close()
        self.process = None
        return reason, False

    def kill(self) -> None:
        process = self.process
        if process is not None:
            process.kill()


def render_all(meshes, out: Path, options: dict, n_workers: int, timeout: float, render):
    """Renders {name: path} in worker processes; yields (name, what went wrong or None) as they end.

    Raises InputError where the set-up, and no mesh, is at fault.
    """
    # A forkserver imports torch once for all workers.
    has_forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_forkserver else "spawn")
    context.set_forkserver_preload(["torch"])
    workers = [Worker(context, (out, options, render), timeout) for _ in range(n_workers)]
    idle = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(name: str) -> tuple:
        worker = idle.get()
        try:
            return name, *worker.render(meshes[name], name)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(n_workers) as pool:
        try:
            for future in as_completed([pool.submit(run, name) for name in meshes]):
                name, error, setup_failed = future.result()
                if setup_failed:
                    raise InputError(error)
                yield name, error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.kill()


# ---------------------------------------------------------------------------------------- command


def whole_number(low: int, high: int):
    """An argparse type: a whole number from low to high."""

    def parse(text: str) -> int:
        value = positive_int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high}")
        return value

    return parse


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m tools.render")
    flag = parser.add_argument
    flag("--meshes", type=Path, required=True, help=f"folder of {' '.join(EXTENSIONS)} files")
    flag("--out", type=Path, required=True, help="folder to write; finished objects are skipped")
    flag(
        "--views",
        type=whole_number(2, MAX_VIEWS),
        default=12,
        help="views of each object (Zero-1-to-3: 12)",
    )
    flag(
        "--size",
        type=whole_number(1, MAX_SIZE),
        help="width and height in pixels (default: 256; with --zero123 512)",
    )
    flag(
        "--samples",
        type=positive_int,
        help="samples a pixel, which are then denoised (default: 32; with --zero123 128)",
    )
    flag(
        "--seed",
        type=seed,
        default=0,
        help="view i depends on this, on the object's name and on i, and on nothing else",
    )
    flag(
        "--up",
        choices=["format", "y", "z"],
        default="format",
        help="up axis of .obj, .ply and .stl files, which do not say it; "
        "format: Blender's guess, y for .obj, z for the others",
    )
    flag("--zero123", action="store_true", help="Zero-1-to-3's cameras, lights and settings")
    flag("--device", choices=["cpu", "cuda"], default="cpu", help="where Cycles renders")
    flag(
        "--workers",
        type=positive_int,
        help="processes (default: one a core, at most 16; with --device cuda 2)",
    )
    flag(
        "--timeout",
        type=positive_finite_float,
        default=1800,
        help="seconds after which a mesh is given up",
    )
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> dict:
    """The flags in SETTINGS with their defaults filled in."""
    settings = {key: getattr(args, key) for key in SETTINGS}
    if args.size is None:
        settings["size"] = 512 if args.zero123 else 256
    if args.samples is None:
        settings["samples"] = 128 if args.zero123 else 32
    return settings


def open_output(out: Path, settings: dict, report: dict) -> Path:
    """Makes the folder, removes what a killed run left, writes the report's file and returns it.

    Raises InputError where it can't, or where the folder was begun with other settings.
    """
    file = out / "render_report.json"
    try:
        earlier = json.loads(file.read_text())["settings"] if file.exists() else settings
        differences = [
            f"--{key} {earlier[key]}, not {settings[key]}"
            for key in SETTINGS
            if earlier[key] != settings[key]
        ]
        if not differences:
            out.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(out / ".rendering", ignore_errors=True)
            file.write_text(json.dumps(report))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{file}: cannot be used ({error!r})") from None
    if differences:
        raise InputError(
            f"--out {out}: was begun with {', '.join(differences)}; choose another folder"
        )
    return file


def is_finished(out: Path, name: str, views: int) -> bool:
    return (out / name).is_dir() and len(data.list_views(out, name)) == views


def follow(results, meshes: dict[str, Path], report: dict) -> None:
    """Puts the results of `render_all` into the report as they come, under a progress bar."""
    skipped = len(report["skipped"])
    bar = progress(total=len(meshes), initial=skipped, desc="render", unit="mesh")
    with closing(results), bar:
        for name, error in results:
            if error:
                report["failed"][name] = error
                bar.write(f"failed: {meshes[name]}: {error}")
            else:
                report["rendered"].append(name)
            bar.update()


def main(argv: list[str] | None = None, render=render_mesh) -> None:
    args = parse_args(argv)
    if not args.meshes.is_dir():
        raise InputError(f"--meshes {args.meshes}: no such folder")
    meshes = find_meshes(args.meshes)
    if not meshes:
        raise InputError(f"--meshes {args.meshes}: no {' '.join(EXTENSIONS)} in it")
    if render is render_mesh and importlib.util.find_spec("bpy") is None:
        raise InputError(f"bpy, Blender as a Python module, is not installed: {REQUIREMENTS}")

    out = args.out.absolute()
    settings = settings_of(args)
    report = {"settings": settings, "rendered": [], "skipped": [], "failed": {}}
    report_file = open_output(out, settings, report)
    listed = data.list_objects(out) if (out / "valid_paths.json").exists() else []
    finished = {name for name in meshes if is_finished(out, name, args.views)}
    report["skipped"] = sorted(finished)
    todo = {name: path for name, path in meshes.items() if name not in finished}

    workers = args.workers
    if workers is None:
        workers = 2 if args.device == "cuda" else min(os.cpu_count(), 16)
    options = {
        **settings,
        "device": args.device,
        "threads": max(1, os.cpu_count() // workers),
    }
    try:
        follow(render_all(todo, out, options, workers, args.timeout, render), meshes, report)
    finally:  # after Ctrl-C and SIGTERM, too
        shutil.rmtree(out / ".rendering", ignore_errors=True)
        report_file.write_text(json.dumps(report, indent=1))
        earlier = [name for name in listed if (out / name).is_dir()]
        sound = sorted({*earlier, *report["skipped"], *report["rendered"]})
        if sound:
            write_list(out, sound)
    counts = ", ".join(f"{len(report[key])} {key}" for key in ("rendered", "skipped", "failed"))
    print(f"{args.out}: {counts}; {report_file} has more")
    if not sound:
        raise InputError(
            f"--meshes {args.meshes}: nothing could be rendered, {report_file} says why"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    run_script(main)
