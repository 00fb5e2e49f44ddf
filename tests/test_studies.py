"""studies: consistency.py, steps.py, pose_mlp.py: what they measure, print, write and refuse."""

import json

import pytest
import torch
from helpers import call
from PIL import Image

import data
import model
from lib.cli import InputError
from studies import consistency, pose_mlp, steps, table
from tools import shapes
from tools.shapes import look_at


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------- consistency


def test_warping_by_the_true_depth_finds_the_same_surface(tmp_path):
    """Neighbouring true views agree where both see; other objects' views do not."""
    shapes.shapes(tmp_path / "orbit", 2, 12, 48, 3, "cpu", 0, orbit=True)
    images, depths, w2c = consistency.load_orbit(tmp_path / "orbit", "00000", 48)
    others, _, _ = consistency.load_orbit(tmp_path / "orbit", "00001", 48)
    same, both = consistency.warp(images[0], depths[0], w2c[0], depths[0], w2c[0])
    torch.testing.assert_close(same[:, both], images[0][:, both], atol=1e-4, rtol=0)
    assert torch.equal(both, depths[0] > 0)
    true = consistency.agreement(images, depths, w2c)
    mixed = images.clone()
    mixed[1::2] = others[1::2]
    assert true > 18
    assert true > consistency.agreement(mixed, depths, w2c) + 4


def test_consistency_writes_a_line_for_each_way_and_seed(run, tmp_path, capsys):
    orbit = tmp_path / "orbit"
    shapes.shapes(orbit, 2, 4, 32, 3, "cpu", 0, orbit=True)
    flags = ["--ckpt", run, "--data", orbit, "--device", "cpu", "--steps", 2, "--scale", 1]
    out = tmp_path / "out.jsonl"
    call(consistency, *flags, "--seeds", 0, 1, "--out", out, "--grid", tmp_path / "grid.png")
    lines = read_jsonl(out)
    expected = [(way, seed) for way in consistency.WAYS for seed in (0, 1)]
    assert [(line["way"], line["seed"]) for line in lines] == expected
    assert len({line["psnr"] for line in lines}) == len(lines)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(consistency.WAYS)
    assert "nan" not in printed
    Image.open(tmp_path / "grid.png").verify()
    # A seed's line does not depend on the other seeds; --seed is --seeds.
    call(consistency, *flags, "--seed", 1, "--out", tmp_path / "new" / "one.jsonl")
    alone = read_jsonl(tmp_path / "new" / "one.jsonl")
    assert alone == [line for line in lines if line["seed"] == 1]

    (orbit / "00001" / "002_depth.npy").unlink()
    with pytest.raises(InputError, match="002_depth.npy"):
        call(consistency, *flags, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "views, words",
    [
        (1, "00000 has 1 view"),
        (2, "00000 has 2 view"),
        (3, "neighbouring views of no orbit"),
    ],
)
def test_consistency_of_orbits_that_show_too_little(run, tmp_path, views, words):
    orbit = tmp_path / "orbit"
    call(shapes, "--out", orbit, "--objects", 1, "--views", views, "--size", 32, "--orbit")
    with pytest.raises(InputError, match=f"--data .*/orbit: {words}"):
        call(consistency, "--ckpt", run, "--data", orbit, "--out", tmp_path / "x.jsonl")


# ------------------------------------------------------------------------------------------- steps


@pytest.mark.slow
def test_steps_measures_each_way_at_each_number_of_steps(run, tree, tmp_path, capsys):
    flags = ["--ckpt", run, "--data", tree, "--device", "cpu", "--pairs", 2, "--scale", 1]
    call(steps, *flags, "--steps", 4, 2, 200, "--out", tmp_path / "steps")
    lines = read_jsonl(tmp_path / "steps.jsonl")
    expected = [(count, way) for count in (2, 4, 200) for way in steps.WAYS]
    assert [(line["steps"], line["way"]) for line in lines] == expected
    by_setting = {(line["way"], line["steps"]): line for line in lines}
    # Without noise 200 steps of DDIM are what the others are held against: no error.
    assert by_setting["DDIM, eta 0", steps.CONVERGED]["to_converged"] == 100
    assert by_setting["DDIM, eta 0", 2]["to_converged"] < 60
    assert by_setting["DDIM, eta 1", 4]["to_converged"] is None
    Image.open(tmp_path / "steps.png").verify()
    assert (tmp_path / "steps.pdf").read_bytes().startswith(b"%PDF")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["2", "4", "200"]


# -------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("study", [consistency, steps])
@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("--steps", 0, "--steps 0"),
        ("--steps", 1001, "--steps 1001"),
        ("--out", "file/x", "could not be writ"),
    ],
)
def test_wrong_flags_fail_before_the_hour(study, tmp_path, flag, value, words):
    (tmp_path / "file").touch()
    flags = {"--ckpt": "none", "--data": "none", "--out": tmp_path / "x"}
    flags[flag] = tmp_path / value if flag == "--out" else value
    with pytest.raises(InputError, match=words):
        call(study, *[word for pair in flags.items() for word in pair])


@pytest.mark.parametrize("study, name", [(consistency, "x.jsonl"), (steps, "x")])
def test_results_of_before_outlive_a_failure(study, name, tmp_path):
    (tmp_path / "x.jsonl").write_text("kept")
    flags = ["--ckpt", tmp_path / "none", "--data", "none", "--device", "cpu"]
    with pytest.raises(InputError, match="none"):
        call(study, *flags, "--out", tmp_path / name)
    assert (tmp_path / "x.jsonl").read_text() == "kept"


# ------------------------------------------------------------------------------------------- table


def table_line(t_sampling: str, seed: int, psnr: float) -> dict:
    """A line of evaluate.py's, of a run with this timestep sampling and seed."""
    run = f"{t_sampling}{seed}"
    return {
        "row": "samples",
        "step": 5,
        "psnr": psnr,
        "ssim": None,
        "mse": 0.1,
        "lpips": None,
        "checkpoint": run,
        "run_args": {
            "t_sampling": t_sampling,
            "t_mean": 1000,
            "t_std": 200,
            "amalgamate": True,
            "seed": seed,
            "out": run,
            "global_batch": 8,
        },
    }


def test_the_ablation_table_averages_over_seeds(tmp_path, capsys):
    lines = [
        table_line("uniform", 0, 10.0),
        table_line("uniform", 1, 12.0),
        table_line("gaussian", 0, 13.0),
    ]
    earlier_checkpoint = {**lines[0], "step": 1, "psnr": 99.0}
    baseline = {"row": "white", "psnr": 5.0, "mse": 1.0}
    path = tmp_path / "eval.jsonl"
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, earlier_checkpoint, baseline])
    )
    call(table, "--eval", path, "--by", "t_sampling")
    printed = capsys.readouterr().out
    assert "| uniform | samples | 2 | 11 ± 1.4 | 0.1 ± 0 |" in printed
    assert "| gaussian | samples | 1 | 13 | 0.1 |" in printed
    assert "|  | white | 1 | 5 | 1 |" in printed

    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(
        "".join(json.dumps({**line, "steps": i}) + "\n" for i, line in enumerate(lines[:2]))
    )
    with pytest.raises(InputError, match="steps 0 and 1 don.t compare"):
        call(table, "--eval", mixed)
    with pytest.raises(InputError, match="--by lr"):
        call(table, "--eval", path, "--by", "lr")


@pytest.mark.parametrize(
    "variant, layers, inputs",
    [
        ("as_it_is", 2, 36),
        ("no_sines", 2, 4),
        ("one_frequency", 2, 12),
        ("two_hidden_layers", 3, 36),
        ("no_hidden_layer", 1, 36),
        ("linear", 1, 4),
        ("no_token", 2, 36),
        ("absolute", 2, 54),
    ],
)
def test_variants_of_the_pose_mlp(monkeypatch, variant, layers, inputs):
    """Each has the MLP that it says. In all but one the context token holds the camera move."""
    for owner, name in (
        (model, "POSE_FREQUENCIES"),
        (model, "POSE_FEATURES"),
        (model, "pose_features"),
        (model, "make_pose_mlp"),
        (model.NovelViewModel, "embed_condition"),
        (data, "relative_pose"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that it is put back
    pose_mlp.VARIANTS[variant]()
    network = model.NovelViewModel(
        cls_dim=8,
        context_dim=8,
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        num_heads=4,
        latent_size=8,
        pose_embedding="mlp",
    )
    linear = [layer for layer in network.pose_mlp if isinstance(layer, torch.nn.Linear)]
    assert (len(linear), linear[0].in_features) == (layers, inputs)
    torch.nn.init.normal_(linear[-1].weight)  # it is zero at first

    input_view = look_at(1.0, 0.0, 1.8)[None]
    targets = look_at(torch.tensor([1.0, 1.2]), torch.tensor([1.0, 2.0]), 1.6)
    pose = data.relative_pose(input_view, targets).float()
    token, embedding = network.embed_condition(torch.ones(2, 8), pose)
    assert torch.equal(token[0], token[1]) == (variant == "no_token")
    assert not torch.equal(embedding[0], embedding[1])
