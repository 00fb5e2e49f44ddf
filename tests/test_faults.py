"""Nothing lost, nothing silently wrong: kills, signals, full disks, damaged files and hostile ones.

Children are forked from this process, which has imported everything: a kill costs a second. LONG=1 makes it 50 kills
each of training and archiving, and thousands of mutated files.
"""

import copy
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FROZEN, ROOT, SMALL, call
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file

import data
import precompute_dino
import pretrained
import train
from data import InputError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which CUDA forbids: CUDA_VISIBLE_DEVICES=")
LONG = bool(os.environ.get("LONG"))
TINY = [*FROZEN, "--encoder", "test_vit", "--layers", 2, "--encoder_size", 32, "--precision", "fp32", "--workers", 0]
TRAIN = [*SMALL, "--channel_mult", 1, "--attention", 1, "--steps", 10, "--batch_size", 4, "--accumulate", 2]
TRAIN += ["--save_every", 2, "--val_every", 4, "--preview_every", 0]


def fork(work, log: Path, setup=lambda: None) -> int:
    """Start setup() and the script's main `work` in a child; stdout and stderr go to `log`. Its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        setup()
        data.run_script(work)
        code = 0
    except SystemExit as stop:
        print(stop)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, seconds: float = 90) -> int | None:
    """The child's exit code, minus the signal that ended it; None while it still runs after that time."""
    end = time.monotonic() + seconds
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(done[1])


def one_error(log: Path, *words: str) -> None:
    text = log.read_text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text and all(word in errors[0] for word in words), text[-3000:]


def at_step(step: int, action):
    """A setup (or, in this process, a patch to undo) that does something as training begins the step after `step`."""
    original = train.learning_rate

    def hooked(current, args):
        if current == step:
            action()
        return original(current, args)

    train.learning_rate = hooked


def poison(steps) -> None:
    """Make the noisy latents of the steps that begin after these NaN."""
    now, rate, sample = [0], train.learning_rate, train.q_sample
    train.learning_rate = lambda step, args: now.__setitem__(0, step) or rate(step, args)
    train.q_sample = lambda *a: sample(*a) * (float("nan") if now[0] in steps else 1)


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    for name in ("learning_rate", "q_sample"):
        monkeypatch.setattr(train, name, getattr(train, name))
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def small(tree, tmp_path_factory) -> Path:
    """archive: six shards; run: an uninterrupted run, its checkpoints at 8 and 10; at4: that run as it was at 4."""
    root = tmp_path_factory.mktemp("faults")
    assert wait(fork(archiving(tree, root / "archive"), root / "log", fresh)) == 0, (root / "log").read_text()
    call_train(root, root / "at4", "--steps", 10, stop_at=4)
    assert (root / "at4" / "preempted").exists() and not (root / "at4" / "step_0000006").exists()
    shutil.copytree(root / "at4", root / "run")
    call_train(root, root / "run")
    call_train(root, root / "whole")
    same_run(root / "run", root / "whole")
    return root


def fresh():
    data.SHARD_OBJECTS = 2
    torch.manual_seed(0)


def archiving(tree, out):
    return lambda: call(precompute_dino, "--data", tree, "--archive", out, *TINY)


def training(small, out, *flags):
    def main():
        data.SHARD_OBJECTS = 2
        call(train, "--archive", small / "archive", "--out", out, *TRAIN, *flags)

    return main


def call_train(small, out, *flags, stop_at=None) -> None:
    """Train in this process; with stop_at a signal arrives in that step."""
    shards, rate = data.SHARD_OBJECTS, train.learning_rate
    try:
        if stop_at:
            at_step(stop_at - 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        training(small, out, *flags)()
    finally:
        data.SHARD_OBJECTS, train.learning_rate = shards, rate


def log_lines(run) -> list[dict]:
    clocked = ("seconds", "samples_per_second", "tflops", "peak_memory_gb")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clocked} for line in lines]


def same(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def load_state(folder) -> dict:
    return torch.load(folder / "state.pt", weights_only=True)


def same_run(a: Path, b: Path) -> None:
    """Final weights, EMA, optimiser and log are equal, and nothing is left half-written."""
    assert log_lines(a) == log_lines(b)
    for folder in ("step_0000008", "step_0000010"):
        states = [load_state(run / folder) for run in (a, b)]
        for key in ("model", "optimizer", "skips", "window"):
            assert same(states[0][key], states[1][key]), key
        assert same(*(load_file(run / folder / "model.safetensors") for run in (a, b)))
    for run in (a, b):
        assert (run / "latest").read_text() == "step_0000010"
        assert {p.name for p in run.iterdir()} <= {"lock", "latest", "log.jsonl", "step_0000008", "step_0000010"}


def kill_until_done(kills: int, start, finished, log: Path) -> None:
    """start(n) gives the n-th job's main; kill it again and again at random moments until it ends; `kills` in all."""
    rng, count, job, longest = random.Random(0), 0, 0, 1.0
    while count < kills:
        while True:
            began, pid = time.monotonic(), fork(start(job), log, fresh)
            code = wait(pid, rng.uniform(0.1, longest) if count < kills else 90)
            if code is None:
                os.kill(pid, signal.SIGKILL)
                code = wait(pid)
            if code == 0:
                longest = max(longest, time.monotonic() - began)
                break
            assert code == -signal.SIGKILL, log.read_text()[-3000:]
            count, longest = count + 1, longest * 1.1  # so that every job ends
        finished(job)
        job += 1


# ----------------------------------------------------------------------------------------------------------- kills


def test_training_killed_at_random_moments_loses_nothing(small, tmp_path):
    def finished(job):
        same_run(small / "run", tmp_path / str(job))
        shutil.rmtree(tmp_path / str(job))

    kill_until_done(50 if LONG else 6, lambda job: training(small, tmp_path / str(job)), finished, tmp_path / "log")


def test_archiving_killed_at_random_moments_loses_nothing(small, tree, tmp_path):
    def finished(job):
        a, b = ({p.name: p.read_bytes() for p in root.iterdir()} for root in (small / "archive", tmp_path / str(job)))
        assert a == b and len(a) == 9  # six shards, manifest, frozen.safetensors, lock: no temporary file stays

    kill_until_done(50 if LONG else 6, lambda job: archiving(tree, tmp_path / str(job)), finished, tmp_path / "log")


WRITES = [(os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir")]
WRITES += [(torch, "save"), (pretrained, "save_file")]


def fail_at(k: int, how: str):
    """A setup: the k-th call that changes the disk dies before it is done or, if it writes a file, raises or tears."""
    calls = [0]

    def wrap(name, original):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] != k:
                return original(*args, **kwargs)
            if how == "raise" and name not in ("unlink", "rmdir"):
                raise OSError(28, "No space left on device")
            if how == "torn" and "save" in name:
                original(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            if how != "raise":
                os._exit(77)
            return original(*args, **kwargs)

        return call

    for module, name in WRITES:
        setattr(module, name, wrap(name, getattr(module, name)))


@pytest.mark.parametrize("how", ["die", "torn", "raise"])
def test_a_checkpoint_appears_whole_or_not_at_all(small, tmp_path, how):
    """Fails each step of the writing of checkpoint 6, beside 2 and 4: the newest is always readable, and 6 comes."""
    (state, weights), run = train.newest_checkpoint(small / "at4"), tmp_path / "run"
    meta, tensors, model = pretrained.read_model(small / "at4" / "step_0000004" / "model.safetensors")
    frozen = {key: meta[key] for key in ("encoder", "codec", "image_size", "val_fraction")}
    frozen["tensors"] = {key: value for key, value in tensors.items() if key.startswith("encoder.")}
    args = train.argparse.Namespace(keep=2, keep_every=0)
    save = lambda: train.save_checkpoint(run, state | {"step": 6}, model, frozen, args)  # noqa: E731
    code, ks, seen = 77, 0, set()
    while code:
        ks += 1
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(small / "at4", run)
        code = wait(fork(save, tmp_path / "log", lambda k=ks: fail_at(k, how)))
        if code == 1:
            one_error(tmp_path / "log", "could not be written")
        found, ema = train.newest_checkpoint(run)
        seen.add(found["step"])
        assert same(found["model"], state["model"]) and same(ema, weights)
        if how == "raise" and code == 0 and ks < 12:
            code = 1  # a failed clean-up stops nothing
        assert code in (0, 1, 77)
    assert seen == {4, 6} and ks > 12
    save()
    assert sorted(p.name for p in run.glob("step_*")) == ["step_0000004", "step_0000006"]


# --------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(small, tmp_path, capfd, file, how):
    """Even one bit of one weight; nor does the damaged one push sound ones out where few are kept."""
    shutil.copytree(small / "run", tmp_path / "run")
    path = tmp_path / "run" / "step_0000010" / file
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.unlink() if how == "gone" else path.write_bytes({"flip": blob, "cut": blob[: len(blob) // 2]}.get(how, b""))
    assert train.newest_checkpoint(tmp_path / "run")[0]["step"] == 8
    assert f"{path.parent}: unreadable" in capfd.readouterr().err
    if how == "flip":
        call_train(small, tmp_path / "run", "--keep", 1, stop_at=9)
        assert train.newest_checkpoint(tmp_path / "run")[0]["step"] == 9
        call_train(small, tmp_path / "run", "--keep", 3)
        shutil.rmtree(tmp_path / "run" / "step_0000009")
        shutil.copytree(small / "run" / "step_0000008", tmp_path / "run" / "step_0000008")
        same_run(small / "run", tmp_path / "run")


def test_the_last_checkpoints_stay_and_every_nth_for_good(small, tmp_path):
    (tmp_path / "run" / "step_0000001.bak").mkdir(parents=True)
    call_train(small, tmp_path / "run", "--save_every", 1, "--keep", 2, "--keep_every", 3)
    there = sorted(path.name for path in (tmp_path / "run").glob("step_*"))
    assert there == ["step_0000001.bak", *(f"step_{step:07d}" for step in (3, 6, 9, 10))]


def test_log_has_no_duplicate_or_missing_step(small, tmp_path):
    """Whatever a kill leaves in it: lines beyond the checkpoint, a torn one, bytes that are no text."""
    shutil.copytree(small / "at4", tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "ab") as file:
        file.write(b'{"step": 5, "loss": 0}\n3\n[]\n{"step": "x"}\n\xff\xfe{"step": 4, "lo')
    call_train(small, tmp_path / "run")
    same_run(small / "run", tmp_path / "run")
    steps = [line["step"] for line in log_lines(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, 11))


def test_changed_flags_are_listed_and_some_refused(small, tmp_path, capfd):
    shutil.copytree(small / "at4", tmp_path / "run")
    for flags, word in ((["--width", 64], "--width"), (["--seed", 1], "--seed"), (["--prediction", "eps"], "eps"),
                        (["--batch_size", 3], "--batch_size 3")):  # fmt: skip
        with pytest.raises(InputError, match="can't change|does not divide") as error:
            call_train(small, tmp_path / "run", *flags)
        assert word in str(error.value) or word == "eps"
    other = tmp_path / "other"
    shutil.copytree(small / "archive", other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["encoder"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="another encoder"):
        call_train(small, tmp_path / "run", "--archive", other)
    capfd.readouterr()
    call_train(small, tmp_path / "run", "--lr", 2e-3, "--batch_size", 8)
    printed = capfd.readouterr().out
    assert "lr: 0.001 -> 0.002" in printed and "accumulate: 2 -> 1, which keeps the global batch of 8" in printed


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors", "manifest.json"])
def test_another_format_version_is_refused(small, tmp_path, file):
    shutil.copytree(small / "at4", tmp_path / "run")
    shutil.copytree(small / "archive", tmp_path / "archive")
    step = tmp_path / "run" / "step_0000004"
    if file == "state.pt":
        torch.save(load_state(step) | {"format": 99}, step / file)
        read = lambda: train.newest_checkpoint(tmp_path / "run")  # noqa: E731
    elif file == "model.safetensors":
        reseal(step / file, lambda meta: meta.update(format=99))
        read = lambda: pretrained.load_checkpoint(step)  # noqa: E731
    else:
        path = tmp_path / "archive" / file
        path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
        read = lambda: data.Archive(tmp_path / "archive", "train")  # noqa: E731
    with pytest.raises(InputError, match="format 99, this code reads"):
        read()


def reseal(path: Path, change) -> None:
    """Change the metadata of a model.safetensors, checksum and all."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["efficient_3dim"])
    meta.pop("sha256")
    change(meta)
    save_file(tensors, path, {"efficient_3dim": json.dumps(meta | {"sha256": pretrained.checksum(meta, tensors)})})


# -------------------------------------------------------------------------------------------- signals and processes


def test_signals(small, tmp_path):
    """(That a stopped run equals an uninterrupted one is in `small`.) A signal to the whole process group, with a data
    worker in it; a second signal; a data worker killed."""

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    def group():
        os.setsid()
        at_step(4, lambda: os.killpg(0, signal.SIGTERM))

    flags = ["--workers", 1]
    kill = lambda: multiprocessing.active_children()[0].kill()  # noqa: E731
    setups = {"group": group, "twice": lambda: at_step(4, stop), "worker": lambda: at_step(4, kill)}
    pids = {}
    for name, setup in setups.items():
        shutil.copytree(small / "at4", tmp_path / name)
        pids[name] = fork(training(small, tmp_path / name, *flags), tmp_path / f"{name}.log", setup)
    codes = {name: wait(pid) for name, pid in pids.items()}
    assert codes == {"group": 0, "twice": -signal.SIGTERM, "worker": 1}, (tmp_path / "group.log").read_text()
    assert (tmp_path / "group" / "preempted").exists() and not (tmp_path / "twice" / "preempted").exists()
    assert train.newest_checkpoint(tmp_path / "group")[0]["step"] == 5
    one_error(tmp_path / "worker.log", "DataLoader worker", "killed")
    call_train(small, tmp_path / "worker")
    same_run(small / "run", tmp_path / "worker")


def test_two_jobs_on_one_folder(small, tree, tmp_path):
    shutil.copytree(small / "at4", tmp_path / "run")
    shutil.copytree(small / "archive", tmp_path / "archive")
    for name, work in (("run", training(small, tmp_path / "run")), ("archive", archiving(tree, tmp_path / "archive"))):
        held = precompute_dino.lock(tmp_path / name, "--out")
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / name).rglob("*")}
        assert wait(fork(work, tmp_path / "log", fresh)) == 1
        one_error(tmp_path / "log", name, "another job")
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / name).rglob("*") if p.name != "lock"} == {
            p: t for p, t in before.items() if p.name != "lock"}  # fmt: skip
        held.close()


def test_a_rank_that_dies_and_another_world_size(small, tmp_path):
    """Two ranks go on where one process stopped; one is killed in step 7; one process goes on from 6: only rounding."""
    shutil.copytree(small / "at4", tmp_path / "run")
    port, pids = str(random.randrange(20000, 40000)), []
    for rank in (0, 1):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def setup(rank=rank, names=names):
            os.environ.update({key: str(value) for key, value in names.items()})
            if rank:
                at_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL))

        work = training(small, tmp_path / "run", "--batch_size", 2)
        pids.append(fork(work, tmp_path / f"log{rank}", setup))
    codes = [wait(pid) for pid in pids]
    printed = (tmp_path / "log0").read_text()
    assert codes == [1, -signal.SIGKILL] and "processes: 1 -> 2" in printed and "batch_size: 4 -> 2" in printed, printed
    assert train.newest_checkpoint(tmp_path / "run")[0]["step"] == 6
    call_train(small, tmp_path / "run")
    ours, theirs = log_lines(tmp_path / "run"), log_lines(small / "run")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        key = "loss" if "loss" in a else "val_loss"
        assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_torchrun_passes_the_signal_on(archive, tmp_path):
    """SIGTERM to torchrun, which signals each rank's process group, data workers too; LONG: a rank is killed first."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    flags = ["--archive", archive, "--out", tmp_path / "run", *TRAIN, "--batch_size", 2, "--steps", 100_000]
    flags += ["--workers", 1, "--val_every", 0, "--save_every", 10]
    argv = [str(a) for a in (*launch, "--shutdown-timeout=60", ROOT / "train.py", *flags)]
    with open(tmp_path / "log", "w") as log:
        agent = subprocess.Popen(argv, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = tmp_path / "run" / "log.jsonl"

    def wait_for(step):
        end = time.monotonic() + 100
        while not lines.exists() or len(lines.read_text().splitlines()) < step:
            assert time.monotonic() < end and agent.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)

    wait_for(12)
    if LONG:
        ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        wait_for(40)
    agent.send_signal(signal.SIGTERM)
    agent.wait(60)
    printed = (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "preempted").exists(), printed[-3000:]
    steps = [line["step"] for line in log_lines(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
    assert train.newest_checkpoint(tmp_path / "run")[0]["step"] == steps[-1]
    assert f"stopped by a signal after step {steps[-1]}" in printed


# ---------------------------------------------------------------------------------------------------- disk and data


@pytest.fixture
def disk(tmp_path):
    """(folder, fill): a small disk, and a setup that leaves so many bytes of it; a file size limit where no mount is
    allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder]
    mounted = not subprocess.run(mount, capture_output=True).returncode

    def fill(left: int):
        if not mounted:
            return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (max(left, 100_000),) * 2)
        with open(folder / "filler", "wb") as file:
            free = os.statvfs(folder)
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - left))
        return lambda: None

    yield folder, fill
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_disk_full_while_training(small, tmp_path, disk):
    folder, fill = disk
    shutil.copytree(small / "at4", folder / "run")
    size = sum(p.stat().st_size for p in (folder / "run" / "step_0000004").iterdir())
    for left in (0, 4096, size // 3, 2 * size // 3):
        assert wait(fork(training(small, folder / "run"), tmp_path / "log", fill(left))) == 1
        one_error(tmp_path / "log", str(folder / "run"), "intact" if left else "")
        (folder / "filler").unlink(missing_ok=True)
        assert train.newest_checkpoint(folder / "run")[0]["step"] == 4
    call_train(small, folder / "run")
    same_run(small / "run", folder / "run")


def test_disk_full_while_archiving(small, tree, tmp_path, disk, monkeypatch):
    folder, fill = disk
    monkeypatch.setattr(precompute_dino, "check_space", lambda *_: 0)  # would refuse beforehand
    shutil.copytree(small / "archive", folder / "a")
    for shard in (1, 3, 4, 5):
        data.shard_path(folder / "a", shard).unlink()
    size = data.shard_path(small / "archive", 0).stat().st_size
    kept = data.shard_path(folder / "a", 0).read_bytes()
    for left in (0, size // 2, 3 * size // 2):
        assert wait(fork(archiving(tree, folder / "a"), tmp_path / "log", lambda n=left: (fresh(), fill(n)()))) == 1
        one_error(tmp_path / "log", ".safetensors: could not be written")
        (folder / "filler").unlink(missing_ok=True)
        assert data.shard_path(folder / "a", 0).read_bytes() == kept and not list((folder / "a").glob(".*"))
    assert wait(fork(archiving(tree, folder / "a"), tmp_path / "log", fresh)) == 0
    assert all(p.read_bytes() == (folder / "a" / p.name).read_bytes() for p in (small / "archive").iterdir())


@pytest.mark.parametrize("out", ["file/run", "/proc/run", "/sys/run"])
def test_a_folder_that_cannot_be_written(small, tree, tmp_path, out):
    (tmp_path / "file").touch()
    for work, flag in ((training(small, tmp_path / out), "--out"), (archiving(tree, tmp_path / out), "--archive")):
        with pytest.raises(InputError, match=f"{flag} .*: [A-Z].*"):
            work()


@pytest.mark.parametrize("how", ["gone", "truncated", "empty"])
def test_a_shard_that_goes_away_while_training(small, tmp_path, how):
    shutil.copytree(small / "archive", tmp_path / "archive")
    shutil.copytree(small / "at4", tmp_path / "run")

    def spoil():
        for shard in range(6):
            path = data.shard_path(tmp_path / "archive", shard)
            path.unlink() if how == "gone" else os.truncate(path, path.stat().st_size // 2 if how == "truncated" else 0)

    at_step(5, spoil)
    with pytest.raises(InputError, match=r"archive/0000\d.safetensors: (unreadable|changed)"):
        call_train(small, tmp_path / "run", "--archive", tmp_path / "archive")
    assert train.newest_checkpoint(tmp_path / "run")[0]["step"] == 4


def test_a_non_finite_gradient_updates_nothing_and_is_counted(small, tmp_path):
    poison({6})
    shutil.copytree(small / "at4", tmp_path / "run")
    call_train(small, tmp_path / "run", "--save_every", 1, "--keep", 9)
    steps = {step: tmp_path / "run" / f"step_{step:07d}" for step in (6, 7, 8)}
    states = {step: load_state(folder) for step, folder in steps.items()}
    for key in ("model", "optimizer"):
        left, right = ({k: v for k, v in copy.copy(states[s][key]).items() if k != "param_groups"} for s in (6, 7))
        assert same(left, right) and not same(states[7][key], states[8][key])
    name = "unet.input_blocks.0.0.weight"
    before, after = (load_file(steps[step] / "model.safetensors")[name] for step in (6, 7))
    torch.testing.assert_close(after, before.lerp(states[7]["model"][name], 1 - 7 / 16))  # towards unchanged weights
    lines = {line["step"]: line for line in log_lines(tmp_path / "run") if "loss" in line}
    assert [lines[step]["skipped"] for step in (6, 7, 8, 10)] == [0, 1, 1, 1]
    assert lines[7]["loss"] is None and lines[7]["grad_norm"] is None and lines[8]["loss"] > 0
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_non_finite_gradients_in_a_row_stop_the_run(small, tmp_path):
    poison(range(5, 10))
    shutil.copytree(small / "at4", tmp_path / "run")
    with pytest.raises(InputError, match="not finite 3 steps in a row, up to step 8"):
        call_train(small, tmp_path / "run", "--max_skips", 3)


# ------------------------------------------------------------------------------------------------------------ trust


def test_no_pickle_is_executed(small, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "run" / "step_0000001").mkdir(parents=True)
    state, ckpt, npy = tmp_path / "run" / "step_0000001" / "state.pt", tmp_path / "x.ckpt", tmp_path / "x.npy"
    reads = {state: lambda: train.newest_checkpoint(tmp_path / "run"), npy: lambda: data.read_pose(npy)}
    reads[ckpt] = lambda: pretrained.load_checkpoint(ckpt)
    reads[tmp_path / "x.pt"] = lambda: call_train(small, tmp_path / "r", "--init", tmp_path / "x.pt")
    for path, read in reads.items():
        for legacy in (False, True):
            torch.save({"state_dict": Bomb()}, path, _use_new_zipfile_serialization=not legacy)
            if path == npy:
                np.save(npy, np.array([Bomb()] * 12).reshape(3, 4), allow_pickle=True)
            with pytest.raises(InputError):
                read()
            path.write_bytes(pickle.dumps(Bomb()))
            with pytest.raises(InputError):
                read()
    assert not (tmp_path / "executed").exists()


def test_names_stay_inside_the_root(tmp_path):
    listed = tmp_path / "valid_paths.json"
    for name in ("../x", "/etc", "a/../../b", "..", "a\0b", "\ud800"):
        listed.write_text(json.dumps(["fine", name]))
        with pytest.raises(InputError, match="valid_paths.json: "):
            data.list_objects(tmp_path)
    listed.write_text("[" * 100_000)
    with pytest.raises(InputError, match="valid_paths.json: "):
        data.list_objects(tmp_path)


def test_images_are_bounded_before_decoding_and_run_no_ghostscript(tmp_path):
    path, before = tmp_path / "x.png", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in (9_000, 60_000):
        with io.BytesIO() as buffer:
            Image.new("L", (8, 8)).save(buffer, "PNG")
            blob = bytearray(buffer.getvalue())
        blob[16:24] = side.to_bytes(4, "big") * 2
        blob[29:33] = zlib.crc32(blob[12:29]).to_bytes(4, "big")
        path.write_bytes(blob)
        with pytest.raises(InputError, match="too large|exceeds limit"):
            data.load_image(path, 32)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="unreadable image"):
        data.load_image(path, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


# ------------------------------------------------------------------------------------------------------------- fuzz


def mutate(blob: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a cut, an insertion, zeros, or two chunks swapped; half the time near an end, where headers are."""
    out = bytearray(blob)
    at = rng.randrange(len(out))
    at = rng.choice([at, at, rng.randrange(min(2048, len(out))), -1 - rng.randrange(min(2048, len(out)))])
    at, n = at % len(out), rng.choice([1, 4, 16, 200])
    how = rng.randrange(5)
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
    value = copy.deepcopy(value)
    node = value
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    if rng.random() < 0.15:
        del node[key]
    else:
        odd = [None, -1, 0, 3, 10**6, 10**18, 1e308, float("nan"), "x", "", "../..", [], {}, True, [[]]]
        node[key] = rng.choice(odd)
    return value


@pytest.mark.parametrize("reader", ["checkpoint", "metadata", "state", "shard", "manifest", "manifest json", "npy",
                                    "png", "list", "ckpt", "old ckpt", "latest", "log"])  # fmt: skip
def test_mutated_files_are_read_rightly_or_refused(small, tree, tmp_path, monkeypatch, capfd, reader):
    """Whatever else than InputError escapes a reader fails this, and so does a checkpoint that reads otherwise."""
    monkeypatch.setattr(data, "SHARD_OBJECTS", 2)
    step = tmp_path / "run" / "step_0000010"
    shutil.copytree(small / "run" / "step_0000010", step)
    shutil.copy(small / "run" / "log.jsonl", tmp_path / "run")
    (tmp_path / "run" / "latest").write_text("step_0000010")
    shutil.copytree(small / "archive", tmp_path / "archive")
    shutil.copytree(tree, tmp_path / "tree")
    state, model = train.newest_checkpoint(tmp_path / "run")[0], pretrained.load_checkpoint(step)[0]
    foreign = {f"model.diffusion_model.{k}": v for k, v in model.unet.state_dict().items()}
    foreign |= {f"cc_projection.{k}": v for k, v in model.cc_projection.state_dict().items()}

    def open_archive():
        args = train.argparse.Namespace(**state["args"] | {"archive": str(tmp_path / "archive")})
        train_set, _, prepare, frozen = train.open_data(args, torch.device("cpu"))
        for position in range(0, 20, 4):
            mean, *_ = prepare(train_set[list(range(position, position + 4))])
        train.build_model(args, frozen, mean.shape[-1])

    def open_list():
        for name in data.list_objects(tmp_path / "tree"):
            assert Path(os.path.normpath(tmp_path / "tree" / name)).is_relative_to(tmp_path / "tree")
            try:
                data.list_views(tmp_path / "tree", name)
            except InputError:
                pass

    def open_ckpt():
        train.pretrained.load_pretrained(copy.deepcopy(model), pretrained.read_weights(path))
        pretrained.load_checkpoint(path)

    path, read = {
        "checkpoint": (step / "model.safetensors", lambda: pretrained.load_checkpoint(step)[0].state_dict()),
        "metadata": (step / "model.safetensors", lambda: pretrained.load_checkpoint(step) and None),
        "state": (step / "state.pt", lambda: train.newest_checkpoint(tmp_path / "run")[0]["model"]),
        "shard": (tmp_path / "archive" / "00001.safetensors", open_archive),
        "manifest": (tmp_path / "archive" / "manifest.json", open_archive),
        "manifest json": (tmp_path / "archive" / "manifest.json", open_archive),
        "npy": (tmp_path / "tree" / "00001" / "000.npy", lambda: data.read_pose(path) is None),
        "png": (tmp_path / "tree" / "00001" / "000.png", lambda: data.load_image(path, 32) and None),
        "list": (tmp_path / "tree" / "valid_paths.json", open_list),
        "ckpt": (tmp_path / "x.ckpt", open_ckpt),
        "old ckpt": (tmp_path / "x.ckpt", open_ckpt),
        "latest": (tmp_path / "run" / "latest", lambda: pretrained.find_weights(tmp_path / "run") and None),
        "log": (tmp_path / "run" / "log.jsonl", lambda: train.trim_log(path, 10)),
    }[reader]
    if "ckpt" in reader:
        torch.save({"state_dict": foreign, "epoch": 1}, path, _use_new_zipfile_serialization=reader == "ckpt")
    expected = {"checkpoint": model.state_dict(), "state": state["model"]}.get(reader)
    rng, blob, refused = random.Random(reader), path.read_bytes(), 0
    rounds = 1500 if LONG else {"checkpoint": 60, "metadata": 60, "state": 60, "shard": 60}.get(reader, 100)
    for number in range(rounds):
        if reader == "metadata":
            path.write_bytes(blob)
            reseal(path, lambda meta: meta.update(mutate_json(meta, rng)))
        elif reader == "manifest json":
            path.write_text(json.dumps(mutate_json(json.loads(blob), rng)))
        else:
            path.write_bytes(mutate(blob, rng))
        kept = path.read_bytes()
        try:
            result = read()
            assert expected is None or same(result, expected)
        except InputError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, error
        except BaseException as error:
            (tmp_path / "escaped").write_bytes(kept)
            raise AssertionError(f"number {number}, kept as {tmp_path}/escaped: {error!r}") from error
    assert refused > rounds // 20 or reader in ("latest", "log")
