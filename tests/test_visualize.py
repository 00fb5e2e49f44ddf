"""visualize.py: the numbers behind each figure. Each sub-command writes both files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

import pretrained
import sample
import visualize
from lib import scores
from lib.archives import ARCHIVE_FORMAT, save_shard
from lib.cli import InputError
from model import timestep_density
from pretrained import SpaceToDepth
from tools.shapes import look_at

FOREGROUND = [1, 2, 5, 6, 9, 10, 13, 14]  # the middle columns of a 4x4 grid of patches
PERMUTED = [14, 5, 2, 13, 1, 6, 10, 9]  # where view 1 has them


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """A function that draws what a command line asks for: both files are written -> the Figure."""

    def draw(*argv) -> Figure:
        figures = []
        save = visualize.save

        def keep(figure, out):
            figures.append(figure)
            return save(figure, out)

        with monkeypatch.context() as patch:
            patch.setattr(visualize, "save", keep)
            call(visualize, *argv, "--out", f"{tmp_path}/figures/it")
        for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
            content = (tmp_path / f"figures/it{suffix}").read_bytes()
            assert content.startswith(magic)
            assert len(content) < 200_000
        return figures[0]

    return draw


@pytest.fixture
def archive(tmp_path):
    """Two objects of three views, layers 3 and 7. -> (archive, images, patch features)

    View 1 of "a" is view 0 with its foreground patches permuted.
    """
    torch.manual_seed(0)
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    patch = torch.randn(6, 16, 16)
    patch[1][PERMUTED] = patch[0][FOREGROUND]
    alpha = torch.zeros(6, 16, dtype=torch.uint8)
    alpha[:, FOREGROUND] = 255
    alpha[:, 0] = 127  # just under half: background
    azimuths = torch.tensor([0, 50, 200.0]).deg2rad()
    mean, logvar = SpaceToDepth(4).encode(images)
    rows = {
        "latent_mean": mean.half(),
        "latent_logvar": logvar.half(),
        "cls": torch.randn(6, 8).half(),
        "patch": patch.half(),
        "alpha": alpha,
        "pose": look_at(1.2, azimuths, 2.0).float().repeat(2, 1, 1),
        "view": torch.tensor([0, 1, 2, 0, 1, 2]),
        "view_offset": torch.tensor([0, 3, 6]),
    }
    manifest = {
        "format": ARCHIVE_FORMAT,
        "objects": ["a", "b"],
        "val_fraction": 0.5,
        "image_size": 16,
        "encoder": {
            "name": "vit",
            "weights": "random",
            "layers": [3, 7],
            "image_size": 64,
            "pca": None,
            "cls_dim": 8,
            "feature_dim": 16,
            "tokens": 16,
            "sha256": "",
        },
        "codec": pretrained.codec_spec(SpaceToDepth(4)),
    }
    root = tmp_path / "archive"
    root.mkdir()
    save_shard(root / "00000.safetensors", rows)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root, images, patch.half().double()


def edit_encoder(root, **changes):
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["encoder"].update(changes)
    (root / "manifest.json").write_text(json.dumps(manifest))


def edit_rows(root, edit):
    """Rewrite the shard after edit(rows)."""
    rows = load_file(root / "00000.safetensors")
    edit(rows)
    save_shard(root / "00000.safetensors", rows)


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def score(run, step, lpips, flags: dict | None = None, **changed) -> dict:
    """A line of evaluate.py's about a checkpoint of a run."""
    run_args = {
        "out": str(run),
        "t_sampling": "gaussian",
        "t_mean": 1000,
        "t_std": 200,
        "seed": 0,
        "global_batch": 8,
        "amalgamate": True,
        **(flags or {}),
    }
    return {
        "row": "samples",
        "split": "val",
        "seed": 0,
        "step": step,
        "seconds": 60.0 * step,
        "lpips": lpips,
        "checkpoint": f"{run}/step_{step:07d}/model.safetensors",
        "run_args": run_args,
        **changed,
    }


# -------------------------------------------------------------------------------- figures 4, 5, 9


def test_matching_joins_what_a_permutation_moved(draw, archive):
    figure = draw("matching", "--archive", archive[0], "--objects", "a")
    (ax,) = figure.axes
    # 50 degrees of azimuth are 46 at this height; the other two pairs have 155 and 119.
    assert ax.get_title() == "a, 46° apart"
    joined = []
    for line in ax.lines:
        cells = np.floor(4 * (line.get_xydata() - [[0, 0], [1, 0]]))  # column, row of both ends
        joined.append(tuple(cells @ [1, 4]))
    assert joined == list(zip(FOREGROUND, PERMUTED, strict=True))


def test_separate_bases_agree_on_a_permutation_and_only_joint_ones_see_a_shift():
    a = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = a * torch.arange(1, 7)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    for separate in (False, True):
        assert torch.equal(order[visualize.match_patches(a, a[order], separate)], torch.arange(20))
    shifted = a + 100  # a joint PCA sees the shift, the paper's separate ones don't
    assert torch.equal(visualize.match_patches(a, shifted, True), torch.arange(20))
    assert not torch.equal(visualize.match_patches(a, shifted), torch.arange(20))


def test_pca_colours_the_foreground_alone(draw, archive):
    root, images, patch = archive
    figure = draw("pca", "--archive", root)
    assert figure.axes[0].get_ylabel().startswith("a, ")
    shown = [ax.images[0].get_array() for ax in figure.axes]
    assert len(shown) == 8
    picture = ((images[0].half().float() + 1) * 127.5).round().permute(1, 2, 0)
    assert np.abs(shown[0].astype(int) - picture.numpy()).max() <= 1
    background = np.setdiff1d(np.arange(16), FOREGROUND)
    for i in (2, 3, 6, 7):
        colours = shown[i].reshape(16, 3)
        assert (colours[background] == 255).all()
        assert (colours[FOREGROUND].min(0) == 0).all()
        assert (colours[FOREGROUND].max(0) == 255).all()
    view_0 = shown[2].reshape(16, 3)
    view_1 = shown[3].reshape(16, 3)
    assert np.array_equal(view_0[FOREGROUND], view_1[PERMUTED])
    deeper_layer = patch[0, FOREGROUND][:, 8:]
    centred = (deeper_layer - deeper_layer.mean(0)).numpy()
    first_component = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    red = view_0[FOREGROUND, 0].astype(float)
    assert abs(np.corrcoef(centred @ first_component, red)[0, 1]) > 0.9999


@pytest.mark.parametrize("command, pictures", [("pca", 4), ("matching", 1)])
def test_what_cannot_be_drawn_is_passed_over_where_nobody_named_it(
    draw, archive, command, pictures
):
    root = archive[0]

    def leave_one_view_of_a(rows):
        rows["alpha"][1:3] = 0

    edit_rows(root, leave_one_view_of_a)
    figure = draw(command, "--archive", root)
    name = figure.axes[0].get_ylabel() or figure.axes[0].get_title()
    assert name.startswith("b, ")
    assert len(figure.axes) == pictures
    with pytest.raises(InputError, match="--objects a: .* four foreground patches"):
        draw(command, "--archive", root, "--objects", "b", "a")


def test_features_that_an_archive_lacks(draw, tmp_path, archive):
    root = archive[0]
    with pytest.raises(InputError, match="--objects c: no two views of it in .*archive"):
        draw("pca", "--archive", root, "--objects", "a", "c")
    edit_encoder(root, pca=16)
    draw("pca", "--archive", root)
    with pytest.raises(InputError, match="no such file"):
        draw("pca", "--archive", tmp_path / "nothing")

    edit_rows(root, lambda rows: rows["alpha"].zero_())
    with pytest.raises(InputError, match="--archive .*archive: no object .* four foreground"):
        draw("matching", "--archive", root)
    edit_rows(root, lambda rows: rows.pop("patch"))
    edit_encoder(root, layers=[], feature_dim=0)
    with pytest.raises(InputError, match="holds no patch features"):
        draw("matching", "--archive", root)


# -------------------------------------------------------------------------------- figures 1, 2, 8


def test_trajectory_has_a_row_a_view_and_a_column_a_timestep(draw, tmp_path):
    x0 = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / "x0.npz"
    np.savez(path, x0=x0, t=np.array([999, 499, 9]))
    figure = draw("trajectory", "--x0", path)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["t = 999", "t = 499", "t = 9", "", "", ""]
    assert np.array_equal(figure.axes[4].images[0].get_array(), x0[1, 1])


def test_figures_1_and_8_name_the_camera_moves(draw, tmp_path):
    moves = sample.camera_moves([90.0, 180.0], [0.0, -20.0], [0.0, 0.3])
    for name in ("cat", "dog"):
        write_sample(tmp_path / name, 2)
        sample.write_transforms(tmp_path / name, moves, 8, 0, 1.85)
    x0 = np.zeros((1, 2, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "cat" / "x0.npz", x0=x0, t=np.array([0]))
    figure = draw("trajectory", "--x0", tmp_path / "cat" / "x0.npz")
    labels = [ax.get_ylabel().replace("\n", " ") for ax in figure.axes]
    assert labels == ["90°", "180°, 20° down, 0.3 away"]

    figure = draw("wild", tmp_path / "cat", tmp_path / "dog")
    titles = [ax.get_title().replace("\n", " ") for ax in figure.axes[:3]]
    assert titles == ["input", "90°", "180°, 20° down, 0.3 away"]
    sample.write_transforms(tmp_path / "dog", moves.flip(0), 8, 0, 1.85)
    figure = draw("wild", tmp_path / "cat", tmp_path / "dog")
    assert [ax.get_title() for ax in figure.axes[:3]] == ["input", "view 0", "view 1"]

    for name in ("cat", "dog"):  # as sample.py wrote it before it named the moves
        (tmp_path / name / "transforms.json").write_text('{"frames": [{}, {}]}')
    figure = draw("wild", tmp_path / "cat", tmp_path / "dog")
    assert [ax.get_title() for ax in figure.axes[:3]] == ["input", "view 0", "view 1"]

    (tmp_path / "dog" / "transforms.json").write_text("{}")
    with pytest.raises(InputError, match="transforms.json: not from sample.py"):
        draw("wild", tmp_path / "cat", tmp_path / "dog")


@pytest.mark.parametrize("name", ["torn", "none", "flat", "short"])
def test_trajectories_that_cannot_be_read(draw, tmp_path, name):
    x0 = np.zeros((3, 2, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "flat.npz", x0=x0[0], t=np.array([999]))
    np.savez(tmp_path / "short.npz", x0=x0, t=np.array([999]))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "short.npz").read_bytes()[:100])
    with pytest.raises(InputError, match=f"--x0 .*{name}.npz: not from"):
        draw("trajectory", "--x0", tmp_path / f"{name}.npz")


def test_timesteps_histograms_sum_to_one_and_follow_their_densities(draw):
    left, right = draw("timesteps").axes
    means = [(1000, 200), (700, 200), (500, 200), (300, 200), (0, 200)]
    stds = [(1000, 100), (1000, 200)]
    for ax, settings in ((left, means), (right, stds)):
        assert len(ax.lines) == 10
        for i, setting in enumerate(settings):
            density = ax.lines[2 * i].get_ydata()
            drawn = ax.lines[2 * i + 1].get_ydata()  # in 20 bins of 50 timesteps
            assert np.allclose(density, timestep_density("gaussian", *setting))
            assert abs(density.sum() - 1) < 1e-9
            assert abs(50 * drawn.sum() - 1) < 1e-6
            assert np.abs(drawn - density.reshape(20, 50).mean(1)).max() < 1e-4


def write_sample(folder, views: int):
    """What sample.py writes: input.png, 000.png ..., grid.png; grey levels 0, 60, 120 in red."""
    folder.mkdir(parents=True)
    for i, name in enumerate(["input", "000", "001"][: 1 + views]):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / f"{name}.png")
    Image.new("RGB", (80, 8)).save(folder / "grid.png")


def test_wild_puts_the_input_before_the_views(draw, tmp_path):
    write_sample(tmp_path / "cat", 2)
    write_sample(tmp_path / "dog", 1)
    figure = draw("wild", tmp_path / "cat", tmp_path / "dog")
    shown = [ax.images[0].get_array()[0, 0, 0] for ax in figure.axes]
    assert shown == [0, 60, 120, 0, 60]
    assert [ax.get_title() for ax in figure.axes] == ["input", "view 0", "view 1", "", ""]
    labels = [ax.get_ylabel() for ax in figure.axes]
    out = tmp_path.name
    expected = [f"{out}/cat", "", "", f"{out}/dog", ""]
    assert [label.replace("\n", "") for label in labels] == expected
    for label in labels:  # a longer line would overlap the next row's
        assert all(len(line) <= 20 for line in label.split("\n"))
    with pytest.raises(InputError, match="input.png: "):
        draw("wild", tmp_path)


def test_wild_tells_models_apart(draw, tmp_path):
    write_sample(tmp_path / "ours" / "cat", 2)
    write_sample(tmp_path / "baseline" / "cat", 2)
    figure = draw("wild", tmp_path / "ours" / "cat", tmp_path / "baseline" / "cat")
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["ours/cat", "baseline/cat"]


# ----------------------------------------------------------------------------------- figures 6, 7


def test_sweep_takes_each_runs_last_score_and_groups_seeds(draw, tmp_path):
    path = tmp_path / "eval.jsonl"
    lines = [
        score("m700_0", 10, 0.9, {"t_mean": 700}),
        score("m700_0", 20, 0.2, {"t_mean": 700}),
        {"row": "white", "lpips": 0.9},
        score("m700_1", 20, 0.4, {"t_mean": 700, "seed": 1}),
        score("base", 20, 0.1),
        score("uniform", 20, 0.7, {"t_sampling": "uniform"}),
        {"step": 20, "run_args": {"out": "a"}},
        score("elsewhere", 20, 0.6, {"t_mean": 500, "t_std": 500}),
        score("s500", 20, 0.5, {"t_std": 500}),
        score("plain", 20, 0.8, {"amalgamate": False}),
    ]
    write_lines(path, lines)
    with pytest.raises(InputError, match="train.amalgamate false and true don't compare"):
        draw("sweep", "--eval", path)
    figure = draw("sweep", "--eval", path, "--where", "amalgamate=True")
    by_mean, by_std = (ax.containers[0] for ax in figure.axes)
    assert points_and_bars(by_mean) == ([(700, 0.3), (1000, 0.1)], [0.02**0.5, 0])
    assert points_and_bars(by_std) == ([(200, 0.1), (500, 0.5)], [0, 0])


def points_and_bars(container):
    """(the points, half the bars' lengths) of matplotlib's errorbar, to be compared with ==."""
    line, _, (bars,) = container
    points = [pytest.approx(tuple(point)) for point in line.get_xydata()]
    lengths = [np.ptp(bar[:, 1]) / 2 for bar in bars.get_segments()]
    return points, pytest.approx(lengths)


def test_sweep_refuses_other_evaluations_and_unknown_metrics(draw, tmp_path):
    path = tmp_path / "eval.jsonl"
    write_lines(path, [score("a", 20, 0.2), score("b", 20, 0.3, split="train")])
    with pytest.raises(InputError, match='split "train" and "val" don\'t compare'):
        draw("sweep", "--eval", path)
    with pytest.raises(InputError, match="--metric fid: .*eval.jsonl"):
        draw("sweep", "--eval", path, "--where", "split=val", "--metric", "fid")


def test_sweep_refuses_runs_at_different_steps_and_with_other_flags(draw, tmp_path):
    path = tmp_path / "eval.jsonl"
    lines = [score("a", 10, 0.2), score("a", 20, 0.1), score("b", 10, 0.3, {"seed": 1})]
    write_lines(path, lines)
    with pytest.raises(InputError, match="--eval: step 10 and 20 don't compare; choose by --where"):
        draw("sweep", "--eval", path)
    figure = draw("sweep", "--eval", path, "--where", "step=10")
    assert np.allclose(figure.axes[0].containers[0][0].get_ydata(), [0.25])
    write_lines(path, [score("a", 20, 0.1, {"lr": 1e-4}), score("b", 20, 0.3, {"lr": 1e-3})])
    with pytest.raises(InputError, match="--eval: train.lr 0.0001 and 0.001 don't compare"):
        draw("sweep", "--eval", path)


def test_where_is_the_evaluations_before_trainings(tmp_path):
    path = tmp_path / "eval.jsonl"
    flags = {"steps": 1200, "seed": 1, "t_std": 200.0, "lr": 1e-4}
    write_lines(path, [score("a", 20, 0.2, flags, steps=2), score("b", 20, 0.3, flags, steps=3)])

    def chosen(*where) -> list[str]:
        return [line["train.out"] for line in scores.read_scores([path], where, ())]

    assert chosen("steps=2") == ["a"]
    assert chosen("steps=1200") == []
    assert chosen("train.steps=1200") == ["a", "b"]
    assert chosen("seed=0") == ["a", "b"]
    assert chosen("train.seed=1") == ["a", "b"]
    assert chosen("train.seed=0") == []
    assert chosen("steps=3.0") == ["b"]
    assert chosen("t_std=200", "lr=0.0001", "amalgamate=True", "out=b") == ["b"]


def test_sweep_wants_runs_on_its_axes(draw, tmp_path):
    path = tmp_path / "eval.jsonl"
    write_lines(path, [score("a", 20, 0.2, {"t_mean": 500, "t_std": 500})])
    with pytest.raises(InputError, match="--metric lpips: .* std 200 or mean 1000"):
        draw("sweep", "--eval", path)


def test_curves_mean_and_spread_over_runs(draw, tmp_path):
    def line(step, seconds, loss):
        return {"step": step, "seconds": seconds, "samples": 8 * step, "loss": loss}

    a0 = tmp_path / "a0"
    a1 = tmp_path / "a1"
    write_lines(a0 / "log.jsonl", [line(10, 600.0, 4.0), line(20, 1200.0, 2.0)])
    write_lines(a1 / "log.jsonl", [line(10, 300.0, 6.0), line(20, 600.0, 3.0)])
    with open(a0 / "log.jsonl", "a") as log:
        log.write('{"step": 30, "seconds": 18')  # the last line of a log that is being written
    (ax,) = draw("curves", f"both={a0},{a1}", "--metric", "loss").axes
    assert np.allclose(ax.lines[0].get_xydata(), [[7.5, 5], [15, 2.5]])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band.max(), 5 + 2**0.5)
    assert np.isclose(band.min(), 2.5 - 0.5**0.5)
    assert ax.get_xlabel() == "training time (min)"
    assert ax.get_legend().get_texts()[0].get_text() == "both: loss (n = 2)"
    (ax,) = draw("curves", a0, "--x", "samples", "--metric", "loss").axes
    assert np.allclose(ax.lines[0].get_xydata(), [[80, 4], [160, 2]])
    with pytest.raises(InputError, match="--metric nothing: .*a0 has no such metric"):
        draw("curves", a0, "--metric", "nothing")


@pytest.fixture
def drawn_metrics(draw, tmp_path):
    """A function that draws curves -> their metrics. Runs: a; b, with val_loss_ema; c, longer."""
    lines = [{"step": i, "seconds": 60.0 * i, "samples": 8 * i, "loss": 1.0} for i in (1, 2)]
    write_lines(tmp_path / "a/log.jsonl", lines)
    write_lines(tmp_path / "b/log.jsonl", [*lines, {**lines[0], "val_loss_ema": 2.0}])
    write_lines(tmp_path / "c/log.jsonl", [{**line, "step": 9} for line in lines])

    def drawn_metrics(names: str, *flags) -> list[str]:
        runs = ",".join(f"{tmp_path}/{name}" for name in names)
        (ax,) = draw("curves", f"label={runs}", *flags).axes
        return [text.get_text().split()[1] for text in ax.get_legend().get_texts()]

    return drawn_metrics


def test_curves_draw_what_there_is(drawn_metrics):
    assert drawn_metrics("b") == ["loss", "val_loss_ema"]
    assert drawn_metrics("a") == ["loss"]
    assert drawn_metrics("ab") == ["loss"]
    with pytest.raises(InputError, match="--metric val_loss_ema: .*/a has no such metric"):
        drawn_metrics("ba", "--metric", "val_loss_ema")
    with pytest.raises(InputError, match="--metric loss: .*/a,.*/c have it at no common step"):
        drawn_metrics("ac")
    with pytest.raises(InputError, match="--where step=1: .* --eval"):
        drawn_metrics("a", "--where", "step=1")


def test_curves_of_scores_draw_one_metric(drawn_metrics, tmp_path):
    path = tmp_path / "eval.jsonl"
    write_lines(path, [score(tmp_path / "a", step, None, psnr=9.0) for step in (1, 2)])
    assert drawn_metrics("a", "--eval", path) == ["psnr"]
    write_lines(path, [score(tmp_path / "a", step, 0.5, psnr=9.0) for step in (1, 2)])
    assert drawn_metrics("a", "--eval", path) == ["lpips"]
    with pytest.raises(InputError, match="--metric lpips: .*/b has no such metric"):
        drawn_metrics("b", "--eval", path)


def test_curves_of_scores_belong_to_their_run(draw, tmp_path):
    path = tmp_path / "eval.jsonl"
    command = ("curves", tmp_path / "a", "--metric", "lpips", "--eval", path)

    def points(*flags):
        return draw(*command, *flags).axes[0].lines[0].get_xydata()

    lines = [
        score(tmp_path / "a", 1, 0.5),
        score(tmp_path / "a", 2, 0.3),
        score(tmp_path / "ab", 2, 0.1),
    ]
    write_lines(path, lines)
    assert np.allclose(points(), [[1, 0.5], [2, 0.3]])
    # "samples" of a line are those drawn for a pair, not those seen in training.
    write_lines(path, [{**line, "samples": 3} for line in lines])
    assert np.allclose(points("--x", "samples"), [[8, 0.5], [16, 0.3]])
    # Training may have been given a relative --out.
    write_lines(path, [score(f"./{tmp_path.name}/a/", 3, 0.7), score(".", 3, 0.7)])
    assert np.allclose(points(), [[3, 0.7]])


def test_logs_that_cannot_be_drawn(draw, tmp_path):
    log = tmp_path / "log.jsonl"
    with pytest.raises(InputError, match="log.jsonl: .*No such file"):
        draw("curves", tmp_path)
    log.write_text("")
    with pytest.raises(InputError, match="--metric loss: .* has no such metric"):
        draw("curves", tmp_path)
    write_lines(log, [{"step": 1, "seconds": 1.0, "val_loss": 2.0, "skipped": 3, "ok": True}])
    (ax,) = draw("curves", tmp_path, "--metric", "val_loss", "skipped").axes
    assert [line.get_ydata().tolist() for line in ax.lines] == [[2], [3]]
    with pytest.raises(InputError, match="--metric ok"):
        draw("curves", tmp_path, "--metric", "ok")


def test_files_that_cannot_be_read_or_written(draw, tmp_path):
    file = Path(tmp_path, "file")
    file.write_text("{not json}")
    with pytest.raises(InputError, match="file: unreadable"):
        draw("sweep", "--eval", file)
    with pytest.raises(InputError, match="file/it.png: could not be written"):
        visualize.save(Figure(), f"{file}/it")
