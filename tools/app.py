"""A page in the browser for sample.py, like Zero-1-to-3's demo: drop a photo, move the camera.

    python -m tools.app --ckpt out/demo --steps 20 --scale 1 --device cpu
    python -m tools.app --ckpt runs/full --port 8080    # on a node: ssh -L 8080:localhost:8080 NODE

The views are shown while they denoise. Requests wait for one another. It needs the packages of
tools/app-requirements.txt.
"""

import argparse
import contextlib
import functools
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import pretrained
import sample
from lib.cli import ArgumentParser, InputError, positive_int, run_script
from lib.distributed import open_device
from lib.images import enlarged, load_photo, write_views

TITLE = """
# Efficient-3DiM: new views of an object from one photo of it
Drop a photo of one object, then press **Generate**: the camera goes once around the object. Set
*Orbit* to 0 for a single view from *Azimuth*.
"""
CAMERA_NOTE = "For transforms.json in the download, and for models of `--pose elevation`."
EXAMPLE = Path(__file__).parents[1] / "assets" / "car.png"
PREVIEWS = 10  # predicted x0 shown of each batch: a VAE decodes in about the time of a step


def watch(run_sampler, shown_steps: list[int], codec) -> Iterator[tuple[int, Tensor]]:
    """Calls run_sampler(on_step=...) in a thread, and yields (i, x0 as images) of the steps shown.

    Closing the generator stops the sampler. Raises what the sampler raises.
    """
    previews = queue.SimpleQueue()
    closed = threading.Event()

    def on_step(i: int, x0: Tensor) -> None:
        if closed.is_set():
            raise InputError("stopped")
        if i in shown_steps:
            previews.put((i, sample.decode(x0, codec).cpu()))

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run_sampler, on_step=on_step)
        job.add_done_callback(lambda _: previews.put(None))
        try:
            yield from iter(previews.get, None)
        finally:
            closed.set()  # first of all: leaving the pool waits for the thread
    job.result()


def generate(
    opened: tuple,
    photo: str | None,
    crop: bool,
    *,
    azimuth: float,
    elevation: float,
    distance: float,
    orbit: int,
    seed: int,
    stochastic_conditioning: bool,
    input_elevation: float,
    input_distance: float,
    **settings,
) -> Iterator[tuple]:
    """Yields ([(picture, caption), ...], None) as the views denoise, at last with a zip's path.

    opened: what load_checkpoint returned. The others are sample.py's flags; settings are
    `sample.sample_latents`'s keyword arguments. The zip exists until the next value is asked for.
    Closing the generator stops the sampler. Raises InputError.
    """
    if not photo:
        raise InputError("no image yet: drop one at the top")
    azimuths = sample.orbit_azimuths(orbit, [azimuth]) if orbit else [azimuth]
    poses = sample.camera_moves(azimuths, [elevation], [distance])
    model, encoder, codec, meta = opened
    sample.check_distances(model.pose_encoding, poses)
    image = load_photo(Path(photo), meta["image_size"], crop)
    steps = settings["steps"]
    run_sampler = functools.partial(
        sample.sample_views,
        image,
        poses,
        model,
        encoder,
        codec,
        settings,
        seed,
        stochastic_conditioning=stochastic_conditioning,
        input_elevation=input_elevation,
    )
    finished = []  # views (3,H,W)
    pictures = []  # the same, with captions
    for i, images in watch(run_sampler, sample.saved_steps(steps, PREVIEWS), codec):
        batch = []
        for degrees, picture in zip(azimuths[len(finished) :], images, strict=False):
            batch.append((enlarged(picture, 256), f"{degrees:.0f}°, step {i + 1}"))
        yield pictures + batch, None
        if i == steps - 1:  # the last predicted x0 are the views
            finished += images
            pictures += batch
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out, "views")
        write_views(folder, image, torch.stack(finished), sample.move_names(poses))
        sample.write_transforms(folder, poses, meta["image_size"], input_elevation, input_distance)
        yield pictures, shutil.make_archive(str(folder), "zip", folder)


# ---------------------------------------------------------------------------------------- the page


def import_gradio():
    """The module. Raises InputError where it is not installed, or does not load."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except (ImportError, SystemExit):
        raise InputError(
            "tools.app needs gradio: `pip install -r tools/app-requirements.txt`"
        ) from None
    return gradio


def uploaded_path(upload) -> str | None:
    """What gr.Image gets from the browser -> the file's path, which load_photo opens."""
    return upload.path if upload else None


def move_sliders(gr) -> dict:
    """{sample.py's flag: its component} of the camera's move."""
    return {
        "orbit": gr.Slider(
            0, 36, 8, step=1, precision=0, label="Orbit", info="views, the first at Azimuth; 0: one"
        ),
        "azimuth": gr.Slider(
            -180, 180, 0, step=1, label="Azimuth", info="degrees, counter-clockwise"
        ),
        "elevation": gr.Slider(-90, 90, 0, step=1, label="Elevation", info="degrees, upwards"),
        "distance": gr.Slider(-0.7, 0.7, 0, step=0.05, label="Distance", info="scene units, away"),
    }


def camera_controls(gr) -> dict:
    """{sample.py's flag: its component} of the photo's own camera."""
    return {
        "input_elevation": gr.Slider(-90, 90, 0, step=1, label="Its elevation", info="degrees"),
        "input_distance": gr.Slider(
            1, 3, 1.85, step=0.05, label="Its distance", info="scene units"
        ),
    }


def sampler_controls(gr, args: argparse.Namespace) -> dict:
    """{sample.py's flag: its component} of the sampler; they start as on the command line."""
    return {
        "steps": gr.Slider(1, max(200, args.steps), args.steps, step=1, precision=0, label="Steps"),
        "scale": gr.Slider(
            min(1, args.scale), max(10, args.scale), args.scale, step=0.1, label="Guidance"
        ),
        "seed": gr.Slider(0, max(9999, args.seed), args.seed, step=1, precision=0, label="Seed"),
        "sampler": gr.Radio(["ddim", "dpm"], value=args.sampler, label="Sampler"),
        "stochastic_conditioning": gr.Checkbox(label="Stochastic conditioning"),
    }


def lay_out(gr, args: argparse.Namespace) -> dict:
    """The components of the page by name; "controls" are those of sample.py's flags."""
    gr.Markdown(TITLE)
    parts = {}
    with gr.Row():
        with gr.Column(scale=1):
            parts["photo"] = gr.Image(
                label="Photo", type="filepath", image_mode=None, sources=["upload"], height=300
            )
            # Its own way would open the photo, with a long message where it can't.
            parts["photo"].preprocess = uploaded_path
            parts["crop"] = gr.Checkbox(
                True, label="Crop to the object", info="off for renders framed as in training"
            )
            if EXAMPLE.exists():
                inputs = [parts["photo"], parts["crop"]]
                gr.Examples([[str(EXAMPLE), False]], inputs, label="For assets/cars.safetensors")
            parts["shown"] = gr.Image(
                label="What the model is shown",
                format="png",
                interactive=False,
                buttons=[],
                height=300,
            )
        with gr.Column(scale=3):
            with gr.Row():
                controls = move_sliders(gr)
            with gr.Row():
                parts["start"] = gr.Button("Generate", variant="primary")
                parts["stop"] = gr.Button("Stop")
                parts["file"] = gr.DownloadButton("Download the views")
            parts["views"] = gr.Gallery(
                label="Views", format="png", columns=4, height=640, object_fit="contain"
            )
    with gr.Accordion("Sampler", open=False), gr.Row():
        controls.update(sampler_controls(gr, args))
    with gr.Accordion("The photo's camera", open=False):
        gr.Markdown(CAMERA_NOTE)
        with gr.Row():
            controls.update(camera_controls(gr))
    parts["controls"] = controls
    return parts


def build_page(gr, opened: tuple, args: argparse.Namespace, precision: str):
    """The gradio.Blocks. gr: the gradio module; opened: what load_checkpoint returned."""
    image_size = opened[3]["image_size"]

    @contextlib.contextmanager
    def errors_on_the_page(photo: str | None):
        try:
            yield
        except InputError as error:
            message = str(error).replace(str(photo), "the image")
            raise gr.Error(message, print_exception=False) from None

    def preview(photo: str | None, crop: bool):
        yield None  # instead of what an earlier photo left
        if photo:
            with errors_on_the_page(photo):
                yield enlarged(load_photo(Path(photo), image_size, crop), 256)

    def run(photo: str | None, crop: bool, *values):
        yield [], None  # instead of what an earlier photo left
        flags = dict(zip(parts["controls"], values, strict=True))
        with errors_on_the_page(photo):
            yield from generate(opened, photo, crop, eta=args.eta, precision=precision, **flags)

    with gr.Blocks(
        title="Efficient-3DiM", analytics_enabled=False, delete_cache=(3600, 86400)
    ) as page:
        parts = lay_out(gr, args)
        photo_inputs = [parts["photo"], parts["crop"]]
        changes = [component.change for component in photo_inputs]
        gr.on(changes, preview, photo_inputs, parts["shown"], concurrency_id="preview")
        inputs = [*photo_inputs, *parts["controls"].values()]
        outputs = [parts["views"], parts["file"]]
        running = parts["start"].click(run, inputs, outputs, concurrency_limit=1)
        parts["stop"].click(None, cancels=running)
    return page


def port(text: str) -> int:
    """An argparse type: a TCP port."""
    number = positive_int(text)
    if number >= 2**16:
        raise argparse.ArgumentTypeError(f"{text}: must be below {2**16}")
    return number


def main() -> None:
    parser = ArgumentParser(__doc__)
    sample.add_checkpoint_flags(parser)
    sample.add_sampler_flags(parser.add_argument_group("what the page starts with"))
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets the whole network in",
    )
    parser.add_argument("--port", type=port, default=7860, help="to listen at")
    args = parser.parse_args()
    gr = import_gradio()
    device, precision = open_device(args.device, args.precision)
    opened = pretrained.load_checkpoint(
        args.ckpt, device, args.encoder_weights, args.vae, args.pose
    )
    page = build_page(gr, opened, args, precision)
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            share=False,
            show_error=True,
            footer_links=[],
        )
    except OSError:
        raise InputError(
            f"--host {args.host} --port {args.port}: can't listen there; is the port taken?"
        ) from None


if __name__ == "__main__":
    run_script(main)
