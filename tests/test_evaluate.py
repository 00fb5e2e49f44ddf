"""The metrics against their references, and what makes scores comparable: fixed pairs, fixed noise, baselines."""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision
from helpers import call
from PIL import Image
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

import evaluate
from lib.cli import InputError
from tools.shapes import look_at

FLAGS = [
    "--device",
    "cpu",
    "--workers",
    0,
    "--steps",
    3,
    "--scale",
    1,
    "--lpips",
    "none",
    "--protocol",
    "first",
]
ROWS = ["samples", "poses shuffled", "white", "condition copied", "training images' mean"]


def lines(path) -> dict[str, dict]:
    return {line["row"]: line for line in map(json.loads, path.read_text().splitlines())}


def as_rank(rank: int, port: int, argv) -> None:
    """evaluate.py as torchrun would start it, in a fork that has imported all already."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    call(evaluate, *argv)


@pytest.fixture(scope="module")
def scored(run, tree, tmp_path_factory):
    """eval.jsonl of the tiny run: 9 pairs of 3 held-out objects, two samples each."""
    out = tmp_path_factory.mktemp("scored") / "eval.jsonl"
    call(evaluate, "--ckpt", run, "--data", tree, *FLAGS, "--shuffled", "--samples", 2, "--out", out,
         "--grid", out.with_name("grid.png"))  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("noise", [0.02, 0.3, 1.0])
def test_metrics_are_scikit_images(noise):
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (4, 3, 24, 37)).astype(np.float32)
    b = (a + rng.normal(0, noise, a.shape)).clip(-1, 1).astype(np.float32)
    ours = [
        f(torch.tensor(a), torch.tensor(b)) for f in (evaluate.mse, evaluate.psnr, evaluate.ssim)
    ]
    for i in range(4):
        x, y = (a[i].astype(float) + 1) / 2, (b[i].astype(float) + 1) / 2
        assert ours[0][i].item() == pytest.approx(mean_squared_error(a[i], b[i]), rel=1e-6)
        assert ours[1][i].item() == pytest.approx(
            peak_signal_noise_ratio(x, y, data_range=1), rel=1e-9
        )
        reference = structural_similarity(
            x,
            y,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        assert ours[2][i].item() == pytest.approx(reference, rel=1e-9)


def test_metrics_of_equal_and_of_opposite_images():
    white, black = torch.ones(1, 3, 16, 16), -torch.ones(1, 3, 16, 16)
    assert [f(white, white).item() for f in (evaluate.mse, evaluate.psnr)] == [0, 100]
    assert evaluate.ssim(white, white).item() == pytest.approx(1)
    assert evaluate.mse(white, black).item() == 4 and evaluate.psnr(white, black).item() == 0


@pytest.mark.parametrize(
    "net, make",
    [("alex", torchvision.models.alexnet), ("squeeze", torchvision.models.squeezenet1_1)],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_lpips_with_a_backbone_from_a_file(tmp_path, monkeypatch, net, make):
    backbone = make(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "net.pth")
    ours = evaluate.open_lpips(net, tmp_path / "net.pth")
    monkeypatch.setattr(torchvision.models, make.__name__, lambda pretrained: backbone)
    theirs = lpips.LPIPS(
        net=net, verbose=False
    )  # takes the same network for torchvision's download
    a, b = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ours(a, b).shape == (2, 1, 1, 1) and ours(a, b).min() > 0
    torch.testing.assert_close(ours(a, b), theirs(a, b), rtol=0, atol=0)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth: not torchvision's"):
        evaluate.open_lpips(net, tmp_path / "other.pth")


def test_lpips_that_cannot_be_had_is_null_and_says_why(run, tree, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    call(
        evaluate,
        "--ckpt",
        run,
        "--data",
        tree,
        *FLAGS,
        "--lpips",
        "squeeze",
        "--pairs",
        2,
        "--out",
        tmp_path / "e",
    )
    printed = capsys.readouterr().out
    assert (
        printed.count("no LPIPS: ") == 1
        and "no network" in printed
        and "--lpips_backbone FILE" in printed
    )
    assert all(
        line["lpips"] is None and line["lpips_net"] is None
        for line in lines(tmp_path / "e").values()
    )


# ----------------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_fixed_and_held_out(tree):
    pairs = evaluate.fixed_pairs(tree, 0.25, "val", "pairs")
    assert pairs == evaluate.fixed_pairs(tree, 0.25, "val", "pairs")
    assert [pair["object"] for pair in pairs] == [9, 10, 11] and all(
        pair["cond"] != pair["target"] for pair in pairs
    )
    assert [pair["cond"].parent.name for pair in pairs] == ["00009", "00010", "00011"]
    more = evaluate.fixed_pairs(tree, 0.25, "val", "pairs", 12)
    assert more[:3] == pairs and 6 < len(more) <= 12  # repeats are left out
    assert (
        evaluate.fixed_pairs(tree, 0.1, "val", "pairs")[-1] == pairs[-1]
    )  # another split holds the same pairs
    first = evaluate.fixed_pairs(tree, 0.25, "val", "first")
    assert [pair["key"] for pair in first[:4]] == [
        "00009 000 001",
        "00009 000 002",
        "00009 000 003",
        "00010 000 001",
    ]
    assert len(first) == 9 and len(evaluate.fixed_pairs(tree, 0.25, "train", "first")) == 27
    with pytest.raises(InputError, match="no object with two views in --split val"):
        evaluate.fixed_pairs(tree, 0.0, "val", "pairs")


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
        assert (
            sorted(pair["key"] for pair in moved)
            == sorted(pair["move"] for pair in moved)
            == list(range(n))
        )
        assert all(pair["move"] != pair["key"] for pair in moved)
    assert evaluate.shuffled(pairs, 3) == evaluate.shuffled(pairs, 3)
    with pytest.raises(InputError, match="--shuffled"):
        evaluate.shuffled(pairs[:1], 0)


# ------------------------------------------------------------------------------------------------------------ rows


def test_baselines_by_hand(tmp_path):
    """Four grey objects of two equal views: .2 .4 .6 of 255 train, .8 is held out; its condition is its target."""
    for i, grey in enumerate((51, 102, 153, 204)):
        folder = tmp_path / "tree" / f"{i}"
        folder.mkdir(parents=True)
        for view in range(2):
            Image.new("RGB", (16, 16), (grey,) * 3).save(folder / f"{view:03d}.png")
            np.save(folder / f"{view:03d}.npy", look_at(1.0, view, 1.8).numpy())
    (tmp_path / "e.pairs").mkdir()
    args = argparse.Namespace(
        out=tmp_path / "e", rank=0, world=1, batch_size=2, workers=0, device=torch.device("cpu")
    )
    pairs = evaluate.fixed_pairs(tmp_path / "tree", 0.25, "val", "first")
    metrics = {"mse": evaluate.mse, "psnr": evaluate.psnr}
    expected = {"white": 0.4**2, "condition copied": 0, "training images' mean": 0.8**2}
    for row, view in evaluate.baselines(tmp_path / "tree", 0.25, 16).items():
        predict = lambda batch, f=view: [f(batch["cond"])]  # noqa: E731
        (line,) = evaluate.evaluate_row(
            {"row": row, "image_size": 16}, pairs, predict, metrics, args
        ).values()
        assert line["mse"] == pytest.approx(expected.pop(row), abs=1e-6)
        assert line["psnr"] == pytest.approx(
            10 * np.log10(4 / line["mse"]) if line["mse"] else 100, abs=1e-4
        )
        assert line["lpips"] is line["mse_spread"] is None
    assert not expected


def test_mean_and_spread_by_hand(tmp_path):
    """Two pairs of two samples: 1 and 3, 5 and 5."""
    (tmp_path / "e.pairs").mkdir()
    args = argparse.Namespace(
        out=tmp_path / "e", rank=0, world=1, batch_size=1, workers=0, device=torch.device("cpu")
    )
    done = '{"a": {"mse": [1, 3], "x": {}}}\n{"b": {"mse": [5, 5], "x": {}}}\n{"b": {"mse": [7'  # the last line is torn
    row = {"row": "samples", "image_size": 16}
    (identity,) = evaluate.evaluate_row(row, [], None, {}, args)
    (tmp_path / "e.pairs" / f"{identity}.7").write_text(done)
    (line,) = evaluate.evaluate_row(
        row, [{"key": "a"}, {"key": "b"}], None, {"mse": None}, args
    ).values()
    assert (line["mse"], line["mse_spread"]) == (3.5, pytest.approx(2**0.5 / 2))


def test_every_row_and_setting_is_in_the_line(scored, run):
    found = lines(scored)
    assert list(found) == ROWS
    for line in found.values():
        assert line["pairs"] == 9 and line["split"] == "val" and line["protocol"] == "first"
        assert (
            line["mse_range"] == [-1, 1]
            and line["ssim_window"] == 11
            and line["psnr"] > 0
            and line["lpips"] is None
        )
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
    }
    assert (
        expected.items() <= line.items()
        and line["run_args"]["t_sampling"] == "uniform"
        and line["seconds"] > 0
    )
    assert line["checkpoint"] == str(run) and len(line["weights_sha256"]) == 64
    assert line["psnr_spread"] > 0 and line["psnr"] != found["poses shuffled"]["psnr"]
    assert Image.open(scored.with_name("grid.png")).width > 3 * 128


def test_batches_and_processes_change_only_rounding(scored, run, tree, tmp_path):
    flags = ["--ckpt", run, "--data", tree, *FLAGS, "--shuffled", "--samples", 2]
    call(evaluate, *flags, "--batch_size", 2, "--out", tmp_path / "a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = (*flags, "--batch_size", 3, "--out", tmp_path / "b")
    ranks = [
        multiprocessing.get_context("fork").Process(target=as_rank, args=(i, port, argv))
        for i in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
        assert process.exitcode == 0
    assert len(list((tmp_path / "b.pairs").glob("*.1"))) == len(ROWS)
    for other in (lines(tmp_path / "a"), lines(tmp_path / "b")):
        for row, line in lines(scored).items():
            values = [
                [x[key] for key in ("mse", "psnr", "ssim", "psnr_spread")]
                for x in (line, other[row])
            ]
            assert values[0] == pytest.approx(values[1], abs=1e-5)
            assert line["id"] == other[row]["id"]


def test_rerunning_goes_on_where_it_was_stopped(scored, run, tree, tmp_path, monkeypatch):
    out = tmp_path / "eval.jsonl"
    shutil.copytree(f"{scored}.pairs", f"{out}.pairs")
    torn = tmp_path / "eval.jsonl.pairs" / f"{lines(scored)['samples']['id']}.0"
    torn.write_text(torn.read_text()[:-5])
    seen = []
    load = evaluate.load_pairs
    held_out = lambda pairs: [pair["key"] for pair in pairs if pair["object"] > 8]  # noqa: E731 (not the mean's)
    monkeypatch.setattr(
        evaluate,
        "load_pairs",
        lambda pairs, size: seen.extend(held_out(pairs)) or load(pairs, size),
    )
    flags = ["--ckpt", run, "--data", tree, *FLAGS, "--shuffled", "--samples", 2, "--out", out]
    for _ in range(2):  # the torn pair; then nothing
        call(evaluate, *flags)
        assert len(seen) == 1
        ours, theirs = lines(out), lines(scored)
        assert [line["psnr"] for line in ours.values()] == pytest.approx(
            [line["psnr"] for line in theirs.values()]
        )
        assert len(out.read_text().splitlines()) == len(ROWS)


def test_another_list_of_objects_is_noticed(run, tree, tmp_path, capsys):
    """Its split is another, and may hold objects of the training."""
    flags = ["--ckpt", run, *FLAGS, "--pairs", 1, "--out", tmp_path / "e"]
    call(evaluate, *flags, "--data", tree)
    assert "WARNING" not in capsys.readouterr().out
    (tmp_path / "tree").mkdir()
    for folder in sorted(tree.glob("0*"))[1:]:
        (tmp_path / "tree" / folder.name).symlink_to(folder)
    call(evaluate, *flags, "--data", tmp_path / "tree")
    assert "was trained on another list of objects: --split val may" in capsys.readouterr().out
    call(evaluate, *flags, "--data", tmp_path / "tree", "--split", "all")
    assert "WARNING" not in capsys.readouterr().out


def test_seed_eta_scale_and_steps_change_the_samples(run, tree, tmp_path):
    found = []
    for change in ([], ["--seed", 1], ["--eta", 0], ["--scale", 2], ["--steps", 2]):
        call(
            evaluate,
            "--ckpt",
            run,
            "--data",
            tree,
            *FLAGS,
            "--pairs",
            2,
            *change,
            "--out",
            tmp_path / "e",
        )
        found.append(lines(tmp_path / "e"))  # the file's last line of each row
    assert (
        len({line["samples"]["psnr"] for line in found}) == 5
        and len({line["white"]["psnr"] for line in found}) == 1
    )
    assert len((tmp_path / "e").read_text().splitlines()) == 5 + 3


@pytest.mark.parametrize("changes, named", [
    (["--pairs", 0], "--pairs 0"), (["--samples", 0], "--samples 0"), (["--val_fraction", 2], "--val_fraction 2"),
    (["--val_fraction", 0], "--split val"), (["--lpips", "alex", "--lpips_backbone", "none.pth"], "none.pth"),
    (["--pairs", 1, "--shuffled"], "--shuffled"), (["--out", "/proc/none/e"], "--out"), (["--out", __file__], "--out"),
])  # fmt: skip
def test_bad_flags_are_named(run, tree, tmp_path, changes, named):
    with pytest.raises(InputError, match=named):
        call(evaluate, "--ckpt", run, "--data", tree, *FLAGS, "--out", tmp_path / "e", *changes)


def test_what_cannot_be_read_is_left_out_and_other_code_scores_anew(
    run, tree, tmp_path, monkeypatch, capsys
):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    (root / "00010" / "002.png").write_bytes(b"torn")
    command = ["--ckpt", run, "--data", root, *FLAGS, "--out", tmp_path / "e"]
    with pytest.raises(Exception, match="00010/002.png: unreadable image"):
        call(evaluate, *command)
    call(evaluate, *command, "--skip_bad")
    assert (
        lines(tmp_path / "e")["samples"]["pairs"] == 8 and "left out: " in capsys.readouterr().out
    )
    bare = Path(shutil.copytree(root, tmp_path / "bare"))
    for path in [
        path for name in ("00009", "00010", "00011") for path in (bare / name).glob("*.png")
    ]:
        path.write_bytes(b"torn")
    with pytest.raises(InputError, match="no pair of --split val can be read"):
        call(evaluate, "--ckpt", run, "--data", bare, *FLAGS, "--out", tmp_path / "f", "--skip_bad")
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "sample.py")
    )
    call(evaluate, *command, "--skip_bad")
    assert [json.loads(line)["row"] for line in (tmp_path / "e").read_text().splitlines()] == 2 * [
        row for row in ROWS if row != "poses shuffled"
    ]


def test_what_is_rendered_anew_is_scored_anew(run, tree, tmp_path):
    """And a missing checkpoint takes no scores with it, nor do training objects that give no mean."""
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    shutil.rmtree(root / "00000")
    for name in [f"{i:05d}" for i in range(1, 9)]:
        [path.unlink() for path in (root / name).glob("00[123].png")]
    command = ["--ckpt", run, "--data", root, *FLAGS, "--out", tmp_path / "e"]
    with pytest.raises(InputError, match="missing"):
        call(evaluate, *command, "--ckpt", run, tmp_path / "missing")
    first = {
        line["row"]: line["psnr"]
        for line in map(json.loads, (tmp_path / "e").read_text().splitlines())
    }
    assert "samples" in first and "training images' mean" not in first
    for path in (root / "00010").glob("*.png"):
        shutil.copy(tree / "00001" / path.name, path)
    call(evaluate, *command)
    lines = [json.loads(line) for line in (tmp_path / "e").read_text().splitlines()]
    scores = {
        line["row"]: {other["psnr"] for other in lines if other["row"] == line["row"]}
        for line in lines
    }
    assert all(len(values) == 2 for values in scores.values()), scores
