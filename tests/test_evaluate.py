"""Metrics against their references; what makes scores comparable: fixed pairs, noise, baselines."""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import warnings
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision
from helpers import call, free_port
from PIL import Image
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

import evaluate
from lib.cli import InputError
from tools.shapes import look_at

FLAGS = [
    "--device=cpu",
    "--workers=0",
    "--steps=3",
    "--scale=1",
    "--lpips=none",
    "--protocol=first",
]
ROWS = ["samples", "poses shuffled", "white", "condition copied", "training images' mean"]
CPU = torch.device("cpu")


def score(run, tree, out, *flags) -> None:
    call(evaluate, "--ckpt", run, "--data", tree, *FLAGS, "--out", out, *flags)


def read(path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def by_row(path) -> dict[str, dict]:
    """The last line of each row."""
    return {line["row"]: line for line in read(path)}


@pytest.fixture(scope="module")
def scored(run, tree, tmp_path_factory):
    """eval.jsonl of the tiny run: 9 pairs of 3 held-out objects, two samples each."""
    out = tmp_path_factory.mktemp("scored") / "eval.jsonl"
    grid = out.with_name("grid.png")
    score(run, tree, out, "--shuffled", "--samples", 2, "--grid", grid)
    return out


# ----------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("noise", [0.02, 0.3, 1.0])
def test_metrics_are_scikit_images(noise):
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (4, 3, 24, 37)).astype(np.float32)
    b = (a + rng.normal(0, noise, a.shape)).clip(-1, 1).astype(np.float32)
    images = torch.tensor(a), torch.tensor(b)
    mse, psnr, ssim = evaluate.mse(*images), evaluate.psnr(*images), evaluate.ssim(*images)
    for i in range(4):
        x = (a[i].astype(float) + 1) / 2
        y = (b[i].astype(float) + 1) / 2
        reference = structural_similarity(
            x,
            y,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        assert mse[i].item() == pytest.approx(mean_squared_error(a[i], b[i]), rel=1e-6)
        assert psnr[i].item() == pytest.approx(
            peak_signal_noise_ratio(x, y, data_range=1), rel=1e-9
        )
        assert ssim[i].item() == pytest.approx(reference, rel=1e-9)


def test_metrics_of_equal_and_of_opposite_images():
    white = torch.ones(1, 3, 16, 16)
    assert evaluate.mse(white, white).item() == 0
    assert evaluate.psnr(white, white).item() == 100
    assert evaluate.ssim(white, white).item() == pytest.approx(1)
    assert evaluate.mse(white, -white).item() == 4
    assert evaluate.psnr(white, -white).item() == 0


@pytest.mark.parametrize(
    "net, make",
    [("alex", torchvision.models.alexnet), ("squeeze", torchvision.models.squeezenet1_1)],
)
def test_lpips_with_a_backbone_from_a_file(tmp_path, monkeypatch, net, make):
    backbone = make(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "net.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user sees none of lpips' and torchvision's warnings
        ours = evaluate.open_lpips(net, tmp_path / "net.pth")
    # What lpips takes for torchvision's download is the same network.
    monkeypatch.setattr(torchvision.models, make.__name__, lambda pretrained: backbone)
    theirs = lpips.LPIPS(net=net, verbose=False)
    a, b = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ours(a, b).shape == (2, 1, 1, 1)
    assert ours(a, b).min() > 0
    torch.testing.assert_close(ours(a, b), theirs(a, b), rtol=0, atol=0)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth: not torchvision's"):
        evaluate.open_lpips(net, tmp_path / "other.pth")


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)


def test_lpips_that_cannot_be_had_is_null_and_says_why(run, tree, tmp_path, no_network, capsys):
    score(run, tree, tmp_path / "e", "--lpips", "squeeze", "--pairs", 2)
    printed = capsys.readouterr().out
    assert printed.count("no LPIPS: ") == 1
    assert "no network" in printed
    assert "--lpips_backbone FILE" in printed
    for line in read(tmp_path / "e"):
        assert line["lpips"] is None
        assert line["lpips_net"] is None


def test_checkpoints_are_looked_at_before_anything_is_fetched(
    run, tree, tmp_path, no_network, capsys
):
    out = tmp_path / "e"
    with pytest.raises(InputError, match="missing: no such file or run"):
        score(run, tree, out, "--lpips", "alex", "--ckpt", run, tmp_path / "missing")
    assert "no LPIPS" not in capsys.readouterr().out
    assert not out.exists()


# ------------------------------------------------------------------------------------------- pairs


def keys(*args, **limits) -> list[str]:
    return [pair["key"] for pair in evaluate.fixed_pairs(*args, **limits)]


def test_pairs_are_fixed_and_held_out(tree):
    pairs = evaluate.fixed_pairs(tree, 0.25, "val", "pairs")
    assert pairs == evaluate.fixed_pairs(tree, 0.25, "val", "pairs")
    assert [pair["object"] for pair in pairs] == [9, 10, 11]
    assert [pair["cond"].parent.name for pair in pairs] == ["00009", "00010", "00011"]
    assert all(pair["cond"] != pair["target"] for pair in pairs)
    more = evaluate.fixed_pairs(tree, 0.25, "val", "pairs", 12)
    assert more[:3] == pairs
    assert 6 < len(more) <= 12  # repeats are left out
    # Another split holds the same pairs.
    assert evaluate.fixed_pairs(tree, 0.1, "val", "pairs")[-1] == pairs[-1]
    with pytest.raises(InputError, match="no object with two views in --split val"):
        evaluate.fixed_pairs(tree, 0.0, "val", "pairs")


def test_the_first_view_goes_to_all_others(tree):
    first = keys(tree, 0.25, "val", "first")
    assert first[:4] == ["00009 000 001", "00009 000 002", "00009 000 003", "00010 000 001"]
    assert len(first) == 9
    assert len(keys(tree, 0.25, "train", "first")) == 27


def test_objects_and_views_can_be_limited(tree):
    expected = ["00009 000 001", "00009 000 002", "00010 000 001", "00010 000 002"]
    assert keys(tree, 0.25, "val", "first", objects=2, views=2) == expected
    assert keys(tree, 0.25, "val", "first", 3, objects=2, views=2) == expected[:3]
    assert len(keys(tree, 0.25, "val", "first", objects=20, views=16)) == 9  # all there are
    two_each = keys(tree, 0.25, "val", "pairs", objects=2, views=2)
    assert two_each == keys(tree, 0.25, "val", "pairs", 4, objects=2)
    assert {key.split()[0] for key in two_each} == {"00009", "00010"}


def test_objects_of_one_view_take_no_pair_away(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "tree")
    for view in (1, 2, 3):
        (tmp_path / "tree" / "00009" / f"{view:03d}.png").unlink()
    pairs = evaluate.fixed_pairs(tmp_path / "tree", 0.25, "val", "pairs", 2)
    assert [pair["object"] for pair in pairs] == [10, 11]


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_shuffling_gives_every_pair_anothers_move(n):
    pairs = [{"key": i, "move": i} for i in range(n)]
    for seed in range(20):
        moved = evaluate.shuffled(pairs, seed)
        assert sorted(pair["key"] for pair in moved) == list(range(n))
        assert sorted(pair["move"] for pair in moved) == list(range(n))
        assert all(pair["move"] != pair["key"] for pair in moved)
    assert evaluate.shuffled(pairs, 3) == evaluate.shuffled(pairs, 3)
    with pytest.raises(InputError, match="--shuffled"):
        evaluate.shuffled(pairs[:1], 0)


def test_another_list_of_objects_is_noticed(run, tree, tmp_path, capsys):
    """Its split is another, and may hold objects that the model was trained on."""
    out = tmp_path / "e"
    score(run, tree, out, "--pairs", 1)
    assert "WARNING" not in capsys.readouterr().out
    (tmp_path / "tree").mkdir()
    for folder in sorted(tree.glob("0*"))[1:]:
        (tmp_path / "tree" / folder.name).symlink_to(folder)
    score(run, tmp_path / "tree", out, "--pairs", 1)
    assert "was trained on another list of objects: --split val may" in capsys.readouterr().out
    score(run, tmp_path / "tree", out, "--pairs", 1, "--split", "all")
    assert "WARNING" not in capsys.readouterr().out


def test_a_foreign_checkpoints_split_needs_the_list_of_objects(tree, tmp_path, capsys):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    (root / "valid_paths.json").unlink(missing_ok=True)
    flags = {"data": root, "protocol": "pairs", "pairs": None, "objects": None, "views": None}
    held_out = argparse.Namespace(**flags, split="val")
    everything = argparse.Namespace(**flags, split="all")
    foreign = {"image_size": 256, "val_fraction": 0.01}
    ours = {"image_size": 256, "args": {}, "val_fraction": 0.25}

    def warned(args, meta) -> bool:
        evaluate.choose_pairs("zero123-xl.ckpt", args, meta, 0.25)
        return "zero123-xl.ckpt may have been trained on these" in capsys.readouterr().out

    assert warned(held_out, foreign)
    assert not warned(everything, foreign)
    assert not warned(held_out, ours)
    names = sorted(path.name for path in root.iterdir())
    (root / "valid_paths.json").write_text(json.dumps(names))
    assert not warned(held_out, foreign)


def test_odd_poses_are_noted(tree, run, tmp_path, capsys):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    for path in root.glob("*/00?.npy"):
        np.save(path, np.load(path) * [1, 1, 1, 100])
    flags = ["--pairs", 2, "--steps", 1, "--lpips", "none", "--workers", 0, "--device", "cpu"]
    call(evaluate, "--ckpt", run, "--data", root, *flags, "--out", tmp_path / "eval.jsonl")
    assert capsys.readouterr().out.count("WARNING: camera's distance is far from 1.5 to 2.2") == 1


# -------------------------------------------------------------------------------------------- rows


def score_row(folder, settings, pairs, predict, metrics) -> dict:
    (folder / "e.pairs").mkdir(exist_ok=True)
    args = argparse.Namespace(out=folder / "e", batch_size=2, workers=0)
    return evaluate.evaluate_row(settings, pairs, predict, metrics, args, CPU, 0, 1)


def test_baselines_by_hand(tmp_path):
    """Four grey objects of two equal views: .2 .4 .6 of 255 train, .8 is held out."""
    tree = tmp_path / "tree"
    for i, grey in enumerate((51, 102, 153, 204)):
        (tree / f"{i}").mkdir(parents=True)
        for view in range(2):
            Image.new("RGB", (16, 16), (grey, grey, grey)).save(tree / f"{i}" / f"{view:03d}.png")
            np.save(tree / f"{i}" / f"{view:03d}.npy", look_at(1.0, view, 1.8).numpy())
    pairs = evaluate.fixed_pairs(tree, 0.25, "val", "first")
    metrics = {"mse": evaluate.mse, "psnr": evaluate.psnr}
    mean = evaluate.training_mean(tree, 0.25, 16)
    expected = {"white": 0.4**2, "condition copied": 0, "training images' mean": 0.8**2}
    baselines = evaluate.baselines(mean)
    assert baselines.keys() == expected.keys()
    for row, predict in baselines.items():
        line = score_row(tmp_path, {"row": row, "image_size": 16}, pairs, predict, metrics)
        assert line["mse"] == pytest.approx(expected[row], abs=1e-6)
        psnr = 10 * math.log10(4 / line["mse"]) if line["mse"] else 100
        assert line["psnr"] == pytest.approx(psnr, abs=1e-4)
        assert line["lpips"] is None
        assert line["mse_spread"] is None


def test_mean_and_spread_by_hand(tmp_path):
    """Two pairs of two samples: 1 and 3, 5 and 5. The last line of the stored values is torn."""
    stored = (
        '{"a": {"mse": [1, 3], "x": {}}}\n'
        '{"b": {"mse": [5, 5], "x": {}}}\n'
        '{"b": {"mse": [7'
    )  # fmt: skip
    settings = {"row": "samples", "image_size": 16}
    identity = score_row(tmp_path, settings, [], None, {})["id"]
    (tmp_path / "e.pairs" / f"{identity}.7").write_text(stored)
    line = score_row(tmp_path, settings, [{"key": "a"}, {"key": "b"}], None, {"mse": None})
    assert line["mse"] == 3.5
    assert line["mse_spread"] == pytest.approx(2**0.5 / 2)


def test_a_score_that_is_not_a_number_is_an_error(tree, tmp_path):
    pairs = evaluate.fixed_pairs(tree, 0.25, "val", "first")
    settings = {"row": "samples", "image_size": 16, "checkpoint": "runs/torn"}

    def predict(batch):
        return [batch["cond"] * float("nan")]

    message = 'row "samples" of runs/torn: the psnr of pair "00009 000 001" is not a finite number'
    with pytest.raises(InputError, match=message):
        score_row(tmp_path, settings, pairs, predict, {"psnr": evaluate.psnr})
    written = "".join(path.read_text() for path in (tmp_path / "e.pairs").iterdir())
    assert written == ""


def test_every_row_and_setting_is_in_the_line(scored, run):
    found = by_row(scored)
    assert list(found) == ROWS
    for line in found.values():
        assert (line["split"], line["protocol"]) == ("val", "first")
        assert (line["objects"], line["pairs"]) == (3, 9)
        assert line["mse_range"] == [-1, 1]
        assert line["ssim_window"] == 11
        assert line["psnr"] > 0
        assert line["lpips"] is None
        assert line["commit"] is None or len(line["commit"]) >= 12
    line = found["samples"]
    expected = {
        "step": 6,
        "steps": 3,
        "eta": 1,
        "scale": 1,
        "seed": 0,
        "samples": 2,
        "precision": "fp32",
        "ema": True,
        "checkpoint": str(run),
    }
    assert expected.items() <= line.items()
    assert line["run_args"]["t_sampling"] == "uniform"
    assert line["seconds"] > 0
    assert len(line["weights_sha256"]) == 64
    assert line["psnr_spread"] > 0
    assert line["psnr"] != found["poses shuffled"]["psnr"]
    assert Image.open(scored.with_name("grid.png")).width > 3 * 128


def as_rank(rank: int, port: int, argv) -> None:
    """evaluate.py as torchrun would start it, in a fork that has imported everything."""
    os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = "2"
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    call(evaluate, *argv)


def test_batches_and_processes_change_only_rounding(scored, run, tree, tmp_path):
    flags = ["--ckpt", run, "--data", tree, *FLAGS, "--shuffled", "--samples", 2]
    call(evaluate, *flags, "--batch_size", 2, "--out", tmp_path / "a")
    port = free_port()
    argv = (*flags, "--batch_size", 3, "--out", tmp_path / "b")
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=as_rank, args=(rank, port, argv)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(400)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    assert len(list((tmp_path / "b.pairs").glob("*.1"))) == len(ROWS)
    expected = by_row(scored)
    for other in (by_row(tmp_path / "a"), by_row(tmp_path / "b")):
        for row, line in expected.items():
            assert line["id"] == other[row]["id"]
            for key in ("mse", "psnr", "ssim", "psnr_spread"):
                assert line[key] == pytest.approx(other[row][key], abs=1e-5)


def test_rerunning_goes_on_where_it_was_stopped(scored, run, tree, tmp_path):
    """Of the samples' nine pairs one has a changed value, which stays, and one was torn."""
    out = tmp_path / "eval.jsonl"
    shutil.copytree(f"{scored}.pairs", f"{out}.pairs")
    expected = by_row(scored)
    stored = Path(f"{out}.pairs") / f"{expected['samples']['id']}.0"
    first, *rest = (text for text in stored.read_text().splitlines() if text)
    ((key, values),) = json.loads(first).items()
    values["psnr"] = [value + 9 for value in values["psnr"]]
    stored.write_text("\n".join([json.dumps({key: values}), *rest])[:-5])
    for _ in range(2):  # the torn pair; then nothing
        score(run, tree, out, "--shuffled", "--samples", 2)
        found = by_row(out)
        assert len(read(out)) == len(ROWS)
        for row, line in expected.items():
            gain = 1 if row == "samples" else 0
            assert found[row]["psnr"] == pytest.approx(line["psnr"] + gain)
        assert stored.read_text().count("}}") == 9


def test_seed_eta_scale_and_steps_change_the_samples(run, tree, tmp_path):
    out = tmp_path / "e"
    samples = set()
    white = set()
    for change in ([], ["--seed", 1], ["--eta", 0], ["--scale", 2], ["--steps", 2]):
        score(run, tree, out, "--pairs", 2, *change)
        found = by_row(out)
        samples.add(found["samples"]["psnr"])
        white.add(found["white"]["psnr"])
    assert len(samples) == 5
    assert len(white) == 1
    assert len(read(out)) == 5 + 3


def test_more_objects_than_the_run_held_out_are_warned_of(run, tree, tmp_path, capsys):
    score(run, tree, tmp_path / "e", "--val_fraction", 0.5, "--pairs", 2)
    assert "WARNING: --val_fraction 0.5: the model held out 0.25" in capsys.readouterr().out
    score(run, tree, tmp_path / "f", "--val_fraction", 0.25, "--pairs", 2)
    assert "WARNING" not in capsys.readouterr().out


def test_the_settings_of_a_row_tell_pose_encodings_apart():
    """A foreign checkpoint has the same weights with both, and --clip inf must stay JSON."""
    args = argparse.Namespace(seed=0, samples=1)
    meta = {"encoder": {"sha256": "a"}, "codec": {"sha256": "b"}, "args": {"clip": math.inf}}
    settings = []
    for encoding in ("zero123", "elevation"):
        model = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.ones_(model.bias)
        model.pose_encoding = encoding
        settings.append(evaluate.model_settings("x.ckpt", args, {}, model, meta))
    assert settings[0] != settings[1]
    assert settings[0]["weights_sha256"] == settings[1]["weights_sha256"]
    assert json.loads(json.dumps(settings[0], allow_nan=False))["run_args"] == {"clip": "inf"}


@pytest.mark.parametrize(
    "changes, named",
    [
        (["--pairs", 0], "--pairs 0"),
        (["--objects", 0], "--objects 0"),
        (["--views", -1], "--views -1"),
        (["--samples", 0], "--samples 0"),
        (["--batch_size", 0], "--batch_size 0"),
        (["--val_fraction", 2], "--val_fraction 2"),
        (["--val_fraction", 0], "--split val"),
        (["--lpips", "alex", "--lpips_backbone", "none.pth"], "none.pth"),
        (["--pairs", 1, "--shuffled"], "--shuffled"),
        (["--out", "/proc/none/e"], "--out"),
        (["--out", __file__], "--out"),
    ],
)
def test_bad_flags_are_named(run, tree, tmp_path, changes, named):
    with pytest.raises(InputError, match=named):
        score(run, tree, tmp_path / "e", *changes)


def test_a_file_that_cannot_be_read_is_named(run, tree, tmp_path):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    (root / "00010" / "002.png").write_bytes(b"torn")
    with pytest.raises(InputError, match="00010/002.png: unreadable image"):
        score(run, root, tmp_path / "e")


def test_what_is_rendered_again_is_scored_again(run, tree, tmp_path):
    """Training objects that give no mean take no scores away."""
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    out = tmp_path / "e"
    shutil.rmtree(root / "00000")
    for i in range(1, 9):
        for path in (root / f"{i:05d}").glob("00[123].png"):
            path.unlink()
    score(run, root, out)
    before = by_row(out)
    assert list(before) == ["samples", "white", "condition copied"]
    for path in (root / "00010").glob("*.png"):
        shutil.copy(tree / "00001" / path.name, path)
    score(run, root, out)
    after = by_row(out)
    assert len(read(out)) == 6
    for row in before:
        assert before[row]["psnr"] != after[row]["psnr"]


def test_a_damaged_checkpoint_takes_no_scores_of_another_away(run, tree, tmp_path):
    damaged = tmp_path / "model.safetensors"
    content = bytearray((run / "step_0000006" / "model.safetensors").read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(InputError, match="model.safetensors: damaged"):
        score(run, tree, tmp_path / "e", "--ckpt", run, damaged)
    assert "samples" in by_row(tmp_path / "e")


def test_a_render_that_is_gone_is_named(run, tree, tmp_path):
    """A tree of links may hold one that leads nowhere."""
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    view = root / "00011" / "001.png"
    view.unlink()
    view.symlink_to("nowhere")
    with pytest.raises(InputError, match=f"{view}: No such file"):
        score(run, root, tmp_path / "out.jsonl", "--protocol", "first")
