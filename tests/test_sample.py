"""sample.py: samplers against cases solved by hand, moves, stochastic conditioning, photos."""

import json
import math
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from helpers import SMALL, call, script
from PIL import Image, features
from safetensors.torch import load_file

import data
import pretrained
import sample
import train
from lib import images
from lib.cli import InputError
from model import noise_schedule
from tools.shapes import look_at


def exact_model(spread: float, prediction: str) -> torch.nn.Module:
    """The best possible model of images that are normal noise of this standard deviation."""
    alpha_bar = noise_schedule(prediction)

    class Exact(torch.nn.Module):
        def forward(self, x_t, t, condition, keep_context=None, keep_latent=None):
            ab = alpha_bar[t][:, None, None, None]
            x0 = ab.sqrt() * spread**2 / (ab * spread**2 + 1 - ab) * x_t
            noise = (x_t - ab.sqrt() * x0) / (1 - ab).sqrt()
            if prediction == "x0":
                return x0
            return noise if prediction == "eps" else ab.sqrt() * noise - (1 - ab).sqrt() * x0

    model = Exact()
    model.alpha_bar = alpha_bar
    model.prediction = prediction
    return model


# ---------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_dpm_solver_is_of_second_order(prediction):
    """On a case whose probability-flow ODE is solved by hand, half the step quarters the error.

    DDIM's error halves.
    """
    spread = 0.5
    model = exact_model(spread, prediction)
    alpha_bar = model.alpha_bar
    deviation = (alpha_bar * spread**2 + 1 - alpha_bar).sqrt()
    exact = deviation[300].item() / deviation[900].item()

    def error(sampler: str, steps: int) -> float:
        """Relative, from t = 900 to 300."""
        x = torch.ones(1, 1, 1, 1)
        previous_x0 = previous_alpha_bar = None
        timesteps = torch.arange(900, 299, -600 // steps)
        for now, after in zip(timesteps[:-1], timesteps[1:], strict=True):
            x0, eps = sample.guided_prediction(model, x, now[None], {}, 1.0)
            if sampler == "dpm":
                x = sample.dpm_step(
                    x, x0, previous_x0, previous_alpha_bar, alpha_bar[now], alpha_bar[after]
                )
                previous_x0 = x0
                previous_alpha_bar = alpha_bar[now]
            else:
                x = sample.ddim_step(x0, eps, alpha_bar[now], alpha_bar[after], 0.0, 0.0)
        return abs(x.item() / exact - 1)

    assert 1.7 < error("ddim", 20) / error("ddim", 40) < 2.3
    assert 3.2 < error("dpm", 20) / error("dpm", 40) < 4.8
    assert error("dpm", 40) < error("ddim", 40) / 4


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_dpm_solver_needs_fewer_steps_than_ddim(prediction):
    spread = 0.5
    model = exact_model(spread, prediction)
    x_T = torch.randn((3, 8, 8), generator=data.seeded(0))
    alpha_bar_T = model.alpha_bar[999]
    expected = x_T * spread / (alpha_bar_T * spread**2 + 1 - alpha_bar_T).sqrt()

    def error(sampler: str, steps: int) -> float:
        found = sample.sample_latents(
            model, [{"latent": x_T[None]}], [data.seeded(0)], steps, 0.0, 1.0, sampler=sampler
        )
        return ((found - expected).norm() / expected.norm()).item()

    assert error("dpm", 20) < 0.7 * error("ddim", 20)
    assert error("dpm", 50) < 0.55 * error("ddim", 50)
    assert error("dpm", 100) < 0.02


def share_kept(spread: float, sampler: str, steps: int, eta: float) -> float:
    """The standard deviation of samples, as a share of the data's, with the best possible model."""
    condition = {"latent": torch.zeros(1, 1, 256, 256)}
    model = exact_model(spread, "eps")
    sampled = sample.sample_latents(
        model, [condition], [data.seeded(0)], steps, eta, scale=1.0, sampler=sampler
    )
    return sampled.std().item() / spread


def test_fine_detail_survives_the_end_of_sampling():
    """At detail of standard deviation .1, the data's being 1.

    Timesteps that end at t = 19, as ours once did, keep .57, .59 and .60 of it.
    """
    assert share_kept(0.1, "ddim", 50, eta=1.0) == pytest.approx(0.617, abs=0.01)
    assert share_kept(0.1, "ddim", 50, eta=0.0) == pytest.approx(0.748, abs=0.01)
    assert share_kept(0.1, "dpm", 50, eta=0.0) == pytest.approx(0.763, abs=0.01)


@pytest.mark.parametrize("spread", [0.1, 0.25, 0.5, 1.0])
def test_dpm_solver_does_not_overshoot_at_the_end(spread):
    assert share_kept(spread, "ddim", 20, eta=0.0) < share_kept(spread, "dpm", 20, eta=0.0) < 1.01


def test_saved_steps_end_with_the_sample():
    assert sample.saved_steps(10, 0) == []
    assert sample.saved_steps(10, 1) == [9]
    assert sample.saved_steps(10, 3) == [0, 4, 9]


# ---------------------------------------------------------------------------------- moves and views


def test_moves_between_views_are_relative_poses():
    a = look_at(1.0, 0.3, 1.6)
    b = look_at(1.5, 2.9, 2.0)
    reference = look_at(0.7, -2.0, 1.8)
    to_a = data.relative_pose(reference, a)
    to_b = data.relative_pose(reference, b)
    found = sample.move_between(to_a, to_b[None])[0]
    torch.testing.assert_close(found, data.relative_pose(a, b), atol=1e-6, rtol=0)
    encoded = sample.encode_moves(found[None], 1.0, "elevation")[0]
    torch.testing.assert_close(encoded, data.relative_pose(a, b, "elevation"), atol=1e-6, rtol=0)


def test_each_sample_draws_its_own_condition():
    conditions = [{"latent": torch.full((2, 1), float(j))} for j in range(3)]
    generators = [data.seeded(i) for i in range(2)]
    draws = [sample.draw_condition(conditions, generators)["latent"] for _ in range(300)]
    drawn = torch.stack(draws)[..., 0]
    shares = torch.stack([(drawn == j).double().mean(0) for j in range(3)])
    assert (shares - 1 / 3).abs().max() < 0.1
    assert (drawn[:, 0] != drawn[:, 1]).any()
    assert sample.draw_condition(conditions[:1], generators) is conditions[0]


def test_choosing_views_leaves_the_noise_alone():
    generators = [data.seeded(0) for _ in range(2)]
    for generator, views in zip(generators, (1, 3), strict=True):
        conditions = [{"latent": torch.zeros(1, 3, 8, 8)}] * views
        sample.sample_latents(exact_model(0.5, "v"), conditions, [generator], 4, 1.0, 1.0)
    after = [torch.randn(4, generator=generator) for generator in generators]
    assert torch.equal(after[0], after[1])


def test_stochastic_conditioning_starts_as_independent_views_do(run, tree):
    model, encoder, codec, meta = pretrained.load_checkpoint(str(run))
    image = images.load_photo(tree / "00011" / "000.png", meta["image_size"], crop=False)
    poses = sample.camera_moves([40.0, 40.0, 80.0], [0.0], [0.0])
    settings = {"steps": 8, "eta": 1.0, "scale": 1.0, "precision": "fp32", "sampler": "ddim"}

    def views(stochastic: bool) -> torch.Tensor:
        return sample.sample_views(
            image, poses, model, encoder, codec, settings, stochastic_conditioning=stochastic
        )

    independent = views(False)
    stochastic = views(True)
    # The first view has only the input to draw.
    torch.testing.assert_close(independent[0], stochastic[0], atol=1e-5, rtol=0)
    assert (independent[1:] - stochastic[1:]).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(stochastic, views(True))
    assert (independent[0] - independent[1]).abs().max() > 1e-3  # of one move, by their noise


def test_an_orbit_starts_at_the_azimuth():
    assert sample.orbit_azimuths(3, [45.0]) == [45, 165, 285]
    with pytest.raises(InputError, match="--azimuth: with --orbit"):
        sample.orbit_azimuths(3, [45.0, 90.0])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--distance", 0, -2], "--distance -2: it is a change, .* would come out at -0.15"),
        (["--distance", -1, "--input_distance", 1], "--distance -1: .* come out at 0"),
    ],
)
def test_cameras_beyond_the_object_are_refused(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        call(sample, "--ckpt", "x", "--image", tmp_path / "x.png", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--azimuth", "1e300"],
        ["--elevation", "1e300"],
        ["--distance", "1e300"],
        ["--input_elevation", "91"],
    ],
)
def test_absurd_cameras_are_refused(flags):
    with pytest.raises(InputError, match=f"{flags[0]} {flags[1]}: must be between"):
        call(sample, "--ckpt", "x", "--image", "x.png", *flags)


@pytest.mark.parametrize(("flags", "warnings"), [([], 1), (["--input_elevation", 0], 0)])
def test_a_model_that_wants_the_elevation_asks_for_it(
    run, tree, tmp_path, monkeypatch, capsys, flags, warnings
):
    (tmp_path / "000").touch()  # so that it stops before it samples
    opened = types.SimpleNamespace(pose_encoding="elevation"), None, None, {}
    monkeypatch.setattr(pretrained, "load_checkpoint", lambda *_: opened)
    photo = tree / "00011" / "000.png"
    with pytest.raises(InputError, match="could not be written"):
        call(sample, "--ckpt", run, "--image", photo, "--out", tmp_path, "--device=cpu", *flags)
    assert capsys.readouterr().out.count("WARNING: this model is told the photo's") == warnings
    with pytest.raises(InputError, match="--distance: this model is told"):
        call(sample, "--ckpt", run, "--image", photo, "--device=cpu", *flags, "--distance", 0, 0.1)


def test_cameras_beyond_the_pole_are_noted(tmp_path, capsys):
    flags = ["--input_elevation", 60, "--elevation", 30, 31]
    with pytest.raises(InputError, match=r"x.png: no such file"):
        call(sample, "--ckpt", "x", "--image", tmp_path / "x.png", *flags)
    printed = capsys.readouterr().out
    assert printed.count("WARNING") == 1
    assert "--elevation 31: with --input_elevation 60 the camera passes over the pole" in printed


def project(world_to_camera: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """World points (P,3) in a renderer's camera (3,4): (P,2), from -1 to 1 across the image."""
    x, y, z = (points @ world_to_camera[:, :3].T + world_to_camera[:, 3]).unbind(1)
    return torch.stack([x, y], dim=1) / (-z * data.TAN_HALF_FOV)[:, None]


def test_transforms_are_the_renderers_cameras(tmp_path):
    """Points of the world fall on the same pixels as with the cameras that render the data."""
    elevation, distance, size = 20.0, 1.7, 64
    azimuths = [0.0, 90.0, 200.0, -30.0]
    elevations = [0.0, 15.0, -40.0, 60.0]
    distances = [0.0, 0.1, 0.3, -0.2]
    moves = sample.camera_moves(azimuths, elevations, distances)
    sample.write_transforms(tmp_path, moves, size, elevation, distance)
    transforms = json.loads((tmp_path / "transforms.json").read_text())
    assert (transforms["w"], transforms["h"]) == (size, size)
    frames = transforms["frames"]
    assert [frame["file_path"] for frame in frames] == [f"{i:03d}.png" for i in range(4)]
    assert math.degrees(transforms["camera_angle_x"]) == pytest.approx(49.134, abs=1e-3)

    points = 0.5 * torch.randn(50, 3, generator=data.seeded(0)).double().clamp(-1, 1)
    moved = zip(azimuths, elevations, distances, strict=True)
    for frame, (azimuth, lift, away) in zip(frames, moved, strict=True):
        theta = math.radians(90 - elevation - lift)
        renderers = look_at(theta, math.radians(azimuth), distance + away)
        expected = project(renderers, points)
        # As a reader does: OpenGL's camera looks along -z, and fl_x is the focal length in pixels.
        inverse = torch.linalg.inv(torch.tensor(frame["transform_matrix"]).double())
        x, y, z = (points @ inverse[:3, :3].T + inverse[:3, 3]).unbind(1)
        pixels_x = transforms["cx"] + transforms["fl_x"] * x / -z
        pixels_y = transforms["cy"] - transforms["fl_y"] * y / -z
        torch.testing.assert_close(pixels_x, size / 2 * (1 + expected[:, 0]), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(pixels_y, size / 2 * (1 - expected[:, 1]), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_view_that_is_not_finite_stops_it(run, tree, value):
    model, encoder, codec, meta = pretrained.load_checkpoint(str(run))
    torch.nn.init.constant_(model.unet.out[2].bias, value)
    image = images.load_photo(tree / "00011" / "000.png", meta["image_size"], crop=False)
    poses = sample.camera_moves([40.0], [0.0], [0.0])
    settings = {"steps": 2, "scale": 1.0}
    with pytest.raises(InputError, match="view 0 holds NaN or infinity.*--precision"):
        sample.sample_views(image, poses, model, encoder, codec, settings)


def test_decoding_hides_no_infinity():
    """Clamped, an infinity would be a white pixel like any other."""
    latent = torch.zeros(1, 48, 2, 2)
    latent[0, 0, 0, 0] = float("inf")
    latent[0, 1, 0, 0] = 7
    image = sample.decode(latent, pretrained.SpaceToDepth(4))
    assert image[0, 0, 0, 0].isnan()
    assert image[0, 0, 0, 1] == 1
    assert image.isfinite().sum() == image.numel() - 1


@pytest.mark.slow
def test_one_process_joins_no_group(run, tree, tmp_path, monkeypatch):
    """As where a scheduler sets torchrun's variables for a command that needs one process."""
    image = tree / "00011" / "000.png"
    flags = ["--ckpt", run, "--device", "cpu", "--steps", 1, "--out", tmp_path]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    script("sample", *flags, "--image", image, "--no-crop")
    assert (tmp_path / "000" / "000.png").exists()


# ------------------------------------------------------------------------------------------ photos


def test_a_bad_photo_in_a_folder_stops_no_other(run, tree, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(tree / "00011" / "000.png", photos / "good.png")
    (photos / "bad.png").write_bytes(b"no picture")
    (photos / "folder.png").mkdir()
    flags = ["--ckpt", run, "--device", "cpu", "--steps", 1, "--out", tmp_path / "out"]
    with pytest.raises(InputError, match="--image .*photos: 1 of 2 photos left out"):
        call(sample, *flags, "--image", photos)
    assert "bad.png: unreadable image" in capsys.readouterr().err
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["good"]

    (photos / "good.png").write_bytes(b"no picture either")
    # Photos are read before the checkpoint is opened, which here is absent.
    absent = ["--ckpt", tmp_path / "absent.ckpt", "--image", photos, "--out", tmp_path / "none"]
    with pytest.raises(InputError, match="none of the 2 photos"):
        call(sample, *absent)
    assert not (tmp_path / "none").exists()


def test_an_out_that_cannot_be_written_is_found_before_sampling(run, tree, tmp_path, monkeypatch):
    (tmp_path / "000").touch()  # where the photo's folder would be
    monkeypatch.setattr(sample, "sample_views", None)
    with pytest.raises(InputError, match="000/input.png: could not be written"):
        photo = tree / "00011" / "000.png"
        call(sample, "--ckpt", run, "--image", photo, "--out", tmp_path, "--device", "cpu")


@pytest.mark.skipif(not features.check("avif"), reason="PIL reads AVIF since 11.3, in its wheels")
def test_avif_is_read(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "x.avif")
    assert images.list_photos(str(tmp_path)) == [tmp_path / "x.avif"]
    colour = images.load_photo(tmp_path / "x.avif", 8, crop=False)[:, 4, 4]
    torch.testing.assert_close(colour, torch.tensor([1.0, -1.0, -1.0]), atol=0.05, rtol=0)


def test_heic_is_one_line_without_pillow_heif(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(InputError, match="x.heic: a HEIF image; `pip install pillow-heif`"):
        images.open_image(tmp_path / "x.heic")


def test_heic_is_read_by_pillow_heif(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="an optional package")
    pillow_heif.register_heif_opener()
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "x.heic")
    colour = images.load_photo(tmp_path / "x.heic", 64, crop=False)[:, 32, 32]
    torch.testing.assert_close(colour, torch.tensor([1.0, -1.0, -1.0]), atol=0.1, rtol=0)


def test_a_background_is_removed_by_rembg(tmp_path, monkeypatch):
    """What rembg cuts out is framed as a photo with alpha is."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "busy.png")

    def remove(image: Image.Image) -> Image.Image:
        alpha = np.zeros((64, 96), np.uint8)
        alpha[10:20, 50:70] = 255
        return Image.fromarray(np.dstack([np.asarray(image), alpha]))

    monkeypatch.setitem(sys.modules, "rembg", types.SimpleNamespace(remove=remove))
    image = images.load_photo(tmp_path / "busy.png", 256)
    is_object = image.min(dim=0).values < 1
    rows = np.flatnonzero(is_object.any(dim=1))
    columns = np.flatnonzero(is_object.any(dim=0))
    assert (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1) == (28, 228, 78, 178)


def test_rembg_sees_16_bits_as_8(tmp_path, monkeypatch):
    grey = np.random.default_rng(0).integers(0, 255, (64, 96), np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey.png")
    seen = []

    def remove(image: Image.Image) -> Image.Image:
        seen.append(np.asarray(image).astype(int))
        return image

    monkeypatch.setitem(sys.modules, "rembg", types.SimpleNamespace(remove=remove))
    images.load_photo(tmp_path / "grey.png", 256)
    assert np.abs(seen[0][..., 1] - grey).max() <= 1


def test_a_failing_rembg_is_one_line(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "busy.png")
    failing = types.SimpleNamespace(remove=lambda image: 1 / 0)
    monkeypatch.setitem(sys.modules, "rembg", failing)
    with pytest.raises(InputError, match="busy.png.*rembg could not"):
        images.load_photo(tmp_path / "busy.png", 256)
    monkeypatch.setitem(sys.modules, "rembg", None)  # not installed
    with pytest.raises(InputError, match="busy.png.*pip install"):
        images.load_photo(tmp_path / "busy.png", 256)
    monkeypatch.delitem(sys.modules, "rembg")
    (tmp_path / "rembg.py").write_text("raise SystemExit(1)")  # as without onnxruntime
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="busy.png.*pip install"):
        images.load_photo(tmp_path / "busy.png", 256)
    # Photos are read before the checkpoint is opened, which here is absent.
    flags = ["--ckpt", tmp_path / "absent.ckpt", "--out", tmp_path / "out"]
    with pytest.raises(InputError, match="busy.png"):
        call(sample, *flags, "--image", tmp_path / "busy.png")


def test_resizing_is_pils():
    """In float, on noise, enlarged and shrunk."""
    noise = np.random.default_rng(0).uniform(size=(41, 60, 1)).astype(np.float32)
    for height, width in ((41, 60), (32, 32), (100, 17), (2, 200)):
        ours = images.resize(noise, height, width)[0]
        theirs = Image.fromarray(noise[..., 0]).resize((width, height), Image.Resampling.BILINEAR)
        torch.testing.assert_close(ours, torch.from_numpy(np.array(theirs)), atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------- pretraining


def test_unconditional_pretraining_leaves_the_conditions_out(archive, tmp_path):
    """What would read the condition starts at zero and stays there."""
    flags = ["--archive", archive, *SMALL, "--steps", 4, "--batch_size", 4]
    flags += ["--accumulate", 1, "--preview_every", 0]
    call(train, *flags, "--unconditional", "--out", tmp_path / "unconditional")
    call(train, *flags, "--out", tmp_path / "conditional")
    weights = {
        name: load_file(tmp_path / name / "step_0000004" / "model.safetensors")
        for name in ("unconditional", "conditional")
    }
    without = weights["unconditional"]
    channels = without["unet.out.2.weight"].shape[0]

    def of_the_condition(name: str) -> torch.Tensor:
        return weights[name]["unet.input_blocks.0.0.weight"][:, channels:]

    assert of_the_condition("unconditional").abs().max() == 0
    assert of_the_condition("conditional").abs().max() > 0
    assert without["unet.amalgamation.weight"].abs().max() == 0
    assert weights["conditional"]["unet.amalgamation.weight"].abs().max() > 0
    projections = [w["cc_projection.weight"] for w in weights.values()]
    # One has weight decay only, the other gradients.
    assert (projections[0] - projections[1]).abs().max() > 1e-5
