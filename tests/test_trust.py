"""What users give is not trusted: pickles, names, sizes; and a fuzz of every reader. LONG=1: thousands of files."""

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

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file
from test_faults import LONG, load_state, make_small, pytestmark, restore, same, training  # noqa: F401

import data
import pretrained
import train
from lib import checkpoints, files, images
from lib.archives import ARCHIVE_FORMAT
from lib.cli import InputError
from lib.formats import PREFIX


@pytest.fixture
def small(tree) -> Path:
    return make_small(tree)


def reseal(path: Path, change) -> None:
    """Change the metadata of a model.safetensors, checksum and all."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["efficient_3dim"])
    meta.pop("sha256")
    meta = change(meta)
    save_file(
        tensors,
        path,
        {"efficient_3dim": json.dumps(meta | {"sha256": checkpoints.checksum(meta, tensors)})},
    )


def test_another_format_version_is_refused(small, tmp_path):
    step, archive = (
        shutil.copytree(small / "at4" / "step_0000004", tmp_path / "step_0000004"),
        tmp_path / "archive",
    )
    torch.save(load_state(step) | {"format": 99}, step / "state.pt")
    shutil.copytree(small / "archive", archive)
    text = (
        (archive / "manifest.json")
        .read_text()
        .replace(f'"format": {ARCHIVE_FORMAT}', '"format": 99')
    )
    (archive / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="step_0000004: checkpoint format 99, this code reads"):
        checkpoints.newest_checkpoint(tmp_path)
    reseal(step / "model.safetensors", lambda meta: meta | {"format": 99})
    with pytest.raises(
        InputError, match="model.safetensors: checkpoint format 99, this code reads"
    ):
        pretrained.load_checkpoint(step)
    with pytest.raises(InputError, match="manifest.json: archive format 99, this code reads"):
        data.Archive(archive, "train")


def test_no_pickle_is_executed(small, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "run" / "step_0000001").mkdir(parents=True)
    state, init, ckpt, npy = (
        tmp_path / name for name in ("run/step_0000001/state.pt", "i.pt", "c.ckpt", "p.npy")
    )
    reads = {
        state: lambda: checkpoints.newest_checkpoint(tmp_path / "run"),
        ckpt: lambda: pretrained.load_checkpoint(ckpt),
    }
    reads |= {
        npy: lambda: data.read_pose(npy),
        init: training(small, tmp_path / "new", "--init", init),
    }
    reads[small] = lambda: pretrained.read_tensors(ckpt)
    for path, read in reads.items():
        path = ckpt if path == small else path
        for attempt in range(3 if path != npy else 1):
            if attempt < 2:
                torch.save(
                    {"state_dict": Bomb()}, path, _use_new_zipfile_serialization=attempt == 0
                )
            else:
                path.write_bytes(pickle.dumps(Bomb(), protocol=2))
            if path == npy:
                np.save(npy, np.array([Bomb()] * 12).reshape(3, 4), allow_pickle=True)
            with pytest.raises(InputError):
                read()
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "executed").exists()  # it would have worked


@pytest.mark.parametrize("name", ["../x", "/etc", "a/../../b", "..", "a\0b", "\ud800", None])
def test_names_stay_inside_the_root(tmp_path, name):
    text = "[" * 100_000 if name is None else json.dumps(["fine", name])
    (tmp_path / "valid_paths.json").write_text(text)
    with pytest.raises(InputError, match="valid_paths.json: "):
        data.list_objects(tmp_path)


def test_images_are_bounded_before_decoding_and_run_no_ghostscript(tmp_path):
    path, before = tmp_path / "x.png", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in (9_000, 60_000):
        Image.new("L", (8, 8)).save(buffer := io.BytesIO(), "PNG")
        blob = bytearray(buffer.getvalue())
        blob[16:24] = side.to_bytes(4, "big") * 2
        blob[29:33] = zlib.crc32(blob[12:29]).to_bytes(4, "big")
        path.write_bytes(blob)
        with pytest.raises(InputError, match="too large|exceeds limit"):
            images.load_image(path, 32)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="unreadable image"):
        images.load_image(path, 32)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    )  # kB: 9000 x 9000 would take 80


# ------------------------------------------------------------------------------------------------------------ fuzz


def mutate(blob: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a cut, an insertion, zeros, or two chunks swapped; half the time near an end, where headers are."""
    out, near = bytearray(blob), min(2048, len(blob))
    at = rng.choice(
        [rng.randrange(len(out)), rng.randrange(len(out)), rng.randrange(near), len(out) - near]
    )
    at, n, how = (
        rng.randrange(at, min(at + near, len(out))),
        rng.choice([1, 4, 16, 200]),
        rng.randrange(5),
    )
    if how == 0:
        for i in rng.choices(range(at, min(at + 50, len(out))), k=min(n, 8)):
            out[i] ^= 1 << rng.randrange(8)
    elif how == 1:
        del out[at:]
    elif how == 2:
        out[at:at] = rng.randbytes(n)
    elif how == 3:
        out[at : at + n] = bytes(len(out[at : at + n]))
    else:
        other = rng.randrange(len(out))
        a, b = out[at : at + n], out[other : other + n]
        out[other : other + n], out[at : at + n] = a, b
    return bytes(out)


def mutate_json(value, rng: random.Random):
    """The same with one value somewhere in it replaced, or gone."""
    node = value = copy.deepcopy(value)
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    odd = [None, -1, 0, 3, 10**6, 10**18, 1e308, float("nan"), "x", "", "../..", [], {}, True, [[]]]
    node[key] = rng.choice(odd)
    if rng.random() < 0.15:
        del node[key]
    return value


def without(values: dict, key: str) -> dict:
    return {name: value for name, value in values.items() if name != key}


READERS = [
    "checkpoint",
    "metadata",
    "state",
    "shard",
    "manifest",
    "manifest's values",
    "npy",
    "png",
    "list",
    "ckpt",
]
READERS += ["old ckpt", "latest", "log"]


@pytest.mark.parametrize("reader", READERS)
def test_mutated_files_are_read_rightly_or_refused(
    small, tree, tmp_path, monkeypatch, capfd, reader
):
    """Whatever but InputError escapes a reader fails this; so does a checkpoint or archive that reads otherwise."""
    monkeypatch.setattr(data, "SHARD_OBJECTS", 2)
    run, archive, root = tmp_path / "run", tmp_path / "archive", tmp_path / "tree"
    step = run / "step_0000010"
    shutil.copytree(small / "run", run, ignore=lambda *_: ["step_0000008"])
    shutil.copytree(small / "archive", archive)
    shutil.copytree(tree, root)
    state, model = checkpoints.newest_checkpoint(run)[0], pretrained.load_checkpoint(step)[0]
    args = Namespace(**state["args"] | {"archive": str(archive)})

    def open_archive():
        train_set, _, prepare, frozen = train.open_data(args, torch.device("cpu"))
        batches = [prepare(train_set[list(range(first, first + 4))]) for first in range(0, 20, 4)]
        train.build_model(args, frozen, batches[0][0].shape[-1])
        return {(i, key): value for i, (mean, logvar, rest) in enumerate(batches)
                for key, value in ({"mean": mean, "logvar": logvar} | rest).items()}  # fmt: skip

    def open_list():
        for name in data.list_objects(root):
            assert Path(os.path.normpath(root / name)).is_relative_to(root)
            try:
                data.list_views(root, name)
            except InputError:
                pass

    def open_ckpt():
        weights = pretrained.read_weights(path)
        pretrained.load_pretrained(copy.deepcopy(model), weights)
        if LONG:
            pretrained.load_checkpoint(path)

    path, read = {
        "checkpoint": (
            step / "model.safetensors",
            lambda: pretrained.load_checkpoint(step)[0].state_dict(),
        ),
        "metadata": (step / "model.safetensors", lambda: pretrained.load_checkpoint(step)),
        "state": (step / "state.pt", lambda: checkpoints.newest_checkpoint(run)[0]["model"]),
        "shard": (archive / "00001.safetensors", open_archive),
        "manifest": (archive / "manifest.json", open_archive),
        "manifest's values": (archive / "manifest.json", open_archive),
        "npy": (root / "00001" / "000.npy", lambda: data.read_pose(path)),
        "png": (root / "00001" / "000.png", lambda: images.load_image(path, 32)),
        "list": (root / "valid_paths.json", open_list),
        "ckpt": (tmp_path / "x.ckpt", open_ckpt),
        "old ckpt": (tmp_path / "x.ckpt", open_ckpt),
        "latest": (run / "latest", lambda: pretrained.find_weights(run)),
        "log": (run / "log.jsonl", lambda: files.trim_log(path, 10)),
    }[reader]
    if "ckpt" in reader:
        foreign = {k.replace("unet.", PREFIX["unet"], 1): v for k, v in model.state_dict().items()}
        torch.save(
            {"state_dict": foreign, "epoch": 1},
            path,
            _use_new_zipfile_serialization=reader == "ckpt",
        )
    expected = {"checkpoint": model.state_dict(), "state": state["model"]}
    expected = (expected | dict.fromkeys(("shard", "manifest"), open_archive())).get(reader)
    rng, blob, refused = random.Random(reader), path.read_bytes(), 0
    rounds = (150 if "ckpt" in reader else 1000) if LONG else 40 if reader == "metadata" else 60
    for number in range(rounds):
        if reader == "metadata":
            path.write_bytes(blob)
            reseal(path, lambda meta: mutate_json(meta, rng))
        elif reader == "manifest's values":
            path.write_text(json.dumps(mutate_json(without(json.loads(blob), "crc32"), rng)))
        else:
            path.write_bytes(mutate(blob, rng))
        shutil.copy(path, tmp_path / "last")
        try:
            result = read()
            assert expected is None or same(result, expected)
        except InputError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, error
        except BaseException as error:
            raise AssertionError(
                f"{reader} {number}, kept as {tmp_path}/last: {error!r}"
            ) from error
    assert refused > rounds // 20 or reader == "log"
