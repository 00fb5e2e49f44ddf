"""Samplers, consistent orbits, photos with a background, the ablation's tools."""

import json
import sys
import types
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import SMALL, call
from PIL import Image
from safetensors.torch import load_file

import data
import pretrained
import sample
import train
from lib import images
from lib.cli import InputError
from model import noise_schedule
from studies import consistency, table
from tools import shapes
from tools.shapes import look_at


def exact_model(spread: float, prediction: str) -> torch.nn.Module:
    """The best possible model of images that are normal noise of this standard deviation."""
    alpha_bar = noise_schedule(prediction)

    class Exact(torch.nn.Module):
        def forward(self, x_t, t, condition, keep_context=None, keep_latent=None):
            ab = alpha_bar[t][:, None, None, None]
            x0 = ab.sqrt() * spread**2 / (ab * spread**2 + 1 - ab) * x_t
            noise = (x_t - ab.sqrt() * x0) / (1 - ab).sqrt()
            return {"eps": noise, "v": ab.sqrt() * noise - (1 - ab).sqrt() * x0, "x0": x0}[
                prediction
            ]

    model = Exact()
    model.alpha_bar, model.prediction = alpha_bar, prediction
    return model


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_dpm_solver_is_of_second_order(prediction):
    """On a case whose probability-flow ODE is solved by hand: half the step, a quarter of the error; DDIM: half."""
    model, spread = exact_model(0.5, prediction), 0.5
    deviation = (model.alpha_bar * spread**2 + 1 - model.alpha_bar).sqrt()

    def error(sampler: str, n: int) -> float:
        """Relative, after n steps from t = 900 to 300."""
        x, last, previous, timesteps = (
            torch.ones(1, 1, 1, 1),
            None,
            None,
            torch.arange(900, 299, -600 // n),
        )
        for t, there in zip(timesteps, timesteps[1:], strict=False):
            x0, eps = sample.guided_prediction(model, x, t[None], {}, 1.0)
            alpha_bars = [
                model.alpha_bar[i] if i is not None else None for i in (previous, t, there)
            ]
            if sampler == "dpm":
                x, last, previous = sample.dpm_step(x, x0, last, alpha_bars), x0, t
            else:
                x = sample.ddim_step(x0, eps, *alpha_bars[1:], 0.0, 0)
        return abs(x.item() * deviation[900].item() / deviation[300].item() - 1)

    assert 1.7 < error("ddim", 20) / error("ddim", 40) < 2.3
    assert 3.2 < error("dpm", 20) / error("dpm", 40) < 4.8
    assert error("dpm", 40) < error("ddim", 40) / 4


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_dpm_solver_needs_fewer_steps_than_ddim(prediction):
    model, spread = exact_model(0.5, prediction), 0.5
    x_T, ab = torch.randn((3, 8, 8), generator=data.seeded(0)), model.alpha_bar[999]
    expected = x_T * spread / (ab * spread**2 + 1 - ab).sqrt()

    def error(*args) -> float:
        found = sample.ddim(
            model, [{"latent": x_T[None]}], [data.seeded(0)], *args[1:], 0.0, 1.0, sampler=args[0]
        )
        return ((found - expected).norm() / expected.norm()).item()

    assert error("dpm", 20) < 0.7 * error("ddim", 20) and error("dpm", 50) < 0.55 * error(
        "ddim", 50
    )
    assert error("dpm", 100) < 0.02


def test_moves_between_views_are_relative_poses():
    a, b = look_at(1.0, 0.3, 1.6), look_at(1.5, 2.9, 2.0)
    reference = look_at(0.7, -2.0, 1.8)
    to_a, to_b = (data.relative_pose(reference, pose) for pose in (a, b))
    torch.testing.assert_close(
        sample.move_between(to_a, to_b[None])[0], data.relative_pose(a, b), atol=1e-6, rtol=0
    )


def test_each_sample_draws_its_condition_anew():
    conditions = [{"latent": torch.full((2, 1), float(j))} for j in range(3)]
    generators = [data.seeded(i) for i in range(2)]
    drawn = torch.stack(
        [sample.draw_condition(conditions, generators)["latent"] for _ in range(300)]
    )[..., 0]
    shares = torch.stack([(drawn == j).double().mean(0) for j in range(3)])
    assert (shares - 1 / 3).abs().max() < 0.1 and (drawn[:, 0] != drawn[:, 1]).any()
    assert sample.draw_condition(conditions[:1], generators) is conditions[0]


def test_stochastic_conditioning_starts_alike_and_shared_noise_is_shared(run, tree):
    model, encoder, codec, meta = pretrained.load_checkpoint(str(run))
    image = images.load_photo(tree / "00011" / "000.png", meta["image_size"], crop=False)
    poses = sample.camera_moves([40.0, 40.0, 80.0], [0.0], [0.0])
    flags = {
        "steps": 8,
        "eta": 1.0,
        "scale": 1.0,
        "seed": 0,
        "batch_size": 8,
        "precision": "fp32",
        "sampler": "ddim",
    }

    def views(stochastic: bool, shared: bool):
        args = Namespace(**flags, stochastic_conditioning=stochastic, shared_noise=shared)
        return sample.sample_views(image, poses, model, encoder, codec, args)

    plain, stochastic, shared = views(False, False), views(True, False), views(False, True)
    torch.testing.assert_close(
        plain[0], stochastic[0], atol=1e-5, rtol=0
    )  # nothing but the input to draw yet
    assert (plain[1:] - stochastic[1:]).abs().amax((1, 2, 3)).min() > 1e-3
    assert (stochastic - views(True, False)).abs().max() == 0
    torch.testing.assert_close(shared[0], shared[1], atol=1e-5, rtol=0)
    generators = [data.seeded(0) for _ in range(2)]
    for generator, pool in zip(
        generators, (1, 3), strict=True
    ):  # what is drawn of the pool leaves the noise alone
        condition = [{"latent": torch.zeros(1, 3, 8, 8)}] * pool
        sample.ddim(exact_model(0.5, "v"), condition, [generator], 4, 1.0, 1.0)
    assert torch.equal(*(torch.randn(4, generator=generator) for generator in generators))
    assert (plain[0] - plain[1]).abs().max() > 1e-3


def test_warping_by_the_true_depth_finds_the_same_surface(tmp_path):
    """Neighbouring true views agree where both see; other objects' views do not."""
    shapes.shapes(tmp_path / "orbit", 2, 12, 48, 3, "cpu", 0, orbit=True)
    (images, depths, w2c), (others, *_) = (
        consistency.load_orbit(tmp_path / "orbit", f"0000{i}", 48) for i in (0, 1)
    )
    same, both = consistency.warp(images[0], depths[0], w2c[0], depths[0], w2c[0])
    torch.testing.assert_close(same[:, both], images[0][:, both], atol=1e-4, rtol=0)
    assert (both == (depths[0] > 0)).all()
    true = consistency.agreement(images, depths, w2c)
    mixed = torch.stack([(others if i % 2 else images)[i] for i in range(12)])
    assert true > 18 > consistency.agreement(mixed, depths, w2c) + 4


def test_consistency_script(run, tmp_path, capsys):
    shapes.shapes(tmp_path / "orbit", 2, 4, 32, 3, "cpu", 0, orbit=True)
    call(consistency, "--ckpt", run, "--data", tmp_path / "orbit", "--seeds", 0, 1, "--steps", 2, "--device", "cpu",
         "--scale", 1, "--out", tmp_path / "out.jsonl", "--grid", tmp_path / "grid.png")  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["way"], line["seed"]) for line in lines] == [
        (w, s) for w in consistency.WAYS for s in (0, 1)
    ]
    assert len({line["psnr"] for line in lines}) == len(lines)
    table_rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table_rows) == 2 + len(consistency.WAYS)
    Image.open(tmp_path / "grid.png").verify()
    (tmp_path / "orbit" / "00001" / "002_depth.npy").unlink()
    with pytest.raises(InputError, match="002_depth.npy"):
        call(
            consistency,
            "--ckpt",
            run,
            "--data",
            tmp_path / "orbit",
            "--device",
            "cpu",
            "--out",
            tmp_path / "none",
        )
    assert not (tmp_path / "none").exists()


def test_a_background_is_removed_by_rembg(tmp_path, monkeypatch):
    """What it cuts out is framed as a photo with alpha is; its absence and its failures are one line."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "busy.png")

    def remove(image):
        alpha = np.zeros((64, 96), np.uint8)
        alpha[10:20, 50:70] = 255
        return Image.fromarray(np.dstack([np.asarray(image), alpha]))

    monkeypatch.setitem(sys.modules, "rembg", types.SimpleNamespace(remove=remove))
    image = images.load_photo(tmp_path / "busy.png", 256)
    rows, columns = (np.flatnonzero((image.min(dim=0).values < 1).any(dim=axis)) for axis in (1, 0))
    assert (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1) == (28, 228, 78, 178)
    monkeypatch.setitem(sys.modules, "rembg", types.SimpleNamespace(remove=lambda image: 1 / 0))
    with pytest.raises(InputError, match="busy.png.*rembg could not"):
        images.load_photo(tmp_path / "busy.png", 256)
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey.png")
    seen = []
    monkeypatch.setitem(
        sys.modules,
        "rembg",
        types.SimpleNamespace(remove=lambda image: seen.append(image) or 1 / 0),
    )
    with pytest.raises(InputError, match="grey.png.*rembg could not"):
        images.load_photo(tmp_path / "grey.png", 256)
    assert (
        np.abs(np.asarray(seen[0])[..., 1].astype(int) - noise[..., 0]).max() <= 1
    )  # 16 bits are not clipped to 8
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(InputError, match="busy.png"):  # before the checkpoint is opened
        call(
            sample,
            "--ckpt",
            tmp_path / "absent.ckpt",
            "--image",
            tmp_path / "busy.png",
            "--out",
            tmp_path / "out",
        )
    assert sample.saved_steps(10, 1) == [9] and sample.saved_steps(10, 3) == [0, 4, 9]
    with pytest.raises(InputError, match="busy.png.*pip install"):
        images.load_photo(tmp_path / "busy.png", 256)


def test_unconditional_pretraining_leaves_the_conditions_out(archive, tmp_path):
    """Whatever the condition, the same weights come out; and what would read it starts at zero and stays there."""
    flags = [
        "--archive",
        archive,
        *SMALL,
        "--steps",
        4,
        "--batch_size",
        4,
        "--accumulate",
        1,
        "--preview_every",
        0,
    ]
    call(train, *flags, "--unconditional", "--out", tmp_path / "u")
    call(train, *flags, "--out", tmp_path / "c")
    u, c = (load_file(tmp_path / run / "step_0000004" / "model.safetensors") for run in "uc")
    channels = u["unet.out.2.weight"].shape[0]
    assert u["unet.input_blocks.0.0.weight"][:, channels:].abs().max() == 0
    assert c["unet.input_blocks.0.0.weight"][:, channels:].abs().max() > 0
    assert (
        u["unet.amalgamation.weight"].abs().max() == 0 < c["unet.amalgamation.weight"].abs().max()
    )
    projection = [u["cc_projection.weight"], c["cc_projection.weight"]]
    assert (
        projection[0] - projection[1]
    ).abs().max() > 1e-5  # weight decay only, against gradients


def test_the_ablation_table_averages_over_seeds(tmp_path, capsys):
    line = {"row": "samples", "step": 5, "psnr": 10.0, "ssim": None, "mse": 0.1, "lpips": None}
    lines = []
    for t_sampling, seed, psnr in (
        ("uniform", 0, 10.0),
        ("uniform", 1, 12.0),
        ("gaussian", 0, 13.0),
    ):
        flags = {
            "t_sampling": t_sampling,
            "t_mean": 1000,
            "t_std": 200,
            "amalgamate": True,
            "seed": seed,
        }
        flags |= {"out": f"{t_sampling}{seed}", "global_batch": 8}
        lines.append(line | {"run_args": flags, "psnr": psnr, "checkpoint": f"{t_sampling}{seed}"})
    lines.append(lines[0] | {"step": 1, "psnr": 99.0})  # an earlier checkpoint
    lines.append({"row": "white", "psnr": 5.0, "mse": 1.0})
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call(table, "--eval", tmp_path / "eval.jsonl", "--by", "t_sampling")
    printed = capsys.readouterr().out
    assert "| uniform | samples | 2 | 11 ± 1.4 | 0.1 ± 0 |" in printed
    assert (
        "| gaussian | samples | 1 | 13 | 0.1 |" in printed and "|  | white | 1 | 5 | 1 |" in printed
    )
    (tmp_path / "mixed.jsonl").write_text(
        "".join(json.dumps(x | {"steps": i}) + "\n" for i, x in enumerate(lines[:2]))
    )
    with pytest.raises(InputError, match="steps 0 and 1 don.t compare"):
        call(table, "--eval", tmp_path / "mixed.jsonl")
    with pytest.raises(InputError, match="--by lr"):
        call(table, "--eval", tmp_path / "eval.jsonl", "--by", "lr")
