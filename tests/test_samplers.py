"""sample.py: DDIM solved by hand, camera moves, and what the script writes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image

import data
import sample
from lib.cli import InputError
from model import noise_schedule
from tools.shapes import look_at

# ---------------------------------------------------------------------------------------- samplers


class KnowsX0(torch.nn.Module):
    """A model that knows x0: it answers with x0, or with the noise or v that x_t then holds."""

    def __init__(self, x0: torch.Tensor, prediction: str):
        super().__init__()
        self.x0 = x0
        self.prediction = prediction
        self.alpha_bar = noise_schedule(prediction)

    def forward(self, x_t, t, condition, keep_context=None, keep_latent=None):
        alpha_bar = self.alpha_bar[t][:, None, None, None]
        noise = (x_t - alpha_bar.sqrt() * self.x0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * self.x0
        return {"eps": noise, "v": v, "x0": self.x0}[self.prediction]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_ddim_with_the_true_noise_recovers_x0(eta, prediction):
    x0 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    model = KnowsX0(x0, prediction)
    generators = [data.seeded(0, i) for i in range(2)]
    found = sample.sample_latents(model, [{"latent": x0}], generators, steps=20, eta=eta, scale=1.0)
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=1e-4)


def test_a_ddim_step_keeps_the_marginal():
    """From q(x_t | x0), a step with eta 1 lands in q(x_s | x0): mean, spread, a million draws."""
    generator = torch.Generator().manual_seed(0)
    alpha_bar = noise_schedule()
    x0 = torch.full((1, 1, 1000, 1000), 0.7)
    noise, fresh_noise = torch.randn(2, 1, 1, 1000, 1000, generator=generator)
    x_s = sample.ddim_step(x0, noise, alpha_bar[600], alpha_bar[300], 1.0, fresh_noise)
    assert x_s.mean().item() == pytest.approx(0.7 * alpha_bar[300].sqrt().item(), abs=3e-3)
    assert x_s.std().item() == pytest.approx((1 - alpha_bar[300]).sqrt().item(), abs=3e-3)


def test_timesteps_by_hand():
    assert sample.ddim_timesteps(1) == [999]
    assert sample.ddim_timesteps(2) == [999, 0]
    assert sample.ddim_timesteps(4) == [999, 666, 333, 0]
    assert sample.ddim_timesteps(1000) == list(range(999, -1, -1))


def test_timesteps_are_distinct_and_keep_both_ends():
    for steps in range(2, 1001):
        timesteps = sample.ddim_timesteps(steps)
        assert timesteps[0] == 999
        assert timesteps[-1] == 0
        assert len(set(timesteps)) == steps


def test_camera_moves_are_relative_poses():
    """--azimuth, --elevation and --distance name the move to a camera so moved."""
    theta, phi, radius = 1.2, 0.4, 1.8
    moved = look_at(theta - np.radians(20), phi + np.radians(30), radius + 0.1)
    pose = data.relative_pose(look_at(theta, phi, radius), moved)
    move = sample.camera_moves([30.0], [20.0], [0.1])[0]
    torch.testing.assert_close(move, pose, atol=1e-6, rtol=1e-6)


# -------------------------------------------------------------------------------------- the script


def sample_run(run: Path, out: Path, image: Path, *flags) -> None:
    small = ["--steps", 3, "--device", "cpu", "--no-crop"]
    call(sample, "--ckpt", run, "--image", image, "--out", out, *small, *flags)


def read_views(folder: Path, count: int) -> np.ndarray:
    views = [np.asarray(Image.open(folder / f"{i:03d}.png"), float) for i in range(count)]
    return np.array(views)


@pytest.fixture(scope="module")
def orbit(run, tree, tmp_path_factory) -> Path:
    """The folder of an orbit of four views around one image."""
    out = tmp_path_factory.mktemp("orbit")
    sample_run(run, out, tree / "00011" / "000.png", "--orbit", 4, "--save_x0", 2)
    return out / "000"


def test_an_orbit_is_views_a_grid_and_an_animation(orbit):
    views = read_views(orbit, 4)
    assert np.abs(views[0] - views[1]).max() > 0
    animation = Image.open(orbit / "orbit.gif")
    assert animation.n_frames == 4 and animation.size == (128, 128)
    for name in ("input.png", "grid.png"):
        Image.open(orbit / name).verify()


def test_the_last_predicted_x0_is_the_sample(orbit):
    saved = np.load(orbit / "x0.npz")
    assert saved["t"].tolist() == [999, 0]
    assert saved["x0"].shape == (2, 4, 32, 32, 3)
    assert np.abs(saved["x0"][-1] - read_views(orbit, 4)).max() == 0


def test_batches_change_only_rounding(orbit, run, tree, tmp_path):
    image = tree / "00011" / "000.png"
    sample_run(run, tmp_path, image, "--orbit", 4, "--batch_size", 3)
    assert np.abs(read_views(tmp_path / "000", 4) - read_views(orbit, 4)).max() <= 1


def test_a_folder_of_photos_gives_a_folder_each(run, tree, tmp_path):
    sample_run(run, tmp_path, tree / "00011", "--azimuth", 10, 20, "--elevation", 5)
    assert len(list(tmp_path.glob("*/001.png"))) == 4


def test_sampling_again_replaces_what_was_there(orbit, run, tree, tmp_path):
    """With another seed; nothing of the orbit stays."""
    shutil.copytree(orbit, tmp_path / "000")
    sample_run(run, tmp_path, tree / "00011" / "000.png", "--azimuth", 0, "--seed", 1)
    names = {path.name for path in (tmp_path / "000").iterdir()}
    assert names == {"000.png", "input.png", "grid.png", "transforms.json"}
    assert np.abs(read_views(tmp_path / "000", 1)[0] - read_views(orbit, 1)[0]).max() > 0


def test_files_of_others_stay(run, tree, tmp_path):
    """A folder of that name that is not sample.py's keeps its other files."""
    shutil.copytree(tree / "00011", tmp_path / "000")
    sample_run(run, tmp_path, tree / "00011" / "000.png", "--azimuth", 0)
    assert (tmp_path / "000" / "003.png").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--azimuth", "inf"], "--azimuth inf"),
        (["--azimuth", 1, 2, "--elevation", 1, 2, 3], "--azimuth"),
        (["--distance", "nan"], "--distance nan"),
        (["--eta", 2], "--eta 2"),
        (["--scale", "nan"], "--scale nan"),
        (["--orbit", -3], "--orbit -3"),
        (["--steps", 0], "--steps 0"),
        (["--save_x0", -1], "--save_x0 -1"),
        (["--seed", -1], "--seed -1"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--image", "none.png"], "none.png"),
        (["--ckpt", "none"], "none"),
        (["--ckpt", __file__], "test_samplers.py"),
    ],
)
def test_refusals(run, tree, tmp_path, flags, words):
    """Each in one line that names the flag or the file; nothing is written."""
    with pytest.raises(InputError, match=words) as refusal:
        sample_run(run, tmp_path / "out", tree / "00011" / "000.png", *flags)
    assert len(str(refusal.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
