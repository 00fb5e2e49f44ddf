"""visualize.py: the numbers behind each figure, and that each sub-command writes both files."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pretrained
import visualize
from lib import scores
from lib.archives import ARCHIVE_FORMAT, save_shard
from lib.cli import InputError
from model import timestep_density
from pretrained import SpaceToDepth
from tools.shapes import look_at

FOREGROUND = [1, 2, 5, 6, 9, 10, 13, 14]  # the middle columns of a 4x4 grid of patches
PERMUTED = [14, 5, 2, 13, 1, 6, 10, 9]  # where view 1 has them


def draw(monkeypatch, tmp_path, *argv):
    """The Figure that a command line draws, checked to be written as PNG and PDF."""
    saved = []
    save = visualize.save
    monkeypatch.setattr(
        visualize, "save", lambda figure, out: saved.append(figure) or save(figure, out)
    )
    monkeypatch.setattr(
        sys, "argv", ["visualize.py", *map(str, argv), "--out", f"{tmp_path}/figures/it"]
    )
    visualize.main()
    monkeypatch.undo()
    for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        content = (tmp_path / f"figures/it{suffix}").read_bytes()
        assert content.startswith(magic) and len(content) < 200_000
    return saved[0]


@pytest.fixture
def archive(tmp_path):
    """Two objects of three views. View 1 of "a" is view 0 with its foreground patches permuted; layers 3 and 7."""
    torch.manual_seed(0)
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    patch, alpha = torch.randn(6, 16, 16), torch.zeros(6, 16, dtype=torch.uint8)
    alpha[:, FOREGROUND] = 255
    alpha[:, 0] = 127  # just under half: background
    patch[1][PERMUTED] = patch[0][FOREGROUND]
    poses = look_at(1.2, torch.tensor([0, 50, 200.0]).deg2rad(), 2.0).float().repeat(2, 1, 1)
    mean, logvar = SpaceToDepth(4).encode(images)
    rows = {
        "latent_mean": mean.half(),
        "latent_logvar": logvar.half(),
        "cls": torch.randn(6, 8).half(),
    }
    rows |= {
        "patch": patch.half(),
        "alpha": alpha,
        "pose": poses,
        "view": torch.tensor([0, 1, 2, 0, 1, 2]),
        "view_offset": torch.tensor([0, 3, 6]),
    }
    root = tmp_path / "archive"
    root.mkdir()
    save_shard(root / "00000.safetensors", rows)
    encoder = {
        "name": "vit",
        "layers": [3, 7],
        "pca": None,
        "feature_dim": 16,
        "cls_dim": 8,
        "tokens": 16,
    }
    encoder |= {"weights": "random", "image_size": 64, "sha256": ""}
    manifest = {"format": ARCHIVE_FORMAT, "objects": ["a", "b"], "val_fraction": 0.5, "image_size": 16,
                "encoder": encoder, "codec": pretrained.codec_spec(SpaceToDepth(4))}  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root, images, patch.half().double()


def edit_encoder(root, **changes):
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["encoder"] |= changes
    (root / "manifest.json").write_text(json.dumps(manifest))


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def score(run, step, lpips, **flags):
    """A line of evaluate.py's about a checkpoint of a run."""
    train = {
        "out": str(run),
        "t_sampling": "gaussian",
        "t_mean": 1000,
        "t_std": 200,
        "seed": 0,
        "global_batch": 8,
    }
    line = {
        "row": "samples",
        "split": "val",
        "seed": 0,
        "step": step,
        "seconds": 60.0 * step,
        "lpips": lpips,
    }
    weights = f"{run}/step_{step:07d}/model.safetensors"
    return line | {"weights": weights, "run_args": train | {"amalgamate": True} | flags}


# --------------------------------------------------------------------------------------------- figures 4, 5, 9


def test_matching_joins_what_a_permutation_moved(monkeypatch, tmp_path, archive):
    figure = draw(monkeypatch, tmp_path, "matching", "--archive", archive[0], "--objects", "a")
    (ax,) = figure.axes
    cells = [
        np.floor(4 * (line.get_xydata() - [[0, 0], [1, 0]])) for line in ax.lines
    ]  # column, row of both ends
    assert (
        ax.get_title() == "a, 46° apart"
    )  # 50 degrees of azimuth at this height: 46, rather than 155 or 119
    assert [tuple(cell @ [1, 4]) for cell in cells] == list(zip(FOREGROUND, PERMUTED, strict=True))


def test_separate_bases_agree_on_a_permutation_and_only_joint_ones_see_a_shift():
    a = torch.randn(
        20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ) * torch.arange(1, 7)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    for separate in (False, True):
        assert torch.equal(order[visualize.match_patches(a, a[order], separate)], torch.arange(20))
    shifted = a + 100  # a joint PCA sees the shift, the paper's separate ones don't
    assert torch.equal(visualize.match_patches(a, shifted, True), torch.arange(20))
    assert not torch.equal(visualize.match_patches(a, shifted), torch.arange(20))


def test_pca_colours_the_foreground_alone(monkeypatch, tmp_path, archive):
    root, images, patch = archive
    figure = draw(monkeypatch, tmp_path, "pca", "--archive", root)
    shown = [ax.images[0].get_array() for ax in figure.axes]
    assert len(shown) == 8 and figure.axes[0].get_ylabel().startswith("a, ")
    expected = ((images[0].half().float() + 1) * 127.5).round().permute(1, 2, 0)
    assert np.abs(shown[0].astype(int) - expected.numpy()).max() <= 1
    background = np.setdiff1d(np.arange(16), FOREGROUND)
    for colours in (shown[i].reshape(16, 3) for i in (2, 3, 6, 7)):
        assert (colours[background] == 255).all()
        assert (colours[FOREGROUND].min(0) == 0).all() and (colours[FOREGROUND].max(0) == 255).all()
    last = patch[0, FOREGROUND][:, 8:]  # the deeper of two layers
    centred = (last - last.mean(0)).numpy()
    first = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1]
    red = shown[2].reshape(16, 3)[FOREGROUND, 0].astype(float)
    assert abs(np.corrcoef(first, red)[0, 1]) > 0.9999
    assert np.array_equal(shown[2].reshape(16, 3)[FOREGROUND], shown[3].reshape(16, 3)[PERMUTED])


def test_what_cannot_be_drawn_is_passed_over_where_nobody_named_it(monkeypatch, tmp_path, archive):
    root = archive[0]
    rows = load_file(root / "00000.safetensors")
    rows["alpha"][1:3] = 0  # one view is left of the first object
    save_shard(root / "00000.safetensors", rows)
    for command in ("pca", "matching"):
        figure = draw(monkeypatch, tmp_path, command, "--archive", root)
        assert (figure.axes[0].get_ylabel() or figure.axes[0].get_title()).startswith("b, ")
        assert len(figure.axes) == (4 if command == "pca" else 1)
        with pytest.raises(InputError, match="--objects a: .* four foreground patches"):
            draw(monkeypatch, tmp_path, command, "--archive", root, "--objects", "b", "a")


def test_features_that_an_archive_lacks(monkeypatch, tmp_path, archive):
    root = archive[0]
    with pytest.raises(InputError, match="--objects c: no two views of it in .*archive"):
        draw(monkeypatch, tmp_path, "pca", "--archive", root, "--objects", "a", "c")
    edit_encoder(root, pca=16)
    draw(monkeypatch, tmp_path, "pca", "--archive", root)
    with pytest.raises(InputError, match="no such file"):
        draw(monkeypatch, tmp_path, "pca", "--archive", tmp_path / "nothing")
    rows = load_file(root / "00000.safetensors")
    save_shard(root / "00000.safetensors", rows | {"alpha": torch.zeros_like(rows["alpha"])})
    with pytest.raises(
        InputError, match="--archive .*archive: no object .* four foreground patches"
    ):
        draw(monkeypatch, tmp_path, "matching", "--archive", root)
    del rows["patch"]
    save_shard(root / "00000.safetensors", rows)
    edit_encoder(root, layers=[], feature_dim=0)
    with pytest.raises(InputError, match="holds no patch features"):
        draw(monkeypatch, tmp_path, "matching", "--archive", root)


# ----------------------------------------------------------------------------------------------- figures 1, 2, 8


def test_trajectory_has_a_row_a_view_and_a_column_a_timestep(monkeypatch, tmp_path):
    (tmp_path / "cat").mkdir()
    x0 = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "cat/x0.npz", x0=x0, t=np.array([999, 499, 9]))
    figure = draw(monkeypatch, tmp_path, "trajectory", "--x0", tmp_path / "cat/x0.npz")
    assert [ax.get_title() for ax in figure.axes] == ["t = 999", "t = 499", "t = 9", "", "", ""]
    assert np.array_equal(figure.axes[4].images[0].get_array(), x0[1, 1])
    (tmp_path / "torn.npz").write_bytes((tmp_path / "cat/x0.npz").read_bytes()[:100])
    np.savez(tmp_path / "flat.npz", x0=x0[0], t=np.array([999]))
    np.savez(tmp_path / "short.npz", x0=x0, t=np.array([999]))
    for path in (tmp_path / f"{name}.npz" for name in ("torn", "none", "flat", "short")):
        with pytest.raises(InputError, match="--x0 .*npz: not from"):
            draw(monkeypatch, tmp_path, "trajectory", "--x0", path)


def test_timesteps_histograms_sum_to_one_and_follow_their_densities(monkeypatch, tmp_path):
    left, right = draw(monkeypatch, tmp_path, "timesteps").axes
    assert len(left.lines) == len(right.lines) == 10
    for ax, settings in (
        (left, [(m, 200) for m in (1000, 700, 500, 300, 0)]),
        (right, [(1000, 100), (1000, 200)]),
    ):
        for i, setting in enumerate(settings):
            density, drawn = (line.get_ydata() for line in ax.lines[2 * i : 2 * i + 2])
            assert np.allclose(density, timestep_density("gaussian", *setting))
            assert abs(density.sum() - 1) < 1e-9 and abs(50 * drawn.sum() - 1) < 1e-6
            assert np.abs(drawn - density.reshape(20, 50).mean(1)).max() < 1e-4


def test_wild_puts_the_input_before_the_views(monkeypatch, tmp_path):
    for name, views in (("cat", 2), ("dog", 1)):
        (tmp_path / name).mkdir()
        for i, file in enumerate(["input", "000", "001"][: 1 + views]):
            Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / name / f"{file}.png")
        Image.new("RGB", (80, 8)).save(tmp_path / name / "grid.png")
    figure = draw(monkeypatch, tmp_path, "wild", tmp_path / "cat", tmp_path / "dog")
    shown = [[image.get_array()[0, 0, 0] for image in ax.images] for ax in figure.axes]
    assert shown == [[0], [60], [120], [0], [60]]
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert [label.replace("\n", "") for label in labels] == [
        f"{tmp_path.name}/cat",
        "",
        "",
        f"{tmp_path.name}/dog",
        "",
    ]
    assert all(
        len(line) <= 20 for label in labels for line in label.split("\n")
    )  # rows' names would overlap
    assert [ax.get_title() for ax in figure.axes] == ["input", "view 0", "view 1", "", ""]
    with pytest.raises(InputError, match="input.png: "):
        draw(monkeypatch, tmp_path, "wild", tmp_path)

    shutil.copytree(
        tmp_path / "cat", tmp_path / "baseline" / "cat"
    )  # the same image, by another model
    figure = draw(monkeypatch, tmp_path, "wild", tmp_path / "cat", tmp_path / "baseline" / "cat")
    labels = [ax.get_ylabel().replace("\n", "") for ax in figure.axes[::3]]
    assert labels == [f"{tmp_path.name}/cat", "baseline/cat"]


# -------------------------------------------------------------------------------------------------- figures 6, 7


def test_sweep_takes_each_runs_last_score_and_groups_seeds(monkeypatch, tmp_path):
    lines = [
        score("m700_0", 10, 0.9, t_mean=700),
        score("m700_0", 20, 0.2, t_mean=700),
        {"row": "white", "lpips": 0.9},
    ]
    lines += [
        score("m700_1", 20, 0.4, t_mean=700, seed=1),
        score("base", 20, 0.1),
        score("uniform", 20, 0.7, t_sampling="uniform"),
    ]
    lines += [
        {"step": 20, "run_args": {"out": "a"}},
        score("elsewhere", 20, 0.6, t_mean=500, t_std=500),
    ]
    lines += [score("s500", 20, 0.5, t_std=500), score("plain", 20, 0.8, amalgamate=False)]
    write_lines(tmp_path / "eval.jsonl", lines)
    with pytest.raises(InputError, match="train.amalgamate false and true don't compare"):
        draw(monkeypatch, tmp_path, "sweep", "--eval", tmp_path / "eval.jsonl")
    figure = draw(
        monkeypatch,
        tmp_path,
        "sweep",
        "--eval",
        tmp_path / "eval.jsonl",
        "--where",
        "amalgamate=True",
    )
    for ax, values, means, spreads in zip(figure.axes, ([700, 1000], [200, 500]), ([0.3, 0.1], [0.1, 0.5]),
                                          ([0.02**0.5, 0], [0, 0]), strict=True):  # fmt: skip
        line, _, (bars,) = ax.containers[0]
        assert np.allclose(line.get_xydata(), np.transpose([values, means]))
        assert np.allclose([np.ptp(bar[:, 1]) / 2 for bar in bars.get_segments()], spreads)


def test_sweep_refuses_other_evaluations_and_unknown_metrics(monkeypatch, tmp_path):
    write_lines(
        tmp_path / "eval.jsonl", [score("a", 20, 0.2), score("b", 20, 0.3) | {"split": "train"}]
    )
    with pytest.raises(InputError, match='split "train" and "val" don\'t compare'):
        draw(monkeypatch, tmp_path, "sweep", "--eval", tmp_path / "eval.jsonl")
    with pytest.raises(InputError, match="--metric fid: .*eval.jsonl"):
        draw(
            monkeypatch,
            tmp_path,
            "sweep",
            "--eval",
            tmp_path / "eval.jsonl",
            "--where",
            "split=val",
            "--metric",
            "fid",
        )


def test_sweep_refuses_runs_at_different_steps(monkeypatch, tmp_path):
    lines = [score("a", 10, 0.2), score("a", 20, 0.1), score("b", 10, 0.3, seed=1)]
    write_lines(tmp_path / "eval.jsonl", lines)
    argv = ("sweep", "--eval", tmp_path / "eval.jsonl")
    with pytest.raises(InputError, match="--eval: step 10 and 20 don't compare; choose by --where"):
        draw(monkeypatch, tmp_path, *argv)
    figure = draw(monkeypatch, tmp_path, *argv, "--where", "step=10")
    assert np.allclose(figure.axes[0].containers[0][0].get_ydata(), [0.25])


def test_where_is_the_evaluations_before_trainings(tmp_path):
    path = tmp_path / "eval.jsonl"
    flags = {"steps": 1200, "seed": 1, "t_std": 200.0, "lr": 1e-4}
    write_lines(
        path,
        [score("a", 20, 0.2, **flags) | {"steps": 2}, score("b", 20, 0.3, **flags) | {"steps": 3}],
    )

    def chosen(*where):
        args = argparse.Namespace(eval=[path], where=where)
        return [Path(line["train.out"]).name for line in scores.read_scores(args, [])]

    assert (
        chosen("steps=2") == ["a"]
        and chosen("steps=1200") == []
        and chosen("train.steps=1200") == ["a", "b"]
    )
    assert chosen("seed=0") == chosen("train.seed=1") == ["a", "b"] and chosen("train.seed=0") == []
    assert (
        chosen("t_std=200", "lr=0.0001", "amalgamate=True", "out=b") == chosen("steps=3.0") == ["b"]
    )


def test_sweep_wants_runs_on_its_axes(monkeypatch, tmp_path):
    write_lines(tmp_path / "eval.jsonl", [score("a", 20, 0.2, t_mean=500, t_std=500)])
    with pytest.raises(InputError, match="--metric lpips: .* std 200 or mean 1000"):
        draw(monkeypatch, tmp_path, "sweep", "--eval", tmp_path / "eval.jsonl")


def test_curves_mean_and_spread_over_runs(monkeypatch, tmp_path):
    for run, faster, values in (("a0", 1, (4, 2)), ("a1", 2, (6, 3))):
        write_lines(tmp_path / run / "log.jsonl", [
            {"step": 10 * (i + 1), "seconds": 600.0 * (i + 1) / faster, "samples": 80 * (i + 1), "loss": float(v)}
            for i, v in enumerate(values)])  # fmt: skip
    with open(tmp_path / "a0/log.jsonl", "a") as log:
        log.write('{"step": 30, "seconds": 18')  # a live log's last line
    runs = f"both={tmp_path}/a0,{tmp_path}/a1"
    ax = draw(monkeypatch, tmp_path, "curves", runs, "--metric", "loss").axes[0]
    assert np.allclose(ax.lines[0].get_xydata(), [[7.5, 5], [15, 2.5]])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band.max(), 5 + 2**0.5) and np.isclose(band.min(), 2.5 - 0.5**0.5)
    assert ax.get_xlabel() == "training time (min)"
    assert ax.get_legend().get_texts()[0].get_text() == "both: loss (n = 2)"
    ax = draw(
        monkeypatch, tmp_path, "curves", tmp_path / "a0", "--x", "samples", "--metric", "loss"
    ).axes[0]
    assert np.allclose(ax.lines[0].get_xydata(), [[80, 4], [160, 2]])
    with pytest.raises(InputError, match="--metric nothing: .*a0 has no such metric"):
        draw(monkeypatch, tmp_path, "curves", tmp_path / "a0", "--metric", "nothing")


def test_curves_draw_what_there_is(monkeypatch, tmp_path):
    lines = [{"step": i, "seconds": 60.0 * i, "samples": 8 * i, "loss": 1.0} for i in (1, 2)]
    write_lines(tmp_path / "a/log.jsonl", lines)
    write_lines(tmp_path / "b/log.jsonl", [*lines, lines[0] | {"val_loss_ema": 2.0}])
    write_lines(tmp_path / "c/log.jsonl", [line | {"step": 9} for line in lines])

    def drawn(runs, *argv):
        figure = draw(monkeypatch, tmp_path, "curves", f"label={runs}", *argv)
        return [text.get_text().split()[1] for text in figure.axes[0].get_legend().get_texts()]

    a, b, c = (tmp_path / run for run in "abc")
    assert drawn(b) == ["loss", "val_loss_ema"] and drawn(a) == drawn(f"{a},{b}") == ["loss"]
    with pytest.raises(InputError, match="--metric val_loss_ema: .*/a has no such metric"):
        drawn(f"{b},{a}", "--metric", "val_loss_ema")
    with pytest.raises(InputError, match="--metric loss: .*/a,.*/c have it at no common step"):
        drawn(f"{a},{c}")
    with pytest.raises(InputError, match="--where step=1: .* --eval"):
        drawn(a, "--where", "step=1")
    own, path = [score(a, step, None) | {"psnr": 9.0} for step in (1, 2)], tmp_path / "eval.jsonl"
    write_lines(path, own)
    assert drawn(a, "--eval", path) == ["psnr"]
    write_lines(path, [line | {"lpips": 0.5} for line in own])
    assert drawn(a, "--eval", path) == ["lpips"]
    with pytest.raises(InputError, match="--metric lpips: .*/b has no such metric"):
        drawn(b, "--eval", path)


def test_curves_of_scores_belong_to_their_run(monkeypatch, tmp_path):
    lines = [
        score(tmp_path / run, step, lpips)
        for run, step, lpips in (("a", 1, 0.5), ("a", 2, 0.3), ("ab", 2, 0.1))
    ]
    write_lines(tmp_path / "eval.jsonl", lines)
    argv = ("curves", tmp_path / "a", "--metric", "lpips", "--eval", tmp_path / "eval.jsonl")
    assert np.allclose(
        draw(monkeypatch, tmp_path, *argv).axes[0].lines[0].get_xydata(), [[1, 0.5], [2, 0.3]]
    )
    write_lines(
        tmp_path / "eval.jsonl", [score(f"./{tmp_path.name}/a/", 3, 0.7), score(".", 3, 0.7)]
    )  # relative
    assert np.allclose(draw(monkeypatch, tmp_path, *argv).axes[0].lines[0].get_xydata(), [[3, 0.7]])
    write_lines(
        tmp_path / "eval.jsonl", [line | {"samples": 3} for line in lines]
    )  # a pair, not seen in training
    axes = draw(monkeypatch, tmp_path, *argv, "--x", "samples").axes
    assert np.allclose(axes[0].lines[0].get_xdata(), [8, 16])


def test_logs_that_cannot_be_drawn(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="log.jsonl: .*No such file"):
        draw(monkeypatch, tmp_path, "curves", tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(InputError, match="--metric loss: .* has no such metric"):
        draw(monkeypatch, tmp_path, "curves", tmp_path)
    write_lines(
        tmp_path / "log.jsonl",
        [{"step": 1, "seconds": 1.0, "val_loss": 2.0, "skipped": 3, "ok": True}],
    )
    axes = draw(monkeypatch, tmp_path, "curves", tmp_path, "--metric", "val_loss", "skipped").axes
    assert [line.get_ydata().tolist() for line in axes[0].lines] == [[2], [3]]
    with pytest.raises(InputError, match="--metric ok"):
        draw(monkeypatch, tmp_path, "curves", tmp_path, "--metric", "ok")
    (tmp_path / "file").write_text("{not json}")
    with pytest.raises(InputError, match="file: unreadable"):
        draw(monkeypatch, tmp_path, "sweep", "--eval", tmp_path / "file")
    with pytest.raises(InputError, match="file/it.png: could not be written"):
        visualize.save(visualize.Figure(), f"{tmp_path}/file/it")
