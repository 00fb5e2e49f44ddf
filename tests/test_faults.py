"""Nothing lost, nothing silently wrong: kills, signals, damaged checkpoints, full disks. test_trust.py has the readers.

Children are forked from this process, which has imported everything: a kill costs a second. LONG=1 makes it 50 kills
each of training and archiving.
"""

import copy
import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import FROZEN, ROOT, SMALL, call
from safetensors.torch import load_file

import data
import precompute_dino
import pretrained
import train
from lib import archives, checkpoints, files, signals
from lib.cli import InputError, run_script

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="forks, which CUDA forbids: CUDA_VISIBLE_DEVICES="
)
LONG = bool(os.environ.get("LONG"))
KILLS = 50 if LONG else 6
TINY = [
    *FROZEN,
    "--encoder",
    "test_vit",
    "--layers",
    2,
    "--encoder_size",
    32,
    "--precision",
    "fp32",
    "--workers",
    0,
]
TRAIN = [
    *SMALL,
    "--channel_mult",
    1,
    "--attention",
    1,
    "--steps",
    10,
    "--batch_size",
    4,
    "--accumulate",
    2,
]
TRAIN += ["--save_every", 2, "--val_every", 4, "--preview_every", 0]


def fork(work, log: Path, setup=lambda: None) -> int:
    """Start setup(), then a script's main `work`, in a child; what it prints goes to `log`. Its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        setup()
        run_script(work)
        code = 0
    except SystemExit as stop:
        print(stop)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, seconds: float = 90) -> int | None:
    """The child's exit code, or minus the signal that ended it; None while it still runs after that time."""
    end = time.monotonic() + seconds
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(done[1])


def one_error(log: Path, *words: str) -> None:
    text = log.read_text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1 and "Traceback" not in text and all(word in errors[0] for word in words)
    ), text[-3000:]


def at_step(step: int, action) -> None:
    """Have something happen as optimiser step `step`, counted from 0, begins."""
    rate = train.learning_rate
    train.learning_rate = lambda now, args: (now == step and action(), rate(now, args))[1]


def poison(steps) -> None:
    """Make the losses of these optimiser steps NaN."""
    losses_of = train.training_losses
    now = [0]

    def remember(step: int) -> None:
        now[0] = step

    def poisoned(*args):
        losses = losses_of(*args)
        return losses * float("nan") if now[0] in steps else losses

    rate = train.learning_rate

    def rate_of_step(step, args):
        remember(step)
        return rate(step, args)

    train.learning_rate = rate_of_step
    train.training_losses = poisoned


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    for module, name in (
        (train, "learning_rate"),
        (train, "training_losses"),
        (data, "SHARD_OBJECTS"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def archiving(tree: Path, out: Path, seed: int = 0):
    """precompute_dino.py's main on two objects a shard."""

    def main():
        data.SHARD_OBJECTS = 2
        torch.manual_seed(seed)  # of the random encoder
        call(precompute_dino, "--data", tree, "--archive", out, *TINY)

    return main


def training(small: Path, out: Path, *flags):
    """train.py's main."""

    def main():
        data.SHARD_OBJECTS = 2
        call(train, "--archive", small / "archive", "--out", out, *TRAIN, *flags)

    return main


@functools.cache
def make_small(tree: Path) -> Path:
    """archive: six shards. at4: a run stopped by a signal in its fourth step. run: it went on. whole: never stopped."""
    (root := tree.parent / "faults").mkdir()
    for work, setup in (
        (archiving(tree, root / "archive"), lambda: None),
        (
            training(root, root / "at4"),
            lambda: at_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR1)),
        ),
        (lambda: shutil.copytree(root / "at4", root / "run"), lambda: None),
        (training(root, root / "run"), lambda: None),
        (training(root, root / "whole"), lambda: None),
    ):
        assert wait(fork(work, root / "log", setup)) == 0, (root / "log").read_text()
    return root


@pytest.fixture
def small(tree) -> Path:
    return make_small(tree)


@pytest.fixture
def at4(small, tmp_path) -> Path:
    return Path(shutil.copytree(small / "at4", tmp_path / "run"))


def newest(run: Path) -> int:
    return checkpoints.newest_checkpoint(run)[0]["step"]


def log_lines(run: Path) -> list[dict]:
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


def load_state(folder: Path) -> dict:
    return torch.load(folder / "state.pt", weights_only=True)


def same_run(*runs: Path) -> None:
    """Final weights, EMA, optimiser and log are equal bit for bit, and nothing is left half-written."""
    states = [load_state(run / "step_0000010") for run in runs]
    assert all(
        same(*(state[key] for state in states))
        for key in ("model", "optimizer", "scaler", "skipped", "losses")
    )
    assert same(*(load_file(run / "step_0000010" / "model.safetensors") for run in runs))
    assert same(*map(log_lines, runs))
    for run in runs:
        assert (run / "latest").read_text() == "step_0000010"
        assert {p.name for p in run.iterdir()} == {
            "lock",
            "latest",
            "log.jsonl",
            "step_0000008",
            "step_0000010",
        }


# ----------------------------------------------------------------------------------------------------------- kills


def kill_until_done(start, finished, log: Path) -> None:
    """start(n) gives the n-th job's main; kill it again and again at random moments until it ends; KILLS in all."""
    rng, count, job, longest = random.Random(0), 0, 0, 0.5
    while count < KILLS:
        while True:
            began, pid = time.monotonic(), fork(start(job), log)
            code = wait(pid, rng.uniform(0.05, longest) if count < KILLS else 90)
            if code is None:
                os.kill(pid, signal.SIGKILL)
                code = wait(pid)
            if code == 0:
                longest = time.monotonic() - began
                break
            assert code == -signal.SIGKILL, log.read_text()[-3000:]
            count, longest = count + 1, longest * 1.1  # so that every job ends
        finished(job)
        job += 1


def test_training_killed_at_random_moments_loses_nothing(small, tmp_path):
    def finished(job):
        same_run(small / "run", tmp_path / str(job))
        shutil.rmtree(tmp_path / str(job))

    kill_until_done(lambda job: training(small, tmp_path / str(job)), finished, tmp_path / "log")


def test_archiving_killed_at_random_moments_loses_nothing(small, tree, tmp_path):
    def finished(job):
        a, b = (
            {p.name: p.read_bytes() for p in root.iterdir()}
            for root in (small / "archive", tmp_path / str(job))
        )
        assert (
            a == b and len(a) == 9
        )  # six shards, manifest, frozen.safetensors, lock: no temporary file stays

    kill_until_done(lambda job: archiving(tree, tmp_path / str(job)), finished, tmp_path / "log")


@pytest.mark.parametrize("how", ["die", "raise"])
def test_a_checkpoint_appears_whole_or_not_at_all(small, tmp_path, how):
    """Each call that writes checkpoint 6, beside 2 and 4, dies (a half-written file behind it) or finds a full disk."""
    (state, weights), run = checkpoints.newest_checkpoint(small / "at4"), tmp_path / "run"
    meta, tensors, model = pretrained.read_model(
        small / "at4" / "step_0000004" / "model.safetensors"
    )
    meta["tensors"] = {key: value for key, value in tensors.items() if key.startswith("encoder.")}
    frozen = {
        key: meta[key] for key in ("encoder", "codec", "image_size", "val_fraction", "tensors")
    }
    writes = [(torch, "save"), (checkpoints, "save_file")]
    writes += [
        (os, name)
        for name in "mkdir fsync rename replace".split() + ["unlink", "rmdir"] * (how == "die")
    ]

    def save():
        checkpoints.save_checkpoint(
            run, state | {"step": 6}, model, frozen, Namespace(keep=2, keep_every=0)
        )

    def fail_at(k):
        calls = iter(range(99))

        def wrap(original, saves):
            def wrapped(*args, **kwargs):
                if next(calls) != k:
                    return original(*args, **kwargs)
                if how == "raise":
                    raise OSError(28, "No space left on device")
                if saves:
                    original(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os._exit(77)

            return wrapped

        for module, name in writes:
            setattr(module, name, wrap(getattr(module, name), "save" in name))

    codes, steps = [], []
    while 0 not in codes:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(small / "at4", run)
        codes.append(wait(fork(save, tmp_path / "log", lambda: fail_at(len(codes)))))
        found, ema = checkpoints.newest_checkpoint(run)
        steps.append(found["step"])
        assert same(found["model"], state["model"]) and same(ema, weights)
        if codes[-1] == 1:
            one_error(tmp_path / "log", "could not be written")
    assert set(codes[:-1]) == {1 if how == "raise" else 77} and len(codes) > 9
    assert set(steps) == {4, 6} and steps == sorted(steps)
    save()
    assert sorted(p.name for p in run.glob("*step*")) == ["step_0000004", "step_0000006"]


# -------------------------------------------------------------------------------------------------------- resuming


def test_stopped_by_a_signal_and_started_again_equals_uninterrupted(small):
    same_run(small / "run", small / "whole")
    assert (small / "at4" / "preempted").exists() and newest(small / "at4") == 4


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    small, tmp_path, capfd, file, how
):
    """Even for one bit of one weight; and where one is kept, the damaged one does not push a sound one out."""
    shutil.copytree(small / "run", run := tmp_path / "run")
    path = run / "step_0000010" / file
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.unlink() if how == "gone" else path.write_bytes(
        blob[: len(blob) // 2] if how == "cut" else blob
    )
    assert newest(run) == 8
    assert f"{path.parent}: unreadable" in capfd.readouterr().err
    if how == "flip" and file == "state.pt":
        at_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        training(small, run, "--keep", 1)()
        assert (
            newest(run) == 9
            and (run / "preempted").exists()
            and not (run / "step_0000008").exists()
        )
        training(small, run, "--keep", 1)()
        assert same(
            load_state(run / "step_0000010")["model"],
            load_state(small / "run" / "step_0000010")["model"],
        )


def test_the_last_checkpoints_stay_and_every_nth_for_good(small, at4):
    (at4 / "step_0000001.bak").mkdir(parents=True)
    training(small, at4, "--save_every", 1, "--keep", 2, "--keep_every", 3)()
    there = [path.name[:12] for path in sorted(at4.glob("step_*"))]
    assert there == ["step_0000001", *(f"step_{step:07d}" for step in (6, 9, 10))]


def test_log_has_no_duplicate_or_missing_step(small, at4):
    """Whatever a kill leaves in it: lines beyond the checkpoint, a torn one, bytes that are no text."""
    with open(at4 / "log.jsonl", "ab") as file:
        file.write(b'{"step": 5, "loss": 0}\n3\n[]\n{"step": "x"}\n\xff\xfe{"step": 4, "lo')
    training(small, at4)()
    same_run(small / "run", at4)
    assert [line["step"] for line in log_lines(at4) if "loss" in line] == list(range(1, 11))


def test_changed_flags_are_listed_and_some_refused(small, at4, tmp_path, capfd):
    other = tmp_path / "other"
    shutil.copytree(small / "archive", other)
    text = (other / "manifest.json").read_text().replace('"crc32"', '"edited by hand"')
    (other / "manifest.json").write_text(text.replace('"sha256": "', '"sha256": "0'))
    shutil.copytree(other, finer := tmp_path / "finer")
    manifest = json.loads(text)
    manifest["encoder"]["image_size"] *= 2
    (finer / "manifest.json").write_text(json.dumps(manifest))
    for flag, value, words in (("width", 64, "--width"), ("seed", 1, "--seed"), ("archive", finer, "another encoder"),
                               ("batch_size", 3, "--batch_size 3"), ("archive", other, "another encoder")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            training(small, at4, f"--{flag}", value)()
    capfd.readouterr()
    training(small, at4, "--weight_decay", 5, "--batch_size", 8, "--init", small)()
    printed = capfd.readouterr().out
    assert (
        "weight_decay: 0.01 -> 5" in printed
        and "accumulate: 2 -> 1, which keeps the global batch of 8" in printed
    )
    assert "not read: the checkpoint's weights go on" in printed
    assert load_state(at4 / "step_0000010")["optimizer"]["param_groups"][0]["weight_decay"] == 5
    norm = {
        run: sum(w.norm() for w in load_state(run / "step_0000010")["model"].values())
        for run in (at4, small / "run")
    }
    assert norm[at4] < 0.99 * norm[small / "run"]


def test_resuming_mends_latest_and_takes_another_precision(small, at4):
    (at4 / "latest").write_text("step_0000001")
    training(small, at4, "--steps", 4)()
    assert (at4 / "latest").read_text() == "step_0000004"
    training(small, at4, "--precision", "fp16", "--steps", 5)()
    training(small, at4, "--steps", 6)()
    assert newest(at4) == 6


def test_a_lock_clears_away_only_what_is_ours(tmp_path):
    ours, others = (
        [".state.pt.12.tmp", ".tmpAb12cd"],
        [".notes.tmp", ".tmpfile", "x.12.tmp", ".step.tmp.old"],
    )
    for name in ours + others:
        (tmp_path / name).touch()
    (tmp_path / ".step.tmp").mkdir()
    (tmp_path / ".thesis.1.tmp").mkdir()
    files.lock(tmp_path, "--out").close()
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".thesis.1.tmp", "lock"}


# ------------------------------------------------------------------------------------------- signals and processes


def test_signals_and_a_killed_worker(small, tmp_path):
    """A signal to the process group, which a data worker is in; a second signal; a data worker killed."""

    def stop_twice():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(9)

    def group():
        os.setsid()
        at_step(4, lambda: os.killpg(0, signal.SIGTERM))

    setups = {"group": group, "twice": lambda: at_step(4, stop_twice)}
    setups["worker"] = lambda: at_step(4, lambda: multiprocessing.active_children()[0].kill())
    pids = {}
    for name, setup in setups.items():
        shutil.copytree(small / "at4", tmp_path / name)
        pids[name] = fork(
            training(small, tmp_path / name, "--workers", 1), tmp_path / f"{name}.log", setup
        )
    codes = {name: wait(pid) for name, pid in pids.items()}
    assert codes == {"group": 0, "twice": -signal.SIGUSR1, "worker": 1}, (
        tmp_path / "group.log"
    ).read_text()
    assert (tmp_path / "group" / "preempted").exists() and newest(tmp_path / "group") == 5
    assert not any("Traceback" in (tmp_path / f"{name}.log").read_text() for name in setups)
    one_error(tmp_path / "worker.log", "DataLoader worker")
    assert newest(tmp_path / "twice") == newest(tmp_path / "worker") == 4


def test_a_signal_leaves_the_compiler_at_work(small, tmp_path):
    """torchrun's goes to the whole process group, which inductor's own processes are in."""
    pytest.importorskip("triton")  # the pool is for kernels of triton alone

    def interrupt():
        from torch._inductor.async_compile import AsyncCompile

        kernel = AsyncCompile.process_pool().submit(time.sleep, 1)
        os.killpg(0, signal.SIGTERM)
        kernel.result(60)

    def setup():
        os.setsid()
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
        torch.nn.Module.compile = lambda self, **options: None  # inductor takes minutes of a CPU
        at_step(4, interrupt)

    shutil.copytree(small / "at4", tmp_path / "run")
    log = tmp_path / "log"
    assert wait(fork(training(small, tmp_path / "run", "--compile"), log, setup)) == 0, (
        log.read_text()
    )
    assert (tmp_path / "run" / "preempted").exists() and newest(tmp_path / "run") == 5


@pytest.mark.parametrize("error", ["ZeroDivisionError", "InputError"])
def test_whatever_ends_training_its_workers_end_too(archive, tmp_path, error):
    """Else Python would wait for them before it exits, and torchrun for the rank."""
    code = f"""if True:
        import sys, train
        from lib.cli import InputError, run_script
        def fail(step, args):
            raise {error}("no foreseen one" if step else "")
        train.learning_rate = fail
        run_script(train.main)"""
    flags = [
        "--archive",
        archive,
        "--out",
        tmp_path / "run",
        *TRAIN,
        "--batch_size",
        2,
        "--workers",
        2,
    ]
    command = [sys.executable, "-c", code, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("Traceback") == (error != "InputError"), (
        done.stderr
    )


def test_two_jobs_on_one_folder(small, tree, at4, tmp_path):
    """The second one refuses and changes nothing."""
    shutil.copytree(small / "archive", tmp_path / "archive")
    for folder, work in (
        (at4, training(small, at4)),
        (tmp_path / "archive", archiving(tree, tmp_path / "archive")),
    ):
        held = files.lock(folder, "--out")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert wait(fork(work, tmp_path / "log")) == 1
        one_error(tmp_path / "log", str(folder), "another job")
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        held.close()


def two_ranks(work, logs: Path, act) -> list[int | None]:
    """Exit codes of two ranks of a script's main `work`; each calls act(rank) first, and prints to log0 or log1."""
    port, pids = str(random.randrange(20000, 40000)), []
    for rank in (0, 1):

        def setup(rank=rank):
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"
            )
            os.environ.update(MASTER_PORT=port)
            act(rank)

        pids.append(fork(work, logs / f"log{rank}", setup))
    return [wait(pid) for pid in pids]


def test_ranks_that_see_different_shards_are_refused(small, tmp_path):
    """As nodes do of an archive that is still being written, or through a network's file system."""

    def hide(rank):
        exists = Path.exists
        if rank:
            Path.exists = lambda path: path.name != "00001.safetensors" and exists(path)

    codes = two_ranks(training(small, tmp_path / "run"), tmp_path, hide)
    assert codes == [1, 1]
    one_error(tmp_path / "log1", "--archive", "rank 1 finds other training objects", "rank 0")


def test_a_rank_that_dies_and_another_world_size(small, at4, tmp_path):
    """Two ranks go on where one process stopped; one is killed in step 7; one process goes on from 6: only rounding."""

    def kill(rank):
        at_step(6, lambda: rank and os.kill(os.getpid(), signal.SIGKILL))

    codes = two_ranks(training(small, at4, "--batch_size", 2), tmp_path, kill)
    printed = (tmp_path / "log0").read_text()
    assert (
        codes == [1, -signal.SIGKILL]
        and "processes: 1 -> 2" in printed
        and "batch_size: 4 -> 2" in printed
    ), printed
    assert newest(at4) == 6
    training(small, at4)()
    for a, b in zip(log_lines(at4), log_lines(small / "run"), strict=True):
        key = "loss" if "loss" in a else "val_loss"
        assert a["step"] == b["step"] and a[key] == pytest.approx(b[key], rel=1e-4)


def test_torchrun_passes_the_signal_on(archive, tmp_path):
    """SIGTERM to torchrun, which signals each rank's process group; LONG: started anew after a rank was killed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [
        *TRAIN,
        "--batch_size",
        2,
        "--steps",
        100_000,
        "--workers",
        1,
        "--val_every",
        0,
        "--save_every",
        10,
    ]
    command = [
        *launch,
        "--shutdown-timeout=60",
        ROOT / "train.py",
        "--archive",
        archive,
        "--out",
        tmp_path,
        *flags,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def start():
        with open(tmp_path / "out", "w") as out:
            return subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=env)

    def wait_for(lines):
        end = time.monotonic() + 100
        while not (tmp_path / "log.jsonl").exists() or len(log_lines(tmp_path)) < lines:
            assert time.monotonic() < end and agent.poll() is None, (tmp_path / "out").read_text()[
                -3000:
            ]
            time.sleep(0.1)

    agent = start()
    wait_for(12)
    if LONG:
        ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        assert agent.wait(60) and newest(tmp_path) >= 10
        agent = start()
        wait_for(len(log_lines(tmp_path)) + 30)
    agent.send_signal(signal.SIGTERM)
    agent.wait(60)
    printed, steps = (tmp_path / "out").read_text(), [line["step"] for line in log_lines(tmp_path)]
    assert (tmp_path / "preempted").exists() and f"by a signal after step {steps[-1]}" in printed, (
        printed[-3000:]
    )
    assert steps == list(range(1, len(steps) + 1)) and newest(tmp_path) == steps[-1]
    assert "DataLoader worker" not in printed, printed[-3000:]


# --------------------------------------------------------------------------------------------------- disk and data


@pytest.fixture
def disk(tmp_path):
    """(folder, fill): a small disk, what leaves so many bytes of it; or a file size limit where none may be mounted."""
    (folder := tmp_path / "disk").mkdir()
    mounted = not subprocess.run(
        ["mount", "-ttmpfs", "-osize=64m", "none", folder], capture_output=True
    ).returncode

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
    run = Path(shutil.copytree(small / "at4", folder / "run"))
    size = sum(path.stat().st_size for path in (run / "step_0000004").iterdir())
    for left in (0, 4096, size // 2):
        assert wait(fork(training(small, run), tmp_path / "log", fill(left))) == 1
        one_error(tmp_path / "log", str(run), "rror" if left < 4097 else "intact")
        (folder / "filler").unlink(missing_ok=True)
        assert newest(run) == 4
    training(small, run)()
    same_run(small / "run", run)


def test_disk_full_while_archiving(small, tree, tmp_path, disk, monkeypatch):
    folder, fill = disk
    monkeypatch.setattr(precompute_dino, "check_space", lambda *_: 0)  # it would refuse beforehand
    shutil.copytree(small / "archive", folder / "a")
    for shard in (1, 3, 4, 5):
        archives.shard_path(folder / "a", shard).unlink()
    size = archives.shard_path(small / "archive", 0).stat().st_size
    for left in (0, size // 2, 3 * size // 2):
        assert wait(fork(archiving(tree, folder / "a"), tmp_path / "log", fill(left))) == 1
        one_error(tmp_path / "log", ".safetensors: could not be written")
        (folder / "filler").unlink(missing_ok=True)
        assert not list((folder / "a").glob(".*"))
    assert wait(fork(archiving(tree, folder / "a"), tmp_path / "log")) == 0
    assert all(
        path.read_bytes() == (folder / "a" / path.name).read_bytes()
        for path in (small / "archive").iterdir()
    )


@pytest.mark.parametrize("out", ["file/run", "/proc/run", "/sys/run"])
def test_a_folder_that_cannot_be_written(small, tree, tmp_path, out):
    (tmp_path / "file").touch()
    for work, flag in (
        (training(small, tmp_path / out), "--out"),
        (archiving(tree, tmp_path / out), "--archive"),
    ):
        with pytest.raises(InputError, match=f"{flag} .*{out}: "):
            work()


@pytest.mark.parametrize("how", ["gone", "truncated"])
def test_a_shard_that_goes_away_while_training(small, at4, tmp_path, how):
    shutil.copytree(small / "archive", tmp_path / how)
    shards = [archives.shard_path(tmp_path / how, i) for i in range(6)]
    at_step(
        5,
        lambda: [shard.unlink() if how == "gone" else os.truncate(shard, 9999) for shard in shards],
    )
    with pytest.raises(InputError, match=rf"{how}/0000\d.safetensors: (unreadable|changed)"):
        training(small, at4, "--archive", tmp_path / how)()
    assert newest(at4) == 4


def test_a_non_finite_gradient_updates_nothing_and_is_counted(small, at4):
    poison({6})
    training(small, at4, "--save_every", 1, "--keep", 9)()
    steps = {step: at4 / f"step_{step:07d}" for step in (6, 7, 8)}
    states = {step: load_state(folder) for step, folder in steps.items()}
    for key in ("model", "optimizer"):
        six, seven, eight = (copy.copy(states[step][key]) for step in steps)
        [group.pop("lr") for group in six.get("param_groups", []) + seven.get("param_groups", [])]
        assert same(six, seven) and not same(seven, eight)
    before, after = (load_file(steps[step] / "model.safetensors") for step in (6, 7))
    for name, raw in states[7]["model"].items():  # the EMA goes on, towards weights that stayed
        torch.testing.assert_close(after[name], before[name].lerp(raw, 1 - 8 / 17))
    lines = {line["step"]: line for line in log_lines(at4) if "loss" in line}
    assert [lines[step]["skipped"] for step in (6, 7, 8, 10)] == [0, 1, 1, 1]
    assert lines[7]["loss"] is None and lines[7]["grad_norm"] is None and lines[8]["loss"] > 0


def test_non_finite_gradients_in_a_row_stop_the_run(small, at4):
    poison(range(5, 8))
    for every, step in ((1, 8), (9, 9)):  # at the ninth it has been finite again
        with pytest.raises(InputError, match=f"not finite 3 steps in a row, by step {step}"):
            training(
                small,
                at4,
                "--max_skips",
                3,
                "--log_every",
                every,
                "--save_every",
                9,
                "--val_every",
                0,
            )()
    assert newest(at4) == 4
