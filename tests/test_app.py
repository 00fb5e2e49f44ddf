"""tools/app.py: the function behind the button, without gradio; and the page, where gradio is installed."""

import argparse
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

FLAGS = dict(azimuth=0.0, elevation=0.0, distance=0.0, orbit=0, steps=3, scale=1.0, seed=0, sampler="ddim",
             stochastic_conditioning=False)  # fmt: skip
ARGS = argparse.Namespace(eta=1.0, precision="fp32", batch_size=16)


@pytest.fixture(scope="module")
def opened(run):
    return pretrained.load_checkpoint(str(run))


@pytest.fixture
def photo(tree):
    return str(sorted(tree.glob("*/000.png"))[-1])


@pytest.mark.parametrize("crop, orbit, changed", [
    (False, 0, dict(azimuth=60.0, elevation=10.0, distance=0.2)),
    (True, 17, dict(seed=3, scale=2.0, steps=2)),  # two batches
    (True, 3, dict(sampler="dpm", stochastic_conditioning=True, steps=11)),
])  # fmt: skip
def test_views_are_sample_pys(run, opened, photo, tmp_path, crop, orbit, changed):
    flags = FLAGS | changed | {"orbit": orbit}
    argv = [f"--{name}={value}" for name, value in flags.items() if not isinstance(value, bool)]
    argv += ["--stochastic_conditioning"] * flags["stochastic_conditioning"] + [
        "--crop" if crop else "--no-crop"
    ]
    call(sample, "--ckpt", run, "--image", photo, "--out", tmp_path, "--device", "cpu", *argv)
    written = {path.name: path.read_bytes() for path in (tmp_path / "000").iterdir()}

    yields = []
    for pictures, file in app.generate(opened, ARGS, photo, crop, **flags):
        yields.append(pictures)
        if file:
            with zipfile.ZipFile(file) as archive:
                assert {name: archive.read(name) for name in archive.namelist()} == written
    n = orbit or 1
    batches = n if flags["stochastic_conditioning"] else -(-n // 16)
    assert (
        len(yields) == batches * min(flags["steps"], 10) + 1
    )  # predicted x0 as it denoises, then the views
    assert [len(pictures) for pictures in yields] == sorted(len(pictures) for pictures in yields)
    assert not np.array_equal(*(np.asarray(pictures[0][0]) for pictures in yields[:2]))
    for i, (picture, caption) in enumerate(yields[-1]):
        assert caption == f"{360 * i / orbit if orbit else 60:.0f}°, step {flags['steps']}"
        assert picture.size == (256, 256)  # 32 pixels, magnified by whole ones
        with Image.open(tmp_path / "000" / f"{i:03d}.png") as view:
            assert np.array_equal(np.asarray(picture)[::8, ::8], np.asarray(view))
    assert len(yields[-1]) == n


def test_closing_it_stops_the_sampler(opened, photo, monkeypatch):
    steps, ddim_step = [], sample.ddim_step
    monkeypatch.setattr(sample, "ddim_step", lambda *args: steps.append(1) or ddim_step(*args))
    threads = threading.active_count()
    views = app.generate(opened, ARGS, photo, False, **FLAGS | {"steps": 1000})
    next(views)
    views.close()
    assert len(steps) < 500 and threading.active_count() == threads


def test_errors_are_one_line(opened, photo, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"\x89PNG")
    for wrong, changed, message in (
        (None, {}, "no image yet"),
        (str(damaged), {}, "damaged.png"),
        (photo, {"steps": 1001}, "--steps 1001"),  # raised in the sampler's thread
    ):
        with pytest.raises(InputError, match=message) as error:
            list(app.generate(opened, ARGS, wrong, True, **FLAGS | changed))
        assert "\n" not in str(error.value)


def test_without_gradio_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match="pip install -r tools/app-requirements.txt"):
        call(app, "--ckpt", run)


@pytest.mark.parametrize("flag, value", [
    ("seed", -1), ("steps", 0), ("steps", 1001), ("eta", 5.0), ("scale", "nan"), ("port", 99999), ("port", 0),
])  # fmt: skip
def test_flags_that_every_request_would_fail_on(run, flag, value):
    with pytest.raises(InputError, match=f"--{flag} {value}[ :]"):
        call(app, "--ckpt", run, f"--{flag}={value}")


def test_the_page(run, photo, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio", reason="optional: tools/app-requirements.txt")
    pages = []
    monkeypatch.setattr(
        gradio.Blocks, "launch", lambda page, **options: pages.append((page, options))
    )
    call(
        app,
        "--ckpt",
        run,
        "--device",
        "cpu",
        "--steps",
        3,
        "--scale",
        1,
        "--seed",
        5,
        "--sampler",
        "dpm",
    )
    (page, options), = pages  # fmt: skip
    assert (
        options["server_name"] == "127.0.0.1"
        and options["share"] is False
        and not page.analytics_enabled
    )
    preview, generate = [fn for fn in page.fns.values() if fn.fn]
    assert generate.concurrency_limit == 1 and generate.concurrency_id != preview.concurrency_id
    values = [component.value for component in generate.inputs]
    assert values[2:] == [0, 0, 0, 0, 3, 1, 5, "dpm", False]
    call(app, "--ckpt", run, "--device", "cpu", "--scale", 0)
    scale = next(
        block for block in pages[1][0].blocks.values() if getattr(block, "label", "") == "Guidance"
    )
    assert scale.minimum <= scale.value == 0
    *_, (views, file) = generate.fn(photo, *values[1:])
    assert len(views) == 1 and file.endswith(".zip")
    assert [picture and picture.size for picture in preview.fn(photo, False)] == [None, (256, 256)]
    with pytest.raises(gradio.Error, match="no image yet"):
        list(generate.fn(None, *values[1:]))
