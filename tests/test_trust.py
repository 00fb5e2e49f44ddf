"""What users give is not trusted: pickles, names, sizes; and a fuzz of every reader.

LONG=1 makes it thousands of mutated files.
"""

import copy
import io
import json
import os
import pickle
import random
import resource
import shutil
import zlib
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import LONG, same
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file

import data
import pretrained
import train
from lib import checkpoints, files, formats, images
from lib.archives import ARCHIVE_FORMAT
from lib.cli import InputError

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="forks, which CUDA forbids: CUDA_VISIBLE_DEVICES="
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_objects_a_shard(monkeypatch):
    monkeypatch.setattr(data, "SHARD_OBJECTS", 2)


def reseal(path: Path, change) -> None:
    """Changes the metadata of a model.safetensors: change(meta) -> meta; the checksum fits."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["efficient_3dim"])
    del meta["sha256"]
    meta = change(meta)
    sealed = {**meta, "sha256": checkpoints.checksum(meta, tensors)}
    save_file(tensors, path, {"efficient_3dim": json.dumps(sealed)})


# ------------------------------------------------------------------------------------ other formats


def test_a_training_state_of_another_format_is_refused(small, tmp_path):
    shutil.copytree(small / "at4", tmp_path / "run")
    path = tmp_path / "run" / "step_0000004" / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "format": 99}, path)
    with pytest.raises(InputError, match="step_0000004: checkpoint format 99, this code reads"):
        checkpoints.newest_checkpoint(tmp_path / "run")


def test_a_model_of_another_format_is_refused(small, tmp_path):
    step = Path(shutil.copytree(small / "at4" / "step_0000004", tmp_path / "step"))
    reseal(step / "model.safetensors", lambda meta: {**meta, "format": 99})
    with pytest.raises(InputError, match="model.safetensors: checkpoint format 99, this code"):
        pretrained.load_checkpoint(step)


def test_an_archive_of_another_format_is_refused(small, tmp_path):
    archive = Path(shutil.copytree(small / "archive", tmp_path / "archive"))
    manifest = archive / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace(f'"format": {ARCHIVE_FORMAT}', '"format": 99'))
    with pytest.raises(InputError, match="manifest.json: archive format 99, this code reads"):
        data.Archive(archive, "train")


# ----------------------------------------------------------------------------------------- pickles


class Bomb:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def write_zip(bomb: Bomb, path: Path) -> None:
    torch.save({"state_dict": bomb}, path)


def write_old(bomb: Bomb, path: Path) -> None:
    torch.save({"state_dict": bomb}, path, _use_new_zipfile_serialization=False)


def write_bare(bomb: Bomb, path: Path) -> None:
    path.write_bytes(pickle.dumps(bomb, protocol=2))


def read_state(path: Path) -> None:
    folder = path.parent / "run" / "step_0000001"
    folder.mkdir(parents=True)
    shutil.copy(path, folder / "state.pt")
    checkpoints.newest_checkpoint(path.parent / "run")


def read_init(path: Path) -> None:
    formats.read_weights(path, ("unet", "cc_projection"))


def read_ckpt(path: Path) -> None:
    pretrained.load_checkpoint(path)


def read_vae(path: Path) -> None:
    pretrained.load_codec("sd", str(path))


@pytest.mark.parametrize("write", [write_zip, write_old, write_bare])
@pytest.mark.parametrize("read", [read_state, read_init, read_ckpt, read_vae])
def test_no_pickle_is_executed(tmp_path, write, read):
    bomb = Bomb(tmp_path / "executed")
    write(bomb, tmp_path / "bomb.ckpt")
    with pytest.raises(InputError):
        read(tmp_path / "bomb.ckpt")
    assert not bomb.folder.exists()


def test_no_pickle_in_a_pose_is_executed(tmp_path):
    bomb = Bomb(tmp_path / "executed")
    np.save(tmp_path / "000.npy", np.array([bomb] * 12).reshape(3, 4), allow_pickle=True)
    with pytest.raises(InputError):
        data.read_pose(tmp_path / "000.npy")
    assert not bomb.folder.exists()


def test_the_pickle_would_have_worked(tmp_path):
    bomb = Bomb(tmp_path / "executed")
    pickle.loads(pickle.dumps(bomb))
    assert bomb.folder.exists()


# --------------------------------------------------------------------------------- names and sizes


@pytest.mark.parametrize("name", ["../x", "/etc", "a/../../b", "..", "a\0b", "\ud800"])
def test_names_stay_inside_the_root(tmp_path, name):
    (tmp_path / "valid_paths.json").write_text(json.dumps(["fine", name]))
    with pytest.raises(InputError, match="valid_paths.json: "):
        data.list_objects(tmp_path)


def test_a_deeply_nested_list_is_refused(tmp_path):
    (tmp_path / "valid_paths.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="valid_paths.json: "):
        data.list_objects(tmp_path)


def png_that_claims(side: int) -> bytes:
    """A PNG of 8 x 8 pixels whose header says side x side."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    blob = bytearray(buffer.getvalue())
    blob[16:24] = side.to_bytes(4, "big") * 2
    blob[29:33] = zlib.crc32(blob[12:29]).to_bytes(4, "big")
    return bytes(blob)


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_images_are_bounded_before_they_are_decoded(tmp_path, side):
    path = tmp_path / "x.png"
    path.write_bytes(png_that_claims(side))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="too large|exceeds limit"):
        images.load_image(path, 32)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000  # kB: 9000 x 9000 would take 80,000


def test_no_ghostscript_is_run(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="unreadable image"):
        images.load_image(path, 32)


# -------------------------------------------------------------------------------------------- fuzz


def mutate(blob: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a cut, an insertion, zeros, or two chunks swapped.

    Half the time near the beginning or the end, where headers are.
    """
    out = bytearray(blob)
    near = min(2048, len(out))
    anywhere = rng.randrange(len(out))
    start = rng.choice([anywhere, anywhere, rng.randrange(near), len(out) - near])
    at = rng.randrange(start, min(start + near, len(out)))
    size = rng.choice([1, 4, 16, 200])
    how = rng.choice(["flip", "cut", "insert", "zero", "swap"])
    if how == "flip":
        for i in rng.choices(range(at, min(at + 50, len(out))), k=min(size, 8)):
            out[i] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del out[at:]
    elif how == "insert":
        out[at:at] = rng.randbytes(size)
    elif how == "zero":
        out[at : at + size] = bytes(len(out[at : at + size]))
    else:
        other = rng.randrange(len(out))
        chunk = out[at : at + size]
        other_chunk = out[other : other + size]
        out[other : other + size] = chunk
        out[at : at + size] = other_chunk
    return bytes(out)


ODD_VALUES = [None, -1, 0, 3, 10**6, 10**18, 1e308, float("nan"), "x", "", "../.."]
ODD_VALUES += [[], {}, True, [[]]]


def mutate_json(value, rng: random.Random):
    """The same with one value somewhere in it replaced, or gone."""
    value = copy.deepcopy(value)
    node = value
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        child = node[key]
        if not isinstance(child, (dict, list)) or not child or rng.random() < 0.2:
            break
        node = child
    if rng.random() < 0.15:
        del node[key]
    else:
        node[key] = rng.choice(ODD_VALUES)
    return value


def mutate_bytes(path: Path, blob: bytes, rng: random.Random) -> None:
    path.write_bytes(mutate(blob, rng))


def mutate_manifest(path: Path, blob: bytes, rng: random.Random) -> None:
    """A value of it, as if somebody edited it: the checksum is gone."""
    manifest = json.loads(blob)
    del manifest["crc32"]
    path.write_text(json.dumps(mutate_json(manifest, rng)))


def mutate_metadata(path: Path, blob: bytes, rng: random.Random) -> None:
    """A value of a checkpoint's metadata; its checksum fits."""
    path.write_bytes(blob)
    reseal(path, lambda meta: mutate_json(meta, rng))


class Material:
    """A run, an archive and a tree to be damaged."""

    def __init__(self, small: Path, tree: Path, folder: Path):
        self.folder = folder
        self.run = folder / "run"
        self.step = self.run / "step_0000010"
        self.archive = folder / "archive"
        self.tree = folder / "tree"
        shutil.copytree(small / "run", self.run, ignore=lambda *_: ["step_0000008"])
        shutil.copytree(small / "archive", self.archive)
        shutil.copytree(tree, self.tree)
        self.model = pretrained.load_checkpoint(self.step)[0]
        flags = checkpoints.newest_checkpoint(self.run)[0]["args"]
        self.args = Namespace(**{**flags, "archive": str(self.archive)})

    def read_archive(self) -> list:
        """What training takes of it; and a model is built for it."""
        train_set, _, prepare, frozen = train.open_data(self.args, CPU, "fp32")
        batches = []
        for first in range(0, 20, 4):
            batches.append(prepare(train_set[list(range(first, first + 4))]))
        train.build_model(self.args, frozen, batches[0][0].shape[-1])
        return batches

    def read_list(self) -> None:
        for name in data.list_objects(self.tree):
            assert Path(os.path.normpath(self.tree / name)).is_relative_to(self.tree)
            try:
                data.list_views(self.tree, name)
            except InputError:
                continue

    def read_ckpt(self) -> None:
        weights = formats.read_weights(self.folder / "x.ckpt")
        pretrained.load_pretrained(copy.deepcopy(self.model), weights)
        if LONG:
            pretrained.load_checkpoint(self.folder / "x.ckpt")

    def write_ckpt(self, zipped: bool) -> None:
        """The model as a Zero-1-to-3 checkpoint, in torch's format or the one before it."""
        weights = {}
        for name, value in self.model.state_dict().items():
            weights[name.replace("unet.", formats.PREFIX["unet"], 1)] = value
        content = {"state_dict": weights, "epoch": 1}
        path = self.folder / "x.ckpt"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)

    def read_model(self) -> dict:
        return pretrained.load_checkpoint(self.step)[0].state_dict()

    def read_metadata(self) -> None:
        pretrained.load_checkpoint(self.step)

    def read_state(self) -> dict:
        return checkpoints.newest_checkpoint(self.run)[0]["model"]

    def read_pose(self) -> None:
        data.read_pose(self.tree / "00001" / "000.npy")

    def read_image(self) -> None:
        images.load_image(self.tree / "00001" / "000.png", 32)

    def read_latest(self) -> None:
        formats.find_weights(self.run)

    def read_log(self) -> None:
        files.trim_log(self.run / "log.jsonl", 10)


class Reader(NamedTuple):
    """A file below Material's folder, how it is read, and how it is damaged.

    always: a damaged file is refused, or what is read equals what the sound one gave.
    """

    path: str
    read: str
    mutate: object = mutate_bytes
    always: bool = False


READERS = {
    "checkpoint": Reader("run/step_0000010/model.safetensors", "read_model", always=True),
    "metadata": Reader("run/step_0000010/model.safetensors", "read_metadata", mutate_metadata),
    "state": Reader("run/step_0000010/state.pt", "read_state", always=True),
    "shard": Reader("archive/00001.safetensors", "read_archive", always=True),
    "manifest": Reader("archive/manifest.json", "read_archive", always=True),
    "manifest's values": Reader("archive/manifest.json", "read_archive", mutate_manifest),
    "npy": Reader("tree/00001/000.npy", "read_pose"),
    "png": Reader("tree/00001/000.png", "read_image"),
    "list": Reader("tree/valid_paths.json", "read_list"),
    "ckpt": Reader("x.ckpt", "read_ckpt"),
    "old ckpt": Reader("x.ckpt", "read_ckpt"),
    "latest": Reader("run/latest", "read_latest"),
    "log": Reader("run/log.jsonl", "read_log"),
}


def rounds_of(name: str) -> int:
    """How many mutated files a reader is given."""
    if LONG:
        return 150 if "ckpt" in name else 1000
    return 40 if name == "metadata" else 60


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_read_rightly_or_refused(small, tree, tmp_path, name):
    """Nothing but InputError leaves a reader, and what it reads of a damaged file is right."""
    reader = READERS[name]
    material = Material(small, tree, tmp_path)
    if "ckpt" in name:
        material.write_ckpt(zipped=name == "ckpt")
    read = getattr(material, reader.read)
    path = tmp_path / reader.path
    expected = read() if reader.always else None
    blob = path.read_bytes()
    rng = random.Random(name)
    refused = 0
    for number in range(rounds_of(name)):
        reader.mutate(path, blob, rng)
        shutil.copy(path, tmp_path / "last")
        try:
            found = read()
            assert not reader.always or same(found, expected)
        except InputError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, error
        except BaseException as error:
            kept = tmp_path / "last"
            raise AssertionError(f"{name} {number}, kept as {kept}: {error!r}") from error
    if name != "log":  # of which whatever can be read stays
        assert refused > rounds_of(name) // 20
