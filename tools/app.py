"""A page in the browser for sample.py, like Zero-1-to-3's demo: drop an image, move the camera, watch it denoise.

    python -m tools.app --ckpt out/demo --steps 20 --scale 1 --device cpu
    python -m tools.app --ckpt runs/full --port 8080      # on a node; then `ssh -L 8080:localhost:8080 NODE`

Requests wait for one another. Needs tools/app-requirements.txt.
"""

import argparse
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

import pretrained
import sample
from lib import images as pictures
from lib.cli import HelpFormatter, InputError, run_script
from lib.distributed import set_up


def enlarged(image: Tensor) -> Image.Image:
    """(3,H,W) in [-1,1] -> a picture that can be seen: a small one is magnified, by whole pixels."""
    return ImageOps.scale(
        pictures.to_pil(image), max(1, 256 // image.shape[-1]), Image.Resampling.NEAREST
    )


def generate(
    opened: tuple, args: argparse.Namespace, photo: str | None, crop: bool, **flags
) -> Iterator[tuple]:
    """Yields ([(picture, caption), ...], None) as they denoise; at last a zip's path too, which lives till closed.

    opened: load_checkpoint's result; flags: sample.py's, before args' own. Closed, it stops sampling. InputError.
    """
    if not photo:
        raise InputError("no image yet: drop one at the top")
    moves = [360 * i / flags["orbit"] for i in range(flags["orbit"])] or [flags["azimuth"]]
    args = argparse.Namespace(
        **vars(args) | flags | dict(azimuth=moves, shared_noise=False, save_x0=0)
    )
    poses = sample.camera_moves(moves, [args.elevation], [args.distance])
    model, encoder, codec, meta = opened
    image = pictures.load_photo(Path(photo), meta["image_size"], crop)
    previews, alive, done = queue.SimpleQueue(), threading.Lock(), []

    def on_step(i: int, x0: Tensor) -> None:
        if not alive.locked():
            raise InputError("stopped")
        if i in sample.saved_steps(
            args.steps, 10
        ):  # not all: a VAE decodes a view in about the time of a step
            previews.put((i + 1, sample.decode(x0, codec).cpu()))

    with (
        ThreadPoolExecutor(1) as pool,
        alive,
    ):  # so that the lock is released first, however this is left
        views = pool.submit(sample.sample_views, image, poses, model, encoder, codec, args, on_step)
        views.add_done_callback(lambda _: previews.put(None))
        for step, x0 in iter(previews.get, None):
            batch = [
                (enlarged(view), f"{moves[i]:.0f}°, step {step}")
                for i, view in enumerate(x0, len(done))
            ]
            yield done + batch, None
            done += (
                batch if step == args.steps else []
            )  # those x0 are the views; the next are of another batch
    with tempfile.TemporaryDirectory() as out:
        pictures.write_views(
            Path(out, "views"), image, views.result(), [f"{move:.0f}" for move in moves]
        )
        yield done, shutil.make_archive(f"{out}/views", "zip", f"{out}/views")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    sample.add_checkpoint_flags(parser)
    sample.add_sampler_flags(parser.add_argument_group("what the page starts with"))
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets the whole network in",
    )
    parser.add_argument("--port", type=int, default=7860, help="to listen at")
    parser.set_defaults(batch_size=16)
    args = parser.parse_args()
    sample.check_sampler_flags(args)
    if not 1 <= args.port < 2**16:
        raise InputError(f"--port {args.port}: between 1 and {2**16 - 1}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise InputError(
            "tools.app needs gradio: `pip install -r tools/app-requirements.txt`"
        ) from None
    opened, flags = (
        pretrained.load_checkpoint(args.ckpt, set_up(args)[0], args.encoder_weights, args.vae),
        {},
    )

    def run(photo, crop, *values):  # without values only what the model is shown
        try:
            yield ([], None) if values else None  # in place of what an earlier image left
            if values:
                yield from generate(
                    opened, args, photo, crop, **dict(zip(flags, values, strict=True))
                )
            elif photo:
                yield enlarged(pictures.load_photo(Path(photo), opened[3]["image_size"], crop))
        except InputError as error:
            raise gr.Error(
                str(error).replace(str(photo), "the image"), print_exception=False
            ) from None

    with gr.Blocks(
        title="Efficient-3DiM", analytics_enabled=False, delete_cache=(3600, 86400)
    ) as app:
        with gr.Row():
            photo = gr.Image(
                label="Image", type="filepath", image_mode=None, sources=["upload"], height=340
            )
            shown = gr.Image(
                label="What the model is shown",
                format="png",
                interactive=False,
                buttons=[],
                height=340,
            )
            views = gr.Gallery(
                label="Views", format="png", columns=4, fit_columns=False, scale=2, height=340
            )
        with gr.Row():
            crop = gr.Checkbox(
                True, label="Crop to the object", info="off for renders framed as in training"
            )
            start, stop, file = (
                gr.Button("Generate", variant="primary"),
                gr.Button("Stop"),
                gr.DownloadButton(),
            )
        with gr.Row():
            flags["azimuth"] = gr.Slider(
                -180, 180, 0, step=1, label="Azimuth", info="degrees, counter-clockwise"
            )
            flags["elevation"] = gr.Slider(
                -90, 90, 0, step=1, label="Elevation", info="degrees, upwards"
            )
            flags["distance"] = gr.Slider(
                -0.7, 0.7, 0, step=0.05, label="Distance", info="scene units, away"
            )
            flags["orbit"] = gr.Slider(
                0, 36, 0, step=1, precision=0, label="Orbit", info="views all around, or 0"
            )
        with gr.Row():
            flags["steps"] = gr.Slider(
                1, max(200, args.steps), args.steps, step=1, precision=0, label="Steps"
            )
            flags["scale"] = gr.Slider(
                min(1, args.scale), max(10, args.scale), args.scale, step=0.1, label="Guidance"
            )
            flags["seed"] = gr.Slider(
                0, max(9999, args.seed), args.seed, step=1, precision=0, label="Seed"
            )
            flags["sampler"] = gr.Radio(["ddim", "dpm"], value=args.sampler, label="Sampler")
            flags["stochastic_conditioning"] = gr.Checkbox(label="Stochastic conditioning")
        gr.on([photo.change, crop.change], run, [photo, crop], shown, concurrency_id="preview")
        stop.click(
            None,
            cancels=start.click(
                run, [photo, crop, *flags.values()], [views, file], concurrency_limit=1
            ),
        )
    try:
        app.launch(
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
