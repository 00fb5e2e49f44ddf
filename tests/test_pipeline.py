"""Archive, training, sampling: what must hold between the scripts. They run for real, on a tiny tree of shapes."""

import argparse
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    FROZEN,
    ROOT,
    SMALL,
    assert_same_run,
    call,
    log_lines,
    raw_weights,
    script,
    weights,
)
from PIL import Image
from safetensors.torch import load_file

import data
import precompute_dino
import sample
import train
from lib import images
from lib.cli import InputError
from model import noise_schedule
from tools.shapes import look_at

TRAIN = [
    *SMALL,
    "--steps",
    6,
    "--batch_size",
    4,
    "--accumulate",
    2,
    "--save_every",
    3,
    "--val_every",
    3,
]
TRAIN += ["--preview_every", 0]


# -------------------------------------------------------------------------------------------------------- training


def test_learning_rate_and_ema_by_hand():
    args = argparse.Namespace(lr=1e-4, lr_min=1e-5, warmup=200, steps=30_000, lr_schedule="cosine")
    rates = [train.learning_rate(step, args) for step in (0, 99, 199, 200, 15_100, 30_000)]
    assert rates == pytest.approx([5e-7, 5e-5, 1e-4, 1e-4, 5.5e-5, 1e-5])
    args.lr_schedule = "constant"
    assert train.learning_rate(29_999, args) == 1e-4
    assert train.ema_decay(0, 0.9999) == 2 / 11 and train.ema_decay(88, 0.9999) == 90 / 99
    assert train.ema_decay(10**6, 0.9999) == 0.9999


def test_the_ema_has_no_history():
    """A graph of every update would take memory with each step."""
    averaged, trained = [torch.zeros(3)], [torch.nn.Parameter(torch.ones(3))]
    for _ in range(2):
        train.update_ema(averaged, trained, 0.75)
    assert averaged[0].tolist() == [0.4375] * 3 and not averaged[0].requires_grad


def test_ema_follows_the_raw_weights(run, archive, tmp_path):
    """One step from the checkpoint at 3, by hand: decay 4/13 of the old average, 9/13 of the new weights."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_0000006")
    call(
        train,
        "--archive",
        archive,
        "--out",
        tmp_path / "run",
        *TRAIN,
        "--save_every",
        1,
        "--keep",
        9,
    )
    before, after = weights(run, 3), weights(tmp_path / "run", 4)
    raw = raw_weights(tmp_path / "run", 4)
    name = "unet.middle_block.0.in_layers.2.weight"
    torch.testing.assert_close(after[name], before[name] * 5 / 14 + raw[name] * 9 / 14)


def test_resuming_is_bit_for_bit(run, archive, tmp_path):
    """Training 3 + 3 steps equals training 6: weights, EMA, log."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_0000006")
    (tmp_path / "run" / "log.jsonl").open("a").write(
        '{"step": 9, "loss": 0}\n{"step": 4, "lo'
    )  # lines to be dropped
    call(train, "--archive", archive, "--out", tmp_path / "run", *TRAIN)
    assert_same_run(run, tmp_path / "run")


@pytest.mark.parametrize("batch, accumulate, nproc", [(8, 1, 0), (2, 2, 2)])
def test_the_split_of_a_global_batch_changes_only_rounding(
    run, archive, tmp_path, batch, accumulate, nproc
):
    done = script("train", "--archive", archive, "--out", tmp_path / "run", *TRAIN, "--batch_size", batch,
                  "--accumulate", accumulate, "--workers", 2, nproc=nproc)  # fmt: skip
    assert "Grad strides" not in done.stderr  # DDP would copy each gradient
    losses = [
        [line["loss"] for line in log_lines(r) if "loss" in line] for r in (run, tmp_path / "run")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    held_out = [
        [line["val_loss"] for line in log_lines(r) if "val_loss" in line]
        for r in (run, tmp_path / "run")
    ]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


def test_online_training_equals_training_from_the_archive(run, tree, archive, tmp_path):
    """With the archive's own random encoder given by file; the rest is fp16 rounding."""
    tensors = load_file(archive / "frozen.safetensors")
    from safetensors.torch import save_file

    save_file(
        {k.removeprefix("encoder."): v for k, v in tensors.items()}, tmp_path / "vit.safetensors"
    )
    frozen = [tmp_path / "vit.safetensors" if flag == "random" else flag for flag in FROZEN]
    call(train, "--online", "--data", tree, *frozen, "--out", tmp_path / "run", *TRAIN)
    losses = [
        [line["loss"] for line in log_lines(r) if "loss" in line] for r in (run, tmp_path / "run")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_log_and_preview(run):
    lines = log_lines(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    assert steps[-1]["samples"] == 48 and len(steps[-1]["loss_by_t"]) == 10
    assert 1 < Image.open(run / "previews" / "step_0000006.png").width < 1000
    assert (run / "latest").read_text() == "step_0000006"


@pytest.mark.parametrize("changes", [
    ["--t_sampling", "gaussian"], ["--t_sampling", "gaussian", "--t_mean", 300], ["--prediction", "eps"],
    ["--no-amalgamate"], ["--cond_dropout", 0.3], ["--cc_lr", 10], ["--lr_schedule", "constant"], ["--clip", 0.01],
    ["--weight_decay", 0.5], ["--seed", 1], ["--ema", 0.2], ["--precision", "bf16"], ["--lr_min", 1e-3],
    ["--t_sampling", "gaussian", "--t_std", 400], ["--warmup", 3], ["--attention", 1], ["--lr", 1e-4],
    ["--prediction", "x0"],
])  # fmt: skip
def test_every_training_flag_changes_the_result(run, archive, tmp_path, changes):
    call(
        train,
        "--archive",
        archive,
        "--out",
        tmp_path / "run",
        *TRAIN,
        *changes,
        "--val_every",
        0,
        "--log_every",
        6,
    )
    ours, theirs = weights(run), weights(tmp_path / "run")
    names = ours.keys() & theirs.keys()
    assert ours.keys() != theirs.keys() or any(
        not torch.equal(ours[name], theirs[name]) for name in names
    )


def test_the_five_rows_of_table_1_start_from_one_checkpoint(tree, run, tmp_path, capsys):
    """Timestep sampling x encoder x amalgamation, CLIP's patch features too: every row's commands run, and at the first
    step, before amalgamation has learned anything, what differs is what the row changes."""
    small = [8 if flag == 7 else flag for flag in FROZEN]
    clip = ["--encoder", "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"]
    for name, flags in (("dino", []), ("clip", clip)):
        call(
            precompute_dino,
            "--data",
            tree,
            "--archive",
            tmp_path / name,
            *small,
            *flags,
            "--workers",
            0,
        )
    gaussian = ["--t_sampling", "gaussian", "--t_mean", 1000, "--t_std", 200]
    rows = {
        "zero123": ("clip", ["--no-amalgamate", "--cc_lr", 10]),
        "gaussian": ("clip", ["--no-amalgamate", *gaussian]),
        "dino": ("dino", ["--no-amalgamate", *gaussian]),
        "amalgamation": ("clip", gaussian),
        "all": ("dino", gaussian),
    }
    losses = {}
    for row, (archive, flags) in rows.items():
        call(
            train,
            "--archive",
            tmp_path / archive,
            "--init",
            run,
            "--out",
            tmp_path / row,
            *TRAIN,
            *flags,
        )
        assert "init: loaded" in capsys.readouterr().out
        losses[row] = [line["loss"] for line in log_lines(tmp_path / row) if "loss" in line]
    assert losses["zero123"][0] != losses["gaussian"][0] != losses["dino"][0]
    assert (
        losses["gaussian"][0] == losses["amalgamation"][0]
        and losses["gaussian"][1] != losses["amalgamation"][1]
    )
    assert losses["dino"][1:] != losses["all"][1:]


@pytest.mark.parametrize(
    "name", ["precompute_dino", "train", "sample", "evaluate", "visualize", "pretrained"]
)
def test_every_flag_has_help_and_is_used(name):
    """No flag that does nothing: each is read as args.FLAG somewhere."""
    source = "".join(
        path.read_text()
        for path in (
            *ROOT.glob("*.py"),
            ROOT / "lib" / "checkpoints.py",
            ROOT / "lib" / "distributed.py",
        )
    )
    text = (ROOT / f"{name}.py").read_text()
    for flag, rest in re.findall(
        r'(?:add_argument|flag)\(\s*"--(\w+)"(.*?)\)\s*(?:#|\n)', text, re.S
    ):
        assert "help=" in rest, f"{name}.py --{flag} has no help"
        assert re.search(rf"\bargs\.{flag}\b|\"{flag}\"", source.replace(f'"--{flag}"', "")), (
            f"--{flag} is not used"
        )


# -------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_ddim_with_the_true_noise_recovers_x0(eta, prediction):
    """A model that knows x0 answers with the noise that x_t then holds; every sampler must end at x0."""
    x0 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha_bar = noise_schedule(prediction)

    class Oracle(torch.nn.Module):
        def forward(self, x_t, t, condition, keep_context=None, keep_latent=None):
            ab = alpha_bar[t][:, None, None, None]
            noise = (x_t - ab.sqrt() * x0) / (1 - ab).sqrt()
            return {"eps": noise, "v": ab.sqrt() * noise - (1 - ab).sqrt() * x0, "x0": x0}[
                prediction
            ]

    oracle = Oracle()
    oracle.alpha_bar, oracle.prediction = alpha_bar, prediction
    generators = [data.seeded(0, i) for i in range(2)]
    found = sample.ddim(oracle, [{"latent": x0}], generators, steps=20, eta=eta, scale=1.0)
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=1e-4)


def test_ddim_step_keeps_the_marginal():
    """From q(x_t | x0), a step with eta = 1 lands in q(x_s | x0): mean and variance, by a million draws."""
    generator = torch.Generator().manual_seed(0)
    alpha_bar = noise_schedule()
    x0, noise, fresh = (
        torch.full((1, 1, 1000, 1000), 0.7),
        *torch.randn(2, 1, 1, 1000, 1000, generator=generator),
    )
    x_s = sample.ddim_step(x0, noise, alpha_bar[600], alpha_bar[300], 1.0, fresh)
    assert x_s.mean().item() == pytest.approx(0.7 * alpha_bar[300].sqrt().item(), abs=3e-3)
    assert x_s.std().item() == pytest.approx((1 - alpha_bar[300]).sqrt().item(), abs=3e-3)


def test_ddim_timesteps():
    assert sample.ddim_timesteps(1) == [999]
    assert sample.ddim_timesteps(2) == [999, 0]
    assert sample.ddim_timesteps(4) == [999, 666, 333, 0]
    assert sample.ddim_timesteps(1000) == list(range(999, -1, -1))
    for steps in range(2, 1001):
        timesteps = sample.ddim_timesteps(steps)
        assert (timesteps[0], timesteps[-1], len(set(timesteps))) == (999, 0, steps)


def test_camera_moves_are_relative_poses():
    """The move that --azimuth, --elevation, --distance name is the relative pose of a camera so moved."""
    theta, phi, radius = 1.2, 0.4, 1.8
    moved = look_at(theta - np.radians(20), phi + np.radians(30), radius + 0.1)
    pose = data.relative_pose(look_at(theta, phi, radius), moved)
    torch.testing.assert_close(
        sample.camera_moves([30.0], [20.0], [0.1])[0], pose, atol=1e-6, rtol=1e-6
    )


def test_sample_script(run, tree, tmp_path):
    image = tree / "00011" / "000.png"
    flags = ["--ckpt", run, "--steps", 3, "--device", "cpu", "--no-crop"]
    call(sample, *flags, "--image", image, "--orbit", 4, "--out", tmp_path / "a", "--save_x0", 2)
    call(sample, *flags, "--image", image, "--orbit", 4, "--out", tmp_path / "b", "--batch_size", 3)
    folders = [tmp_path / which / "000" for which in "ab"]
    views = [[np.asarray(Image.open(f / f"{i:03d}.png"), float) for i in range(4)] for f in folders]
    assert (
        np.abs(np.array(views[0]) - np.array(views[1])).max() <= 1
    )  # batches change nothing but rounding
    assert np.abs(views[0][0] - views[0][1]).max() > 0
    assert Image.open(folders[0] / "orbit.gif").n_frames == 4
    x0 = np.load(folders[0] / "x0.npz")
    assert x0["x0"].shape == (2, 4, 32, 32, 3) and x0["t"].tolist() == [999, 0]
    assert (
        np.abs(x0["x0"][-1] - np.array(views[0])).max() == 0
    )  # the last predicted x0 is the sample
    for name in ("input.png", "grid.png"):
        Image.open(folders[0] / name).verify()
    call(
        sample,
        *flags,
        "--image",
        tree / "00011",
        "--azimuth",
        10,
        20,
        "--elevation",
        5,
        "--out",
        tmp_path / "c",
    )
    assert len(list((tmp_path / "c").glob("*/001.png"))) == 4
    call(sample, *flags, "--image", image, "--azimuth", 0, "--seed", 1, "--out", tmp_path / "a")
    assert np.abs(np.asarray(Image.open(folders[0] / "000.png"), float) - views[0][0]).max() > 0
    assert {path.name for path in folders[0].iterdir()} == {
        "000.png",
        "input.png",
        "grid.png",
        "transforms.json",
    }  # nothing of before
    shutil.copytree(tree / "00011", tmp_path / "e" / "000")
    call(sample, *flags, "--image", image, "--azimuth", 0, "--out", tmp_path / "e")
    assert (tmp_path / "e" / "000" / "003.png").exists()  # a folder that is not sample.py's


def test_photos_of_unknown_range_are_refused(tmp_path):
    for mode, value in (("F", 0.5), ("I", 70_000)):
        Image.new(mode, (8, 8), value).save(tmp_path / "b.tiff")
        with pytest.raises(InputError, match="b.tiff: unreadable image .of floats or 32-bit"):
            images.load_photo(tmp_path / "b.tiff", 32)


@pytest.mark.parametrize("flag, value", [("azimuth", "inf"), ("distance", "nan"), ("eta", 2), ("scale", "nan"),
                                         ("orbit", -3), ("steps", 0), ("save_x0", -1), ("seed", -1)])  # fmt: skip
def test_flags_of_sampling_are_checked(run, tree, tmp_path, flag, value):
    with pytest.raises(InputError, match=f"--{flag}"):
        call(
            sample,
            "--ckpt",
            run,
            "--image",
            tree / "00011" / "000.png",
            f"--{flag}",
            value,
            "--out",
            tmp_path / "x",
        )


def test_photos_are_framed_as_zero123_frames_them(tmp_path):
    """A 20 x 10 object anywhere in a photo: its long edge becomes 200/256, centred, whatever marks it."""
    photo = np.full((64, 96, 4), 255, np.uint8)
    photo[..., 3] = 0
    photo[10:20, 50:70] = (255, 0, 0, 255)
    Image.fromarray(photo).save(tmp_path / "alpha.png")
    plain = photo.copy()
    plain[photo[..., 3] == 0] = (90, 120, 90, 255)
    Image.fromarray(plain).convert("RGB").save(tmp_path / "plain.png")
    for name in ("alpha.png", "plain.png"):
        image = images.load_photo(tmp_path / name, 256)
        rows, columns = (np.flatnonzero((image[1] < 0).any(dim=axis)) for axis in (1, 0))
        assert (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1) == (28, 228, 78, 178), name
        assert image[:, 0, 0].tolist() == [1, 1, 1]
    faint = np.full((64, 96, 3), 160, np.uint8) + np.random.default_rng(0).integers(
        -2, 3, (64, 96, 1), np.int8
    )
    faint[10:20, 50:70] = 176  # not far from the background
    faint[60, 90] = 255  # a speck
    Image.fromarray(faint.astype(np.uint8)).save(tmp_path / "faint.png")
    image = images.load_photo(tmp_path / "faint.png", 256)
    rows, columns = (np.flatnonzero((image[1] < 0.8).any(dim=axis)) for axis in (1, 0))
    assert (
        np.abs(
            np.subtract((columns[0], columns[-1] + 1, rows[0], rows[-1] + 1), (28, 228, 78, 178))
        ).max()
        < 3
    )
    thin = np.full((64, 96, 3), 255, np.uint8)
    thin[10:20, 50:70:19] = thin[10:20:9, 50:70] = 0  # a frame one pixel wide
    Image.fromarray(thin).save(tmp_path / "thin.png")
    assert (
        images.load_photo(tmp_path / "thin.png", 256)[:, 80:176, 28:228].amin((0, 1)) < 0.5
    ).all()
    corners = np.full(
        (64, 96, 3), 240, np.uint8
    )  # lit unevenly: a colour can't tell its corners from the object
    corners[:, :12] = 180
    corners[10:20, 50:70] = 30
    Image.fromarray(corners).save(tmp_path / "corners.png")
    with pytest.raises(InputError, match="corners.png: no alpha and no plain background"):
        images.load_photo(tmp_path / "corners.png", 256)
    ramp = np.linspace(0, 65535, 3000).astype(">u2")[None].repeat(40, 0)
    Image.frombytes("I;16B", (3000, 40), ramp.tobytes()).save(tmp_path / "big.tiff")
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "little.png")
    big, little = (
        images.load_photo(tmp_path / name, 64, crop=False) for name in ("big.tiff", "little.png")
    )
    assert (big - little).abs().max() < 0.01
    deep = np.full((90, 9000), 65535, np.uint16)  # which PIL can't shrink by its usual way
    deep[30:60, 3000:6000] = 20000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert images.load_photo(tmp_path / "deep.png", 64).min() < 0
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "busy.png")
    with pytest.raises(InputError, match="busy.png"):
        images.load_photo(tmp_path / "busy.png", 32)
    assert images.load_photo(tmp_path / "busy.png", 32, crop=False).shape == (3, 32, 32)


# ------------------------------------------------------------------------------------------------------- bad input


def test_archived_latents_with_the_encoder_in_the_loop(run, tree, archive, tmp_path):
    """--archive with --online: the run from the archive's own features, to their fp16 rounding."""
    flags = [
        *FROZEN[6:-2],
        "--archive",
        archive,
        "--online",
        "--data",
        tree,
        "--out",
        tmp_path / "run",
        *TRAIN,
    ]
    call(train, *flags)
    ours, theirs = log_lines(tmp_path / "run"), log_lines(run)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=2e-4)
    assert losses[0] != losses[1]
    shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "tree" / "00003" / "001.png").unlink()
    with pytest.raises(InputError, match="00003: no image 001 in it"):
        call(train, "--archive", archive, "--online", "--data", tmp_path / "tree", *FROZEN[6:-2], *TRAIN, "--steps", 20,
             "--out", tmp_path / "x")  # fmt: skip


def test_a_held_out_image_that_cannot_be_read_takes_no_training_with_it(tree, tmp_path):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    [path.write_bytes(b"") for path in (root / "00011").glob("*.png")]
    with pytest.raises(InputError, match="00011/00.*unreadable image"):
        call(train, "--online", "--data", root, *FROZEN, *TRAIN, "--out", tmp_path / "run", "--steps", 2,
             "--save_every", 2, "--preview_every", 0)  # fmt: skip
    assert (tmp_path / "run" / "step_0000002" / "state.pt").exists()
    assert not any("val_loss" in line for line in log_lines(tmp_path / "run"))
    for path in (root / "00011").glob("*.png"):
        shutil.copy(tree / "00011" / path.name, path)
    call(train, "--online", "--data", root, *FROZEN, *TRAIN, "--out", tmp_path / "run", "--steps", 2,
         "--save_every", 2, "--preview_every", 2)  # fmt: skip
    assert ["val_loss" in line for line in log_lines(tmp_path / "run")] == [False, False, True]
    assert (tmp_path / "run" / "previews" / "step_0000002.png").exists()


def test_bad_input_is_one_line_from_the_command_line(tree, archive, run, tmp_path):
    """Each: a script, its arguments, what its one line must hold."""
    lonely = tmp_path / "lonely"
    shutil.copytree(
        tree / "00000", lonely / "a", ignore=lambda *_: ["001.png", "002.png", "003.png"]
    )
    not_one = tmp_path / "not.safetensors"
    not_one.write_bytes(b"no checkpoint" * 99)
    image = tree / "00000" / "000.png"
    online = ["--online", "--data", lonely, *FROZEN, "--val_fraction", 0]
    cases = [
        ("train", [*online, "--out", tmp_path / "r", *SMALL], "a: 1 complete view"),
        ("sample", ["--ckpt", not_one, "--image", image], "not.safetensors"),
        ("sample", ["--ckpt", tmp_path / "none", "--image", image], "none"),
        ("sample", ["--ckpt", run, "--image", image, "--device", "cuda:99"], "--device cuda:99"),
        ("sample", ["--ckpt", run, "--image", image, "--azimuth", 1, 2, "--elevation", 1, 2, 3], "--azimuth"),
        ("train", ["--archive", tmp_path, "--out", tmp_path / "r"], "manifest.json"),
        ("train", ["--archive", archive, "--out", run, *SMALL, "--width", 64, "--batch_size", 4], "--width"),
        ("train", ["--archive", archive, "--out", run, *SMALL, "--batch_size", 5], "--batch_size 5"),
        ("train", ["--archive", archive, "--out", run, *SMALL, "--lr", "nan"], "--lr nan"),
        ("train", ["--archive", archive, "--out", run, *SMALL, "--lr_min", "-1"], "--lr_min -1"),
        ("train", ["--archive", archive, "--out", run, *SMALL, "--t_std", "inf"], "--t_std inf"),
        ("train", ["--archive", archive, "--out", run, *SMALL, "--attention", "1", "3"], "--attention 3"),
        ("train", ["--archive", archive, "--out", run, *SMALL, "--seed", str(2**63)], f"--seed {2**63}"),
        ("train", ["--archive", archive, "--out", run, *SMALL, "--channel_mult", 0, 1], "--channel_mult"),
        ("train", ["--archive", archive, "--out", run, *SMALL, "--t_mean", 3000, "--t_std", 100], "--t_mean 3000"),
        ("train", ["--archive", archive, "--out", tmp_path / "r", *SMALL, "--device", "meta"], "--device meta"),
        ("train", [*online[:-2], "--data", tree, "--layers", "--out", tmp_path / "r", *SMALL], "--no-amalgamate"),
        ("tools.shapes", ["--out", image / "x"], "--out"),
    ]  # fmt: skip
    for name, argv, named in cases:
        done = script(name, *argv, check=False)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1 and len(errors) == 1, (name, argv, done.stderr[-2000:])
        assert named in errors[0] and "Traceback" not in done.stderr, (
            name,
            argv,
            done.stderr[-2000:],
        )
