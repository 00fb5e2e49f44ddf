"""tools/app.py: the function behind the button, without gradio; and the page, with gradio."""

import sys
import threading
import zipfile

import numpy as np
import pytest
from helpers import call
from PIL import Image

import pretrained
import sample
from lib.cli import InputError
from tools import app

FLAGS = {
    "azimuth": 0.0,
    "elevation": 0.0,
    "distance": 0.0,
    "orbit": 0,
    "steps": 3,
    "scale": 1.0,
    "seed": 0,
    "sampler": "ddim",
    "stochastic_conditioning": False,
    "input_elevation": 10.0,
    "input_distance": 2.0,
}
FIXED = {"eta": 1.0, "precision": "fp32"}  # what the page has no controls for


@pytest.fixture(scope="module")
def opened(run):
    return pretrained.load_checkpoint(str(run))


@pytest.fixture
def photo(tree):
    return str(sorted(tree.glob("*/000.png"))[-1])


@pytest.mark.parametrize(
    "crop, changed",
    [
        (False, {"azimuth": 60.0, "elevation": 10.0, "distance": 0.2}),
        (True, {"orbit": 17, "seed": 3, "scale": 2.0, "steps": 2}),  # two batches
        (True, {"orbit": 3, "sampler": "dpm", "stochastic_conditioning": True, "steps": 11}),
    ],
)
def test_views_are_sample_pys(run, opened, photo, tmp_path, crop, changed):
    flags = {**FLAGS, **changed}
    argv = [f"--{name}={value}" for name, value in flags.items() if not isinstance(value, bool)]
    argv.append("--crop" if crop else "--no-crop")
    if flags["stochastic_conditioning"]:
        argv.append("--stochastic_conditioning")
    call(sample, "--ckpt", run, "--image", photo, "--out", tmp_path, "--device", "cpu", *argv)
    written = {path.name: path.read_bytes() for path in (tmp_path / "000").iterdir()}

    yields = []
    for pictures, file in app.generate(opened, photo, crop, **flags, **FIXED):
        yields.append(pictures)
        if file:
            with zipfile.ZipFile(file) as archive:
                assert {name: archive.read(name) for name in archive.namelist()} == written
    count = flags["orbit"] or 1
    batches = count if flags["stochastic_conditioning"] else -(-count // 16)
    # Predicted x0 while it denoises, then the views.
    assert len(yields) == batches * min(flags["steps"], app.PREVIEWS) + 1
    lengths = [len(pictures) for pictures in yields]
    assert lengths == sorted(lengths)
    assert lengths[-1] == count
    first, second = (np.asarray(pictures[0][0]) for pictures in yields[:2])
    assert not np.array_equal(first, second)
    for i, (picture, caption) in enumerate(yields[-1]):
        azimuth = 360 * i / flags["orbit"] if flags["orbit"] else 60
        assert caption == f"{azimuth:.0f}°, step {flags['steps']}"
        assert picture.size == (256, 256)  # 32 pixels, magnified by whole ones
        with Image.open(tmp_path / "000" / f"{i:03d}.png") as view:
            assert np.array_equal(np.asarray(picture)[::8, ::8], np.asarray(view))


def test_closing_it_stops_the_sampler(opened, photo):
    steps_run = []
    hook = opened[0].register_forward_hook(lambda *_: steps_run.append(1))
    threads = threading.active_count()
    views = app.generate(opened, photo, False, **{**FLAGS, "steps": 1000}, **FIXED)
    next(views)
    views.close()
    hook.remove()
    assert len(steps_run) < 500
    assert threading.active_count() == threads


def test_errors_are_one_line(opened, photo, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"\x89PNG")
    for wrong, changed, message in (
        (None, {}, "no image yet"),
        (str(damaged), {}, "damaged.png: unreadable image"),
        (photo, {"steps": 1001}, "--steps 1001"),  # raised in the sampler's thread
    ):
        with pytest.raises(InputError, match=message) as error:
            list(app.generate(opened, wrong, True, **{**FLAGS, **changed}, **FIXED))
        assert "\n" not in str(error.value)


def test_without_gradio_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match="pip install -r tools/app-requirements.txt"):
        call(app, "--ckpt", run)
    monkeypatch.delitem(sys.modules, "gradio")
    (tmp_path / "gradio.py").write_text("raise SystemExit(1)")  # as some packages do
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="pip install -r tools/app-requirements.txt"):
        call(app, "--ckpt", run)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("seed", -1),
        ("steps", 0),
        ("steps", 1001),
        ("eta", 5.0),
        ("scale", "nan"),
        ("port", 99999),
        ("port", 0),
    ],
)
def test_flags_that_every_request_would_fail_on(run, flag, value):
    with pytest.raises(InputError, match=f"--{flag} {value}[ :]"):
        call(app, "--ckpt", run, f"--{flag}={value}")


# ---------------------------------------------------------------------------------------- the page


@pytest.fixture
def gradio(monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    return pytest.importorskip("gradio", reason="optional: tools/app-requirements.txt")


@pytest.fixture
def open_page(gradio, run, monkeypatch):
    """A function: the flags -> the page that main() would launch, and launch()'s options."""
    launched = []
    monkeypatch.setattr(
        gradio.Blocks, "launch", lambda page, **options: launched.append((page, options))
    )

    def open_page(*flags):
        call(app, "--ckpt", run, "--device", "cpu", *flags)
        return launched[-1]

    return open_page


def functions_of(page) -> tuple:
    """The page's preview and the function behind its button, without what gradio adds itself."""
    named = {fn.name: fn for fn in page.fns.values()}
    return named["preview"], named["run"]


def test_the_page_starts_with_an_orbit_and_the_flags_of_the_command_line(open_page):
    flags = ["--steps", 3, "--scale", 1, "--seed", 5, "--sampler", "dpm"]
    page, options = open_page(*flags)
    assert options["server_name"] == "127.0.0.1"
    assert options["share"] is False
    assert not page.analytics_enabled
    preview, generate = functions_of(page)
    assert generate.concurrency_limit == 1
    assert generate.concurrency_id != preview.concurrency_id
    values = [component.value for component in generate.inputs]
    assert values == [None, True, 8, 0, 0, 0, 3, 1, 5, "dpm", False, 0, 1.85]


def test_guidance_below_the_sliders_range_widens_it(open_page):
    page, _ = open_page("--scale", 0)
    blocks = page.blocks.values()
    scale = next(block for block in blocks if getattr(block, "label", "") == "Guidance")
    assert scale.minimum <= scale.value == 0


def test_the_page_makes_views_and_shows_errors(gradio, open_page, photo, tmp_path):
    from gradio.data_classes import ImageData

    damaged = tmp_path / "damaged.heic"
    damaged.write_bytes(b"no picture")
    page, _ = open_page("--steps", 3, "--scale", 1)
    preview, generate = functions_of(page)
    values = [component.value for component in generate.inputs]
    # A photo that can't be read gets past gr.Image, to load_photo's one line.
    upload = generate.inputs[0]
    assert upload.preprocess(ImageData(path=str(damaged))) == str(damaged)
    assert upload.preprocess(None) is None
    *_, (views, file) = generate.fn(photo, *values[1:])
    assert len(views) == 8
    assert file.endswith(".zip")
    pictures = list(preview.fn(photo, False))
    assert pictures[0] is None  # clears what an earlier photo left
    assert pictures[1].size == (256, 256)
    for wrong, message in ((None, "no image yet"), (str(damaged), "the image: unreadable image")):
        with pytest.raises(gradio.Error, match=message):
            list(generate.fn(wrong, *values[1:]))
