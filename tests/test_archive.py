"""precompute_dino.py and data.Archive: what archives hold, how they are written, refusals."""

import functools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import FROZEN, SMALL, VIT, assert_close_shards, call, script, weights
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import data
import precompute_dino
import pretrained
import sample
import train
from lib import archives, images
from lib.autoencoder import AutoencoderKL
from lib.cli import InputError
from tools import shapes

ARCHIVE = [*FROZEN, "--workers", 0, "--precision", "fp32"]
TRAIN = [*SMALL, "--steps", 2, "--batch_size", 4, "--accumulate", 1, "--save_every", 2]
TRAIN += ["--val_every", 0, "--preview_every", 0]


def copied(tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tree, tmp_path / "tree"))


# ------------------------------------------------------------------------------------ what it holds


def test_archive_holds_what_the_encoders_give_online(tree, archive):
    manifest = archives.read_manifest(archive)
    own = load_file(archive / "frozen.safetensors")
    encoder = pretrained.open_encoder(manifest["encoder"], tensors=own)
    codec = pretrained.open_codec(manifest["codec"])
    shard = load_file(archive / "00000.safetensors")
    assert shard["view_offset"].tolist() == list(range(0, 49, 4))
    for row, name, view in ((0, "00000", 0), (47, "00011", 3), (18, "00004", 2)):
        image, alpha = images.load_image(tree / name / f"{view:03d}.png", 32)
        for key, value in pretrained.encode(image[None], encoder, codec).items():
            torch.testing.assert_close(shard[key][row].float(), value[0], atol=2e-3, rtol=2e-3)
        pose = data.read_pose(tree / name / f"{view:03d}.npy")
        np.testing.assert_allclose(shard["pose"][row], pose, atol=1e-6)
        cover = shard["alpha"][row].float().mean() / 255
        assert cover == pytest.approx(alpha.mean().item(), abs=3e-3)
        assert shard["view"][row] == view


def test_features_are_normalised_layer_by_layer(archive):
    patch = load_file(archive / "00000.safetensors")["patch"].float().unflatten(-1, (2, 192))
    mean = patch.mean(-1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=2e-3, rtol=0)
    variance = patch.var(-1, correction=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=2e-2, rtol=0)


def test_a_batch_is_the_rows_of_its_pairs(archive):
    pairs = data.Archive(archive, "train", seed=3)
    shard = load_file(archive / "00000.safetensors")
    batch = pairs[[4, 25]]
    for row, position in enumerate((4, 25)):
        epoch, index = data.object_at(position, 3, len(pairs))
        cond, target = data.draw_pair(3, epoch, index, 4)
        cond_row = int(pairs.names[index]) * 4 + cond
        target_row = int(pairs.names[index]) * 4 + target
        assert torch.equal(batch["latent"][row], shard["latent_mean"][cond_row])
        assert torch.equal(batch["cls"][row], shard["cls"][cond_row])
        assert torch.equal(batch["patch"][row], shard["patch"][cond_row])
        assert torch.equal(batch["target_mean"][row], shard["latent_mean"][target_row])
        assert torch.equal(batch["target_logvar"][row], shard["latent_logvar"][target_row])
        move = data.relative_pose(shard["pose"][cond_row], shard["pose"][target_row])
        assert torch.equal(batch["pose"][row], move)


def test_without_amalgamation_no_patch_feature_is_read(archive):
    assert "patch" in data.Archive(archive, "train")[[0]]
    assert "patch" not in data.Archive(archive, "train", patch=False)[[0]]


def test_an_image_is_found_by_its_files_number(tree, tmp_path):
    """Whatever the numbers are, and though all views have one pose and one was left out."""
    root = copied(tree, tmp_path)
    folder = root / "00003"
    pose = np.load(folder / "000.npy")
    for view, number in enumerate(("005", "007", "100", "2000")):
        (folder / f"{view:03d}.png").rename(folder / f"{number}.PNG")
        (folder / f"{view:03d}.npy").unlink()
        np.save(folder / f"{number}.npy", pose)
    (folder / "007.PNG").write_bytes(b"")
    call(precompute_dino, "--data", root, "--archive", tmp_path / "a", *ARCHIVE, "--skip_bad")
    pairs = data.Archive(tmp_path / "a", "train", 0, str(root))
    for view, original in enumerate((0, 2, 3)):
        image, _ = images.load_image(tree / "00003" / f"{original:03d}.png", 32)
        assert torch.equal(pairs.image(3, view), image)
    (folder / "100.PNG").unlink()
    with pytest.raises(InputError, match="--data .*00003: no image 100 in it"):
        pairs.image(3, 1)


def is_shared(batch: dict) -> bool:
    return batch["cls"].is_shared() and batch["target_mean"].is_shared()


def test_a_workers_batch_is_made_in_shared_memory(archive):
    pairs = data.Archive(archive, "train")
    assert not is_shared(pairs[[0, 1]])
    # collate_fn runs in the worker, before the batch is sent.
    loader = DataLoader(pairs, None, sampler=[[0, 1]], num_workers=1, collate_fn=is_shared)
    assert list(loader) == [True]


def test_maps_are_let_go_now_and_then_and_nothing_changes(archive, monkeypatch):
    pairs = data.Archive(archive, "train")
    expected = [pairs[[position, position + 1]] for position in range(0, 20, 2)]
    monkeypatch.setattr(data, "RELEASE_EVERY", 5)
    maps = set()
    for position, batch in zip(range(0, 20, 2), expected, strict=True):
        found = pairs[[position, position + 1]]
        maps.add(id(pairs.maps[0].tensors["cls"]))
        assert all(torch.equal(found[key], batch[key]) for key in batch)
    assert len(maps) > 1


# -------------------------------------------------------------------------------- how it is written


def test_archiving_resumes_and_rank_count_changes_nothing(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_OBJECTS", 5)
    flags = ["--data", tree, "--archive", tmp_path / "a", *ARCHIVE]
    call(precompute_dino, *flags)
    shards = sorted((tmp_path / "a").glob("0*.safetensors"))
    before = {path.name: path.read_bytes() for path in shards}
    assert len(before) == 3
    kept = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    call(precompute_dino, *flags)
    assert shards[0].stat().st_mtime_ns == kept
    assert {path.name: path.read_bytes() for path in shards} == before
    assert len(data.Archive(tmp_path / "a", "train")) == 9
    assert len(data.Archive(tmp_path / "a", "val")) == 3


def test_the_bar_has_a_total(tree, tmp_path, capsys):
    call(precompute_dino, "--data", tree, "--archive", tmp_path / "a", *ARCHIVE)
    printed = capsys.readouterr().err
    assert "archiving: 100%" in printed
    assert "48/48" in printed


@pytest.mark.slow
def test_torchrun_archives_the_same(tree, archive, tmp_path):
    shutil.copytree(archive, tmp_path / "a")
    (tmp_path / "a" / "00000.safetensors").unlink()
    script("precompute_dino", "--data", tree, "--archive", tmp_path / "a", *ARCHIVE, nproc=2)
    ours = load_file(archive / "00000.safetensors")
    theirs = load_file(tmp_path / "a" / "00000.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_what_rank_0_refuses_every_rank_refuses(tree, archive):
    flags = ["--data", tree, "--archive", archive, *ARCHIVE, "--encoder_size", 32]
    done = script("precompute_dino", *flags, nproc=2, check=False)
    assert f"error: --encoder_size 32: {archive / 'manifest.json'} says 64" in done.stderr
    assert "Connection closed" not in done.stderr  # what a rank would say that waits for rank 0


@pytest.mark.slow
def test_compiled_encoders_archive_the_same(tree, archive, tmp_path, monkeypatch):
    """By aot_eager, without inductor's code. The second batch has 12 views in place of 36."""
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    shutil.copytree(archive, tmp_path / "a")
    (tmp_path / "a" / "00000.safetensors").unlink()
    flags = ["--data", tree, "--archive", tmp_path / "a", *ARCHIVE]
    # Code is made once, for whole batches: a short one would have it made again.
    with torch._dynamo.config.patch(error_on_recompile=True):
        call(precompute_dino, *flags, "--batch_size", 36, "--compile")
    assert_close_shards(tmp_path / "a", archive, 2e-3)


def test_fp8_and_pca(tree, tmp_path, capsys):
    flags = ["--data", tree, "--archive", tmp_path / "a", *ARCHIVE]
    call(precompute_dino, *flags, "--patch_dtype", "fp8", "--pca", 64)
    printed = capsys.readouterr().out
    compact = load_file(tmp_path / "a" / "00000.safetensors")["patch"]
    assert compact.dtype == torch.float8_e4m3fn
    assert compact.shape[2] == 64

    own = load_file(tmp_path / "a" / "frozen.safetensors")
    spec = archives.read_manifest(tmp_path / "a")["encoder"]
    encoder = pretrained.open_encoder(spec, tensors=own)
    image, _ = images.load_image(tree / "00002" / "001.png", 32)
    row = compact[9].float()
    projected = encoder(image[None])[1][0]
    assert (row - projected).norm() / projected.norm() < 0.04  # e4m3 has 3 bits of mantissa

    exact = encoder.features(image[None])[1][0]
    error = (row @ encoder.pca.T + encoder.pca_mean - exact).norm() / exact.norm()
    told = re.search(r"of the foreground.*? ([\d.]+)% relative", printed, re.DOTALL)
    # What was printed is of eight objects, this is of one view.
    assert 0.3 < error.item() * 100 / float(told[1]) < 3

    call(train, "--archive", tmp_path / "a", "--out", tmp_path / "run", *TRAIN)
    assert weights(tmp_path / "run", 2)["unet.amalgamation.weight"].shape[1] == 64


@pytest.mark.slow
def test_the_vae_as_codec(tree, tmp_path):
    """--codec sd from a file: archived moments are the VAE's; training and sampling run on them."""
    torch.manual_seed(0)
    vae = AutoencoderKL(32, (1, 1), 1)
    tensors = {f"first_stage_model.{name}": value for name, value in vae.state_dict().items()}
    torch.save(tensors, tmp_path / "vae.ckpt")
    flags = ["--data", tree, "--archive", tmp_path / "a", *ARCHIVE]
    call(precompute_dino, *flags, "--codec", "sd", "--vae", tmp_path / "vae.ckpt")
    shard = load_file(tmp_path / "a" / "00000.safetensors")
    path = tree / "00001" / "002.png"
    with torch.no_grad():
        mean, logvar = vae.encode(images.load_image(path, 32)[0][None])
    torch.testing.assert_close(shard["latent_mean"][6].float(), mean[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(shard["latent_logvar"][6].float(), logvar[0], atol=2e-3, rtol=2e-3)
    flags = ["--archive", tmp_path / "a", "--out", tmp_path / "run", *TRAIN]
    call(train, *flags, "--preview_every", 2)
    assert (tmp_path / "run" / "previews" / "step_0000002.png").exists()
    flags = ["--ckpt", tmp_path / "run", "--image", path, "--steps", 2, "--device", "cpu"]
    call(sample, *flags, "--vae", tmp_path / "vae.ckpt", "--out", tmp_path / "views")
    assert Image.open(tmp_path / "views" / "002" / "000.png").size == (32, 32)


# ---------------------------------------------------------------------------------------- bad input


def spoil(root: Path, what: str) -> str:
    """Makes one thing wrong with a tree. Returns what an error must name."""
    image = root / "00001" / "002.png"
    pose = root / "00001" / "002.npy"
    if what == "truncated":
        image.write_bytes(image.read_bytes()[:200])
        return str(image)
    if what == "empty":
        shutil.rmtree(root)
        root.mkdir()
        return str(root)
    np.save(pose, {"nan": np.full((3, 4), np.nan), "shape": np.eye(4)}[what])
    return str(pose)


@pytest.mark.parametrize("what", ["truncated", "nan", "shape", "empty"])
@pytest.mark.parametrize("reader", ["archive", "online"])
def test_a_bad_file_is_named(tree, tmp_path, what, reader):
    root = copied(tree, tmp_path)
    named = spoil(root, what)
    flags = ["--data", root, *FROZEN, "--workers", 0]
    with pytest.raises(InputError, match=re.escape(named)):
        if reader == "archive":
            call(precompute_dino, *flags, "--archive", tmp_path / "a")
        else:
            call(train, "--online", *flags, *TRAIN, "--steps", 20, "--out", tmp_path / "run")


def test_skip_bad_counts_and_names(tree, tmp_path, capsys):
    root = copied(tree, tmp_path)
    named = spoil(root, "truncated")
    call(precompute_dino, "--data", root, "--archive", tmp_path / "a", *ARCHIVE, "--skip_bad")
    printed = capsys.readouterr().out
    assert "skipped 1:" in printed
    assert named in printed
    shard = load_file(tmp_path / "a" / "00000.safetensors")
    assert shard["view_offset"].tolist()[:4] == [0, 4, 7, 11]
    assert shard["view"].tolist()[4:11] == [0, 1, 3, 0, 1, 2, 3]


def test_skip_bad_passes_over_objects_and_whole_shards(tree, tmp_path, capsys, monkeypatch):
    """A listed folder that is not there, one without a view, and a shard of two such objects."""
    monkeypatch.setattr(data, "SHARD_OBJECTS", 2)
    root = copied(tree, tmp_path)
    for name in ("00001", "00004", "00005"):
        shutil.rmtree(root / name)
    (root / "00004").mkdir()
    flags = ["--data", root, "--archive", tmp_path / "a", *ARCHIVE]
    with pytest.raises(InputError, match="00001: unreadable folder"):
        call(precompute_dino, *flags)
    call(precompute_dino, *flags, "--skip_bad")
    printed = capsys.readouterr().out
    assert "skipped 3:" in printed
    assert "00004: no view has both" in printed
    assert not archives.shard_path(tmp_path / "a", 2).exists()
    assert len(data.Archive(tmp_path / "a", "all")) == 9


def test_nothing_sound_is_no_archive(tree, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(tree / "00000", root / "a")
    for path in (root / "a").glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=f"--data {root}: no sound view in it"):
        call(precompute_dino, "--data", root, "--archive", tmp_path / "a", *ARCHIVE, "--skip_bad")


def test_what_is_not_finite_is_not_archived(tree, tmp_path, monkeypatch):
    """Weights can be finite and overflow in what they compute, above all in fp16."""
    torch.manual_seed(0)
    tensors = AutoencoderKL(32, (1, 1), 1).state_dict()
    tensors["encoder.conv_in.weight"] = 1e38 * tensors["encoder.conv_in.weight"]
    torch.save({f"first_stage_model.{k}": v for k, v in tensors.items()}, tmp_path / "vae.ckpt")
    flags = ["--data", tree, "--archive", tmp_path / "a", *ARCHIVE]
    with pytest.raises(InputError, match="latent_mean of views 0 to .* NaN or infinity"):
        call(precompute_dino, *flags, "--codec", "sd", "--vae", tmp_path / "vae.ckpt")
    infinite = {"latent_mean": torch.full((4, 48, 8, 8), math.inf), "cls": torch.ones(4, 3)}
    monkeypatch.setattr(precompute_dino, "encode", lambda *_: infinite)
    with pytest.raises(InputError, match="latent_mean of views 0 to .* NaN or infinity"):
        call(precompute_dino, *flags, "--archive", tmp_path / "b", "--batch_size", 4)
    assert not list(tmp_path.glob("?/0*.safetensors"))


def test_an_archive_without_its_encoder_is_not_trained_on(archive, tmp_path):
    """Samples of such a run could never be drawn."""
    copy = Path(shutil.copytree(archive, tmp_path / "archive"))
    (copy / "frozen.safetensors").unlink()
    with pytest.raises(InputError, match="frozen.safetensors: missing"):
        call(train, "--archive", copy, "--out", tmp_path / "run", *TRAIN)


def test_odd_poses_are_noted_and_archived(tree, tmp_path, capsys):
    root = copied(tree, tmp_path)
    for path in root.glob("*/00?.npy"):
        np.save(path, np.load(path) * [1, 1, 1, 100])
    call(precompute_dino, "--data", root, "--archive", tmp_path / "a", *ARCHIVE)
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if "camera's distance is far from" in line]
    assert len(warnings) == 1
    assert len(data.Archive(tmp_path / "a", "all")) == 12


def test_a_refused_archive_is_retried_with_other_flags(tree, tmp_path, monkeypatch):
    """Where the disk was too small, or a kill came before the manifest, nothing is used again."""
    flags = ["--data", tree, "--archive", tmp_path / "a", *FROZEN, "--workers", 0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="0.0 GB free"):
        call(precompute_dino, *flags, "--pca", 16)
    monkeypatch.undo()
    flags += ["--pca", 8, "--patch_dtype", "fp8"]
    call(precompute_dino, *flags)
    manifest = tmp_path / "a" / "manifest.json"
    manifest.rename(tmp_path / "manifest.json")
    with pytest.raises(InputError, match="shards without their manifest"):
        call(precompute_dino, *flags)
    (tmp_path / "manifest.json").rename(manifest)
    assert archives.read_manifest(tmp_path / "a")["encoder"]["feature_dim"] == 8


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--codec", "pixels", "--encoder", "vit_nonesuch"], "vit_nonesuch"),
        (["--codec", "pixels"], "--weights"),
        ([], "--vae"),
        ([*FROZEN, "--layers", "--pca", 8], "--pca 8"),
        ([*FROZEN, "--pca", 4000], "--pca 4000"),
        ([*FROZEN, "--pca", -1], "--pca -1"),
        ([*FROZEN, "--batch_size", 0], "--batch_size 0"),
        ([*FROZEN, "--workers", -1], "--workers -1"),
        ([*FROZEN, "--data", "absent"], "absent: no such folder"),
        ([*FROZEN, "--archive", __file__], "--archive"),
    ],
)
def test_what_cannot_be_archived_is_named(tree, tmp_path, monkeypatch, flags, named):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=named) as error:
        call(precompute_dino, "--data", tree, "--archive", tmp_path / "a", *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--encoder_size", 32], "--encoder_size 32: .*manifest.json says 64"),
        (["--val_fraction", 0.5], "--val_fraction 0.5: .*manifest.json says 0.25"),
        (["--patch_dtype", "fp8"], "--patch_dtype fp8"),
        (["--precision", "bf16"], "--precision bf16"),
    ],
)
def test_an_archive_is_not_continued_with_other_flags(tree, archive, flags, named):
    with pytest.raises(InputError, match=named):
        call(precompute_dino, "--data", tree, "--archive", archive, *ARCHIVE, *flags)


def test_an_archive_is_not_of_other_renders_of_the_same_names(tree, archive, tmp_path):
    """tools.shapes calls the objects of every tree alike."""
    other = tmp_path / "other"
    flags = ["--kind", "blocks", "--objects", 12, "--views", 4, "--size", 32]
    call(shapes, "--out", other, *flags, "--seed", 5)
    named = r"--data .*other/\d{5}/\d{3}.npy: not the pose that --archive "
    with pytest.raises(InputError, match=named):
        call(precompute_dino, "--data", other, "--archive", archive, *ARCHIVE)
    with pytest.raises(InputError, match=named):
        online = ["--archive", archive, "--online", "--data", other, *VIT]
        call(train, *online, *TRAIN, "--out", tmp_path / "run")
    call(precompute_dino, "--data", tree, "--archive", archive, *ARCHIVE)


def test_an_archive_is_not_continued_with_other_objects(tree, archive, tmp_path):
    root = copied(tree, tmp_path)
    (root / "valid_paths.json").write_text('["00000"]')
    with pytest.raises(InputError, match="its objects are not the 12 that"):
        call(precompute_dino, "--data", root, "--archive", archive, *ARCHIVE)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("", "format", 2),
        ("", "objects", ["00000", 1]),
        ("", "image_size", "32"),
        ("", "image_size", 64),
        ("", "val_fraction", None),
        ("encoder", "tokens", 9),
        ("encoder", "cls_dim", 1e3),
        ("codec", "factor", 0),
        ("codec", "scale", "one"),
    ],
)
def test_a_manifest_that_cannot_be_is_named(archive, tmp_path, part, key, value):
    shutil.copytree(archive, tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["crc32"]
    section = manifest[part] if part else manifest
    section[key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json"):
        data.Archive(tmp_path / "a", "train")


def test_one_flipped_bit_is_found(archive, tmp_path):
    """In a row that is read, in the manifest, in a table; and a shard that is cut while in use."""
    shutil.copytree(archive, tmp_path / "a")
    pairs = data.Archive(tmp_path / "a", "train")
    pairs[list(range(9))]
    path = tmp_path / "a" / "00000.safetensors"
    whole = path.read_bytes()
    row = load_file(path)["cls"][17].numpy().tobytes()
    at = whole.index(row)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(InputError, match="00000.safetensors: damaged shard .cls of its view 17."):
        data.Archive(tmp_path / "a", "train").read_view(4, 1, ("cls",))
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="00000.safetensors: changed from"):
        pairs[[0]]
    text = (tmp_path / "a" / "manifest.json").read_text()
    (tmp_path / "a" / "manifest.json").write_text(text.replace('"00003"', '"00013"'))
    with pytest.raises(InputError, match="manifest.json: damaged, its checksum"):
        data.Archive(tmp_path / "a", "train")
