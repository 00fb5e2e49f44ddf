"""train.py: what must hold of training. The scripts run for real, on a tiny tree of shapes."""

import math
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    FROZEN,
    SMALL,
    TRAIN,
    VIT,
    assert_same_run,
    call,
    load_state,
    log_lines,
    logged,
    parse,
    raw_weights,
    same,
    script,
    steps_with,
    weights,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import precompute_dino
import train
from lib import checkpoints, images
from lib.cli import InputError
from model import NovelViewModel

# ---------------------------------------------------------------------------------- pure functions


def test_learning_rate_by_hand():
    args = Namespace(lr=1e-4, lr_min=1e-5, warmup=200, steps=30_000, lr_schedule="cosine")
    rates = [train.learning_rate(step, args) for step in (0, 99, 199, 200, 15_100, 30_000)]
    assert rates == pytest.approx([5e-7, 5e-5, 1e-4, 1e-4, 5.5e-5, 1e-5])
    args.lr_schedule = "constant"
    assert train.learning_rate(29_999, args) == 1e-4


def test_a_long_warm_up_takes_half_of_the_steps():
    args = Namespace(lr=1e-4, lr_min=0.0, warmup=200, steps=20, lr_schedule="cosine")
    rates = [train.learning_rate(step, args) for step in (0, 9, 10, 15, 20)]
    assert rates == pytest.approx([1e-5, 1e-4, 1e-4, 5e-5, 0])
    args.steps = 1
    assert train.learning_rate(0, args) == 1e-4


def test_ema_decay_by_hand():
    assert train.ema_decay(0, 0.9999) == 2 / 11
    assert train.ema_decay(88, 0.9999) == 90 / 99
    assert train.ema_decay(10**6, 0.9999) == 0.9999


def test_the_ema_has_no_history():
    """A graph of all updates would take more memory with each step."""
    averaged = [torch.zeros(3)]
    trained = [torch.nn.Parameter(torch.ones(3))]
    for _ in range(2):
        train.update_ema(averaged, trained, 0.75)
    assert averaged[0].tolist() == [0.4375] * 3
    assert not averaged[0].requires_grad


def test_draws_depend_on_seed_and_step_alone():
    def draw(seed, step):
        return train.step_draws(seed, step, 8, (3, 4, 4), torch.device("cpu"))

    u_t, u_drop, noise, posterior = draw(1, 5)
    assert u_t.shape == u_drop.shape == (8,)
    assert noise.shape == posterior.shape == (8, 3, 4, 4)
    for again, before in zip(draw(1, 5), (u_t, u_drop, noise, posterior), strict=True):
        assert torch.equal(again, before)
    for other in (draw(2, 5), draw(1, 6)):
        assert not torch.equal(other[0], u_t)
        assert not torch.equal(other[2], noise)
    assert not torch.equal(u_t, u_drop)
    assert not torch.equal(noise, posterior)


def test_losses_by_timestep_by_hand():
    losses = torch.tensor([1.0, 2.0, 4.0, float("nan"), float("inf")])
    t = torch.tensor([0, 99, 999, 500, 100])
    sums, counts = train.losses_by_timestep(losses, t)
    assert sums.tolist() == [3, 0, 0, 0, 0, 0, 0, 0, 0, 4]
    assert counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]


# ------------------------------------------------------------------------------- what a run leaves


def test_the_log_and_the_preview(run):
    assert steps_with(run, "loss") == [1, 2, 3, 4, 5, 6]
    assert steps_with(run, "val_loss") == [0, 3, 6]
    lines = [line for line in log_lines(run) if "loss" in line]
    assert [line["samples"] for line in lines] == [8, 16, 24, 32, 40, 48]
    for line in lines:
        assert len(line["loss_by_t"]) == train.BINS
        assert line["skipped"] == 0
    preview = Image.open(run / "previews" / "step_0000006.png")
    assert 1 < preview.width < 1000
    assert (run / "latest").read_text() == "step_0000006"


def test_the_held_out_loss_at_step_0_is_that_of_the_initial_weights(run):
    """The EMA starts as a copy of them; the averages over the timesteps' bins are the losses."""
    for line in log_lines(run):
        if "val_loss" not in line:
            continue
        assert line["val_loss"] == pytest.approx(np.mean(line["val_loss_by_t"]))
        assert line["val_loss_ema"] == pytest.approx(np.mean(line["val_loss_ema_by_t"]))
        equal = line["val_loss"] == line["val_loss_ema"]
        assert equal == (line["step"] == 0)


def test_what_state_pt_holds(run):
    state = load_state(run, 3)
    assert state.keys() == {
        "format",
        "args",
        "step",
        "seconds",
        "validated",
        "losses",
        "skipped",
        "model",
        "optimizer",
        "scaler",
    }
    assert state["format"] == checkpoints.STATE_FORMAT
    assert state["step"] == 3
    assert state["validated"] is True
    assert state["losses"].shape == (2, train.BINS)
    assert state["losses"].count_nonzero() == 0  # the line of step 3 has told them
    assert state["skipped"].item() == 0
    assert state["args"]["global_batch"] == 8


def test_the_ema_follows_the_raw_weights(run, archive, tmp_path):
    """The step after the checkpoint at 3, by hand: its EMA has a decay of 5/14."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_0000006")
    flags = [*TRAIN, "--steps", 4, "--keep", 9]
    call(train, "--archive", archive, "--out", tmp_path / "run", *flags)
    before = weights(run, 3)
    after = weights(tmp_path / "run", 4)
    raw = raw_weights(tmp_path / "run", 4)
    for name in raw:
        expected = before[name] * 5 / 14 + raw[name] * 9 / 14
        torch.testing.assert_close(after[name], expected, msg=name)


# ------------------------------------------------------------------------- resuming, other settings


def test_resuming_is_bit_for_bit(run, archive, tmp_path):
    """Training 3 + 3 steps equals training 6: weights, EMA, optimiser, log."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_0000006")
    with open(tmp_path / "run" / "log.jsonl", "a") as log:  # lines that resuming drops
        log.write('{"step": 9, "loss": 0}\n{"step": 4, "lo')
    call(train, "--archive", archive, "--out", tmp_path / "run", *TRAIN)
    assert_same_run(run, tmp_path / "run")


@pytest.mark.parametrize("steps", [4, 6])
def test_a_run_that_has_done_its_steps_ends_at_once(run, archive, tmp_path, steps):
    shutil.copytree(run, tmp_path / "run")
    call(train, "--archive", archive, "--out", tmp_path / "run", *TRAIN, "--steps", steps)
    assert_same_run(run, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("batch, accumulate, processes", [(8, 1, 0), (2, 2, 2)])
def test_the_split_of_a_global_batch_changes_only_rounding(
    run, archive, tmp_path, batch, accumulate, processes
):
    done = script(
        "train",
        *("--archive", archive, "--out", tmp_path / "run", *TRAIN),
        *("--batch_size", batch, "--accumulate", accumulate, "--workers", 2),
        nproc=processes,
    )
    assert "Grad strides" not in done.stderr  # DDP would copy each gradient
    assert logged(tmp_path / "run", "loss") == pytest.approx(logged(run, "loss"), rel=1e-5)
    assert logged(tmp_path / "run", "val_loss") == pytest.approx(logged(run, "val_loss"), rel=1e-4)


@pytest.mark.slow
def test_online_training_equals_training_from_the_archive(run, tree, archive, tmp_path):
    """The archive's own random encoder is given as a file; the rest is the archive's fp16."""
    vit = {}
    for name, value in load_file(archive / "frozen.safetensors").items():
        vit[name.removeprefix("encoder.")] = value
    save_file(vit, tmp_path / "vit.safetensors")
    flags = [*FROZEN, "--weights", tmp_path / "vit.safetensors", *TRAIN]
    call(train, "--online", "--data", tree, *flags, "--out", tmp_path / "run")
    assert logged(tmp_path / "run", "loss") == pytest.approx(logged(run, "loss"), rel=2e-3)


def test_archived_latents_with_the_encoder_in_the_loop(run, tree, archive, tmp_path):
    """--archive with --online: the run from the archive's own features, up to their rounding."""
    online = ["--archive", archive, "--online", "--data", tree, *VIT]
    call(train, *online, "--out", tmp_path / "run", *TRAIN)
    assert steps_with(tmp_path / "run", "loss") == steps_with(run, "loss")
    ours = logged(tmp_path / "run", "loss")
    theirs = logged(run, "loss")
    assert ours == pytest.approx(theirs, rel=2e-4)
    assert not same(raw_weights(tmp_path / "run"), raw_weights(run))


def test_a_tree_that_is_not_the_archives(tree, archive, tmp_path):
    """--archive with --online reads the very images that were archived."""
    pairs = data.Archive(archive, "train", 0, tree)
    archived = images.load_image(tree / "00003" / "002.png", 32)[0]
    torch.testing.assert_close(pairs.image(3, 2), archived)
    shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "tree" / "00003" / "001.png").unlink()
    online = ["--archive", archive, "--online", "--data", tmp_path / "tree", *VIT]
    with pytest.raises(InputError, match="00003: no image 001"):
        call(train, *online, *TRAIN, "--steps", 20, "--out", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["--t_sampling", "gaussian"],
        ["--t_sampling", "gaussian", "--t_mean", 300],
        ["--t_sampling", "gaussian", "--t_std", 400],
        ["--prediction", "eps"],
        ["--prediction", "x0"],
        ["--pose", "elevation"],
        ["--pose_embedding", "mlp"],
        ["--no-amalgamate"],
        ["--attention", 1],
        ["--cond_dropout", 0.3],
        ["--unconditional"],
        ["--lr", 1e-4],
        ["--lr_min", 1e-3],
        ["--lr_schedule", "constant"],
        ["--warmup", 3],
        ["--cc_lr", 10],
        ["--weight_decay", 0.5],
        ["--clip", 0.01],
        ["--ema", 0.2],
        ["--seed", 1],
        ["--precision", "bf16"],
    ],
    ids=lambda changes: " ".join(str(word) for word in changes),
)
def test_every_training_flag_changes_the_result(run, archive, tmp_path, changes):
    flags = [*TRAIN, *changes, "--val_every", 0, "--log_every", 6]
    call(train, "--archive", archive, "--out", tmp_path / "run", *flags)
    ours = weights(tmp_path / "run")
    theirs = weights(run)
    changed = [name for name in ours.keys() & theirs.keys() if not ours[name].equal(theirs[name])]
    assert changed or ours.keys() != theirs.keys()


@pytest.mark.slow
def test_recomputing_changes_nothing(run, archive, tmp_path):
    call(train, "--archive", archive, "--out", tmp_path / "run", *TRAIN, "--checkpointing")
    assert logged(tmp_path / "run", "loss") == pytest.approx(logged(run, "loss"), rel=1e-6)


def test_another_optimizer_trains_and_resumes(archive, tmp_path, monkeypatch):
    """Plain SGD: what a step adds to the weights has the length lr * min(grad_norm, clip)."""
    make_adamw = train.make_optimizer

    def make_sgd(model, args):
        groups = []
        for group in make_adamw(model, args).param_groups:
            groups.append({"params": group["params"], "lr_multiple": group["lr_multiple"]})
        return torch.optim.SGD(groups, lr=args.lr)

    monkeypatch.setattr(train, "make_optimizer", make_sgd)
    out = tmp_path / "run"
    flags = ["--archive", archive, "--out", out, *TRAIN, "--lr_schedule", "constant"]
    flags += ["--save_every", 1, "--keep", 9, "--val_every", 0, "--clip", 0.1]
    call(train, *flags, "--steps", 2)
    call(train, *flags, "--steps", 3)
    norms = logged(out, "grad_norm")
    rates = logged(out, "lr")
    for step in (2, 3):
        before = raw_weights(out, step - 1)
        after = raw_weights(out, step)
        moved = sum((after[name] - before[name]).square().sum() for name in after).sqrt()
        expected = rates[step - 1] * min(norms[step - 1], 0.1)
        assert moved.item() == pytest.approx(expected, rel=1e-2)


def test_init_from_a_run_of_ours_brings_its_architecture(run):
    """Flags that are given come first; what is not the network's is not taken from the run."""
    own = parse(train, "--archive", "a", "--out", "b", *TRAIN)
    args = parse(train, "--archive", "a", "--out", "b", "--init", run, "--heads", 2)
    for flag in ("width", "channel_mult", "res_blocks", "attention", "context_dim", "prediction"):
        assert getattr(args, flag) == getattr(own, flag)
    assert args.heads == 2
    assert args.t_sampling == "gaussian"
    assert args.steps == 30_000


def test_a_run_needs_its_init_only_to_begin(run, archive, tmp_path):
    """Then its own checkpoint tells the architecture, which these flags leave to --init."""
    base = Path(shutil.copytree(run, tmp_path / "base"))
    flags = ["--archive", archive, "--init", base, "--out", tmp_path / "run", "--batch_size", 2]
    flags += ["--device", "cpu", "--workers", 0, "--val_every", 0, "--preview_every", 0]
    call(train, *flags, "--steps", 1)
    shutil.rmtree(base)
    call(train, *flags, "--steps", 2)
    assert (tmp_path / "run" / "step_0000002").is_dir()


def test_no_held_out_object_is_noted(tree, tmp_path, capsys):
    flags = ["--online", "--data", tree, *FROZEN, "--val_fraction", 0, *TRAIN, "--steps", 1]
    call(train, *flags, "--out", tmp_path / "run")
    assert "no object is held out" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [1.0, math.inf])
def test_a_gradient_whose_norm_overflows_leaves_no_nan(limit):
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.full((4,), 1e20)
    assert train.clip_gradients([parameter], limit).isinf()
    assert parameter.grad.isfinite().all()
    parameter.grad = torch.full((4,), 10.0)
    assert train.clip_gradients([parameter], limit) == 20
    assert parameter.grad.norm().item() == pytest.approx(min(limit, 20))


def test_notes_for_newcomers(archive, tmp_path, capsys):
    flags = ["--archive", archive, "--out", tmp_path / "run", *TRAIN, "--steps", 1]
    call(train, *flags, "--prediction", "eps", "--val_every", 0)
    printed = capsys.readouterr().out
    assert "without --init these flags train from scratch" in printed
    assert "--warmup 2 is shortened to half of --steps, 0" in printed


def test_a_model_that_will_not_fit_is_refused():
    with torch.device("meta"):
        model = NovelViewModel(model_channels=32_000)
    with pytest.raises(InputError, match="--width 32000: .* presets/small.txt"):
        train.check_memory(model, torch.device("cpu"))


@pytest.mark.slow
def test_the_five_rows_of_table_1_start_from_one_checkpoint(tree, run, tmp_path, capsys):
    """Timestep sampling x encoder x amalgamation, with CLIP's patch features, too.

    The checkpoint knows DINOv2's features. With CLIP's, amalgamation starts at zero, so that the
    first step's loss is the one without it.
    """
    clip = ["--encoder", "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"]
    for name, encoder in (("dino", []), ("clip", clip)):
        flags = [*FROZEN, *encoder, "--workers", 0]
        call(precompute_dino, "--data", tree, "--archive", tmp_path / name, *flags)
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
        start = ["--archive", tmp_path / archive, "--init", run]
        call(train, *start, "--out", tmp_path / row, *TRAIN, *flags)
        assert f"init {run}: loaded" in capsys.readouterr().out
        losses[row] = logged(tmp_path / row, "loss")
    assert losses["zero123"][0] != losses["gaussian"][0] != losses["dino"][0]
    assert losses["gaussian"][0] == losses["amalgamation"][0]
    assert losses["gaussian"][1] != losses["amalgamation"][1]
    assert losses["dino"][1:] != losses["all"][1:]


# --------------------------------------------------------------------------------------- bad input


def test_an_object_of_one_view_is_named(tree, tmp_path):
    folder = tmp_path / "tree" / "00001"
    shutil.copytree(tree, tmp_path / "tree")
    for index in (1, 2, 3):
        (folder / f"{index:03d}.png").unlink()
    flags = ["--online", "--data", tmp_path / "tree", *FROZEN, *TRAIN, "--steps", 20]
    with pytest.raises(InputError, match=f"{folder}: 1 complete view"):
        call(train, *flags, "--out", tmp_path / "run")


def test_a_held_out_image_that_cannot_be_read_stops_the_run_before_training(tree, tmp_path):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    held_out = sorted((root / "00011").glob("*.png"))
    for path in held_out:
        path.write_bytes(b"")
    flags = ["--online", "--data", root, *FROZEN, *TRAIN, "--out", tmp_path / "run"]
    flags += ["--steps", 2, "--save_every", 2]
    with pytest.raises(InputError, match="00011/00.*unreadable image"):
        call(train, *flags)
    assert not (tmp_path / "run" / "log.jsonl").exists()
    assert not list((tmp_path / "run").glob("step_*"))
    for path in held_out:
        shutil.copy(tree / "00011" / path.name, path)
    call(train, *flags)
    assert steps_with(tmp_path / "run", "val_loss") == [0, 2]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "give --archive, or --online with --data"),
        ("--archive ARCHIVE --data TREE", "--data: is read with --online only"),
        ("--online", "--online: needs --data"),
        ("--archive TREE", "manifest.json"),
        ("--archive ARCHIVE --max_skips 3", "unrecognized arguments: --max_skips"),
        ("--archive ARCHIVE --skip_bad", "unrecognized arguments: --skip_bad"),
        ("--archive ARCHIVE --steps 0", "--steps 0: must be above 0"),
        ("--archive ARCHIVE --accumulate 1.5", "--accumulate 1.5: not a whole number"),
        ("--archive ARCHIVE --lr nan", "--lr nan"),
        ("--archive ARCHIVE --lr_min=-1", "--lr_min -1"),
        ("--archive ARCHIVE --lr 1e-6", "--lr 1e-06: below --lr_min 1e-05; the cosine would rise"),
        ("--archive ARCHIVE --ema 2", "--ema 2: must be from 0 to 1"),
        ("--archive ARCHIVE --cond_dropout 0.4", "--cond_dropout 0.4: at most 1/3"),
        ("--archive ARCHIVE --t_std inf", "--t_std inf"),
        ("--archive ARCHIVE --t_std 1e7", "--t_std 1e.07: at most 1e6"),
        ("--archive ARCHIVE --t_mean 3000 --t_std 100", "--t_mean 3000"),
        ("--archive ARCHIVE --seed 9223372036854775808", "--seed 9223372036854775808"),
        ("--archive ARCHIVE --attention 1 3", "--attention 3: stages are downsampled by 1, 2, 4"),
        ("--archive ARCHIVE --channel_mult 0 1", "--channel_mult 0"),
        ("--archive ARCHIVE --channel_mult 1 1 1 1 1", "--channel_mult.*cannot be halved 4 times"),
        ("--archive ARCHIVE --width 48", "--width.*multiple of 32"),
        ("--archive ARCHIVE --device meta", "--device meta"),
        ("--archive ARCHIVE --device cuda:99", "--device cuda:99"),
        ("--archive ARCHIVE --init TREE/none", "--init .*none: no such file or run"),
        ("--online --data TREE VIT --codec pixels --image_size 32 --layers", "--no-amalgamate"),
        ("--online --data TREE VIT --codec pixels --image_size 32 --val_fraction 1", "no training"),
    ],
)
def test_refusals(tree, archive, tmp_path, flags, words):
    """Each in one line that names the flag or the file."""
    argv = [*SMALL, "--out", tmp_path / "run"]
    for word in flags.split():
        if word == "VIT":
            argv.extend(VIT)
        else:
            argv.append(word.replace("ARCHIVE", str(archive)).replace("TREE", str(tree)))
    with pytest.raises(InputError, match=words) as refusal:
        call(train, *argv)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_a_refusal_is_one_line_on_the_command_line(archive, tmp_path, processes):
    argv = ["--archive", archive, *SMALL, "--width", 48, "--out", tmp_path / "run"]
    done = script("train", *argv, nproc=processes, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert len(set(errors)) == 1
    assert "--width" in errors[0]
