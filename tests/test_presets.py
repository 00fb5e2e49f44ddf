"""presets/*.txt: files of flags that a command line takes as @presets/NAME.txt."""

import re

import pytest
from helpers import ROOT, TRAIN, call, parse, raw_weights, steps_with

import precompute_dino
import train
from lib.cli import ArgumentParser, InputError

PRESETS = {path.stem: path for path in sorted(ROOT.glob("presets/*.txt"))}
FROZEN_PRESETS = [name for name in PRESETS if name.startswith("frozen")]
TRAINING_PRESETS = [name for name in PRESETS if not name.startswith("frozen")]

# Each script with what it cannot do without.
PRECOMPUTE = (precompute_dino, "--data", "tree", "--archive", "archive")
TRAIN_ARCHIVED = (train, "--archive", "archive", "--out", "run")
TRAIN_ONLINE = (train, "--online", "--data", "tree", "--out", "run")


def flags_of(preset: str) -> set[str]:
    """The names of the flags that a preset sets, as attributes of the parsed arguments."""
    found = re.findall(r"^--(?:no-)?(\w+)", PRESETS[preset].read_text(), re.M)
    assert len(found) == len(set(found))
    return set(found)


def parse_with(script: tuple, *presets: str, more=()) -> dict:
    module, *required = script
    return vars(parse(module, *required, *(f"@{PRESETS[name]}" for name in presets), *more))


def differences(a: dict, b: dict) -> set[str]:
    return {key for key in a if a[key] != b[key]}


def test_there_are_presets_of_both_kinds():
    assert "paper" in TRAINING_PRESETS
    assert "frozen-dinov2" in FROZEN_PRESETS


@pytest.mark.parametrize("preset", TRAINING_PRESETS)
def test_train_takes_it_and_it_sets_only_what_it_says(preset):
    changed = differences(parse_with(TRAIN_ARCHIVED, preset), parse_with(TRAIN_ARCHIVED))
    assert changed <= flags_of(preset)


@pytest.mark.parametrize("preset", FROZEN_PRESETS)
@pytest.mark.parametrize("script", [PRECOMPUTE, TRAIN_ONLINE], ids=["precompute_dino", "train"])
def test_both_scripts_take_what_is_frozen(preset, script):
    changed = differences(parse_with(script, preset), parse_with(script))
    assert changed <= flags_of(preset)


@pytest.mark.parametrize("preset", FROZEN_PRESETS)
def test_what_is_frozen_is_the_same_in_both_scripts(preset):
    """So that --online trains on what would be archived."""
    archived = parse_with(PRECOMPUTE, preset)
    online = parse_with(TRAIN_ONLINE, preset)
    for flag in flags_of(preset):
        assert archived[flag] == online[flag]


def test_the_papers_recipe_is_the_default():
    assert parse_with(TRAIN_ARCHIVED, "paper") == parse_with(TRAIN_ARCHIVED)


def test_the_papers_recipe_is_what_the_paper_says():
    """A.1, section 3.2."""
    args = parse_with(TRAIN_ARCHIVED, "paper")
    assert args["batch_size"] * args["accumulate"] * 8 == 1536
    assert (args["steps"], args["warmup"]) == (30_000, 200)
    assert (args["lr"], args["lr_min"], args["lr_schedule"]) == (1e-4, 1e-5, "cosine")
    assert (args["t_sampling"], args["t_mean"], args["t_std"]) == ("gaussian", 1000, 200)
    assert args["weight_decay"] == 0.01
    assert args["amalgamate"]


@pytest.mark.parametrize(
    "row, next_row, changed",
    [
        ("table1-uniform", "table1-gaussian", {"t_sampling"}),
        ("table1-gaussian", "table1-amalgamate", {"amalgamate"}),
    ],
)
def test_a_row_of_table_1_changes_one_thing(row, next_row, changed):
    before = parse_with(TRAIN_ARCHIVED, row)
    after = parse_with(TRAIN_ARCHIVED, next_row)
    assert differences(before, after) == changed


def test_flags_behind_a_preset_override_it():
    args = parse_with(TRAIN_ARCHIVED, "small", more=["--width", 96])
    assert args["width"] == 96
    assert args["heads"] == parse_with(TRAIN_ARCHIVED, "small")["heads"]


def test_a_preset_may_hold_comments_and_several_values_a_flag(tmp_path):
    (tmp_path / "preset.txt").write_text("# a comment\n--mult 1 2 # another\n\n--name 'a b'\n")
    parser = ArgumentParser()
    parser.add_argument("--mult", type=int, nargs="+")
    parser.add_argument("--name")
    args = parser.parse_args([f"@{tmp_path / 'preset.txt'}"])
    assert args.mult == [1, 2]
    assert args.name == "a b"


def test_a_preset_that_is_not_there_is_named():
    with pytest.raises(InputError, match="presets/none.txt"):
        parse(train, "@presets/none.txt")


@pytest.mark.slow
def test_the_small_presets_train_together(tree, tmp_path):
    """A step on an archive of frozen-small; the model has the size that the preset says."""
    archive = tmp_path / "archive"
    out = tmp_path / "run"
    frozen = [f"@{PRESETS['frozen-small']}", "--device", "cpu", "--workers", 0]
    call(precompute_dino, *frozen, "--data", tree, "--archive", archive)
    flags = [*TRAIN, f"@{PRESETS['small']}", "--batch_size", 2, "--steps", 1]
    call(train, "--archive", archive, "--out", out, *flags)
    assert steps_with(out, "loss") == [1]
    parameters = sum(weight.numel() for weight in raw_weights(out, 1).values())
    [millions] = re.findall(r"([\d.]+) M parameters", PRESETS["small"].read_text())
    assert f"{parameters / 1e6:.1f}" == millions
