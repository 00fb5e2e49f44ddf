"""Nothing is lost, nothing is silently wrong: kills, signals, damaged checkpoints, full disks.

LONG=1 makes it 50 kills each of training and archiving. test_trust.py has the readers.
"""

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
from pathlib import Path

import pytest
import torch
from helpers import (
    LONG,
    ROOT,
    TINY_TRAIN,
    TORCHRUN,
    archiving,
    assert_same_run,
    at_step,
    fork,
    free_port,
    load_state,
    log_lines,
    logged,
    run_child,
    same,
    signal_itself,
    steps_with,
    training,
    wait,
    wait_or_kill,
    weights,
)
from torch.distributed.run import get_args_parser

import data
import precompute_dino
import pretrained
import train
from lib import archives, checkpoints, files, signals
from lib.cli import InputError

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="forks, which CUDA forbids: CUDA_VISIBLE_DEVICES="
)
KILLS = 50 if LONG else 6


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    """Two objects a shard; undoes at_step and poison, and what training did to signals."""
    monkeypatch.setattr(data, "SHARD_OBJECTS", 2)
    monkeypatch.setattr(train, "learning_rate", train.learning_rate)
    monkeypatch.setattr(train, "training_losses", train.training_losses)
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def poison(steps) -> None:
    """Makes the losses of these optimiser steps NaN."""
    training_losses = train.training_losses
    learning_rate = train.learning_rate
    now = None

    def note_step(step, args):
        nonlocal now
        now = step
        return learning_rate(step, args)

    def poisoned(*args):
        losses = training_losses(*args)
        return losses * float("nan") if now in steps else losses

    train.learning_rate = note_step
    train.training_losses = poisoned


def newest(run: Path) -> int:
    """The step of the newest checkpoint."""
    return checkpoints.newest_checkpoint(run)[0]["step"]


def assert_one_error(log: Path, *words: str) -> None:
    """The child printed one line of error, with these words."""
    text = log.read_text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text[-3000:]
    assert "Traceback" not in text, text[-3000:]
    for word in words:
        assert word in errors[0]


def assert_finished_alike(*runs: Path) -> None:
    """The runs ended equal bit for bit, and nothing is left half-written."""
    for run in runs:
        assert_same_run(runs[0], run, step=10)
        assert (run / "latest").read_text() == "step_0000010"
        left = {path.name for path in run.iterdir()}
        # A kill right after the last save leaves the checkpoint that it would have removed.
        left.discard("step_0000006")
        assert left == {"lock", "latest", "log.jsonl", "step_0000008", "step_0000010"}


# ------------------------------------------------------------------------------------------- kills


def kill_until_done(start, assert_done, log: Path) -> None:
    """Kills jobs at random moments and starts them again, until they end: KILLS kills in all.

    start(n) gives the main of the n-th job; assert_done(n) looks at what it left.
    """
    rng = random.Random(0)
    kills = 0
    job = 0
    longest = 0.5  # seconds within which a kill comes
    while kills < KILLS:
        began = time.monotonic()
        pid = fork(start(job), log)
        code = wait(pid, rng.uniform(0.05, longest))
        if code is None:
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
        if code == 0:
            longest = time.monotonic() - began
            assert_done(job)
            job += 1
        else:
            assert code == -signal.SIGKILL, log.read_text()[-3000:]
            kills += 1
            longest *= 1.1  # so that every job ends
    assert run_child(start(job), log) == 0, log.read_text()[-3000:]
    assert_done(job)


@pytest.mark.slow
def test_training_killed_at_random_moments_loses_nothing(small, tmp_path):
    def start(job):
        return training(small / "archive", tmp_path / str(job))

    def assert_done(job):
        assert_finished_alike(small / "run", tmp_path / str(job))
        shutil.rmtree(tmp_path / str(job))

    kill_until_done(start, assert_done, tmp_path / "log")


@pytest.mark.slow
def test_archiving_killed_at_random_moments_loses_nothing(small, tree, tmp_path):
    def start(job):
        return archiving(tree, tmp_path / str(job))

    def assert_done(job):
        expected = {path.name: path.read_bytes() for path in (small / "archive").iterdir()}
        found = {path.name: path.read_bytes() for path in (tmp_path / str(job)).iterdir()}
        assert found == expected
        assert len(found) == 9  # six shards, manifest, frozen.safetensors, lock: nothing temporary

    kill_until_done(start, assert_done, tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 4])
def test_no_held_out_loss_is_logged_twice_by_a_run_that_is_killed(small, at4, tmp_path, step):
    """It is logged before the step in which the kill comes, and the next checkpoint after it."""
    out = at4 if step == 4 else tmp_path / "new"
    work = training(small / "archive", out)
    kill = signal_itself(signal.SIGKILL)
    killed = run_child(work, tmp_path / "log", setup=lambda: at_step(step, kill))
    assert killed == -signal.SIGKILL
    assert steps_with(out, "val_loss")[-1] == step
    work()
    assert_finished_alike(small / "run", out)


# Each call that writes a checkpoint fails in turn: safetensors', torch's, the operating system's.
# Where the process dies, so do the calls that tidy up.
WRITES = [
    (torch, "save"),
    (checkpoints, "save_tensors"),
    (os, "mkdir"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
]
TIDYING = [(os, "unlink"), (os, "rmdir")]


def die(call, args, kwargs):
    """The process dies in this call, and a file that it writes is half there."""
    if call.__name__ in ("save", "save_tensors"):
        call(*args, **kwargs)
        os.truncate(args[1], os.path.getsize(args[1]) // 2)
    os._exit(77)


def find_the_disk_full(call, args, kwargs):
    raise OSError(28, "No space left on device")


def fail_at(k: int, fail, calls: list) -> None:
    """Makes the k-th of all these calls fail."""
    count = 0

    def wrap(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count - 1 == k:
                return fail(call, args, kwargs)
            return call(*args, **kwargs)

        return wrapped

    for module, name in calls:
        setattr(module, name, wrap(getattr(module, name)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fail, calls, code", [(die, WRITES + TIDYING, 77), (find_the_disk_full, WRITES, 1)]
)
def test_a_checkpoint_appears_whole_or_not_at_all(small, tmp_path, fail, calls, code):
    """Checkpoint 6 is written beside 2 and 4; every write that this takes fails once."""
    run = tmp_path / "run"
    state, ema_weights = checkpoints.newest_checkpoint(small / "at4")
    model, _, _, meta = pretrained.load_checkpoint(small / "at4")
    frozen = {key: meta[key] for key in ("encoder", "codec", "image_size", "val_fraction")}
    frozen["tensors"] = {
        name: value for name, value in ema_weights.items() if name.startswith("encoder.")
    }

    def save():
        checkpoints.save_checkpoint(run, {**state, "step": 6}, model, frozen, 2, 0)

    codes = []
    steps = []
    while codes[-2:] != [0, 0]:  # one call's failure does no harm: to make a folder that is there
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(small / "at4", run)
        k = len(codes)
        codes.append(run_child(save, tmp_path / "log", setup=lambda k=k: fail_at(k, fail, calls)))
        found, found_ema_weights = checkpoints.newest_checkpoint(run)
        steps.append(found["step"])
        assert same(found["model"], state["model"])
        assert same(found_ema_weights, ema_weights)
        if codes[-1] == 1:
            assert_one_error(tmp_path / "log", "could not be written")
    assert set(codes) == {code, 0}
    least = 9 if torch.__version__.startswith("2.6.") else 10  # torch.save makes fewer calls there
    assert codes.count(code) >= least
    assert set(steps) == {4, 6}
    assert steps == sorted(steps)
    save()
    assert sorted(path.name for path in run.glob("*step*")) == ["step_0000004", "step_0000006"]


# ---------------------------------------------------------------------------------------- resuming


def test_stopped_by_a_signal_and_started_again_equals_uninterrupted(small):
    assert_finished_alike(small / "run", small / "whole")
    assert steps_with(small / "run", "loss") == list(range(1, 11))
    assert steps_with(small / "run", "val_loss") == [0, 4, 8, 10]
    assert (small / "at4" / "preempted").exists()
    assert newest(small / "at4") == 4


def test_a_signal_in_the_last_step_leaves_the_held_out_loss_to_the_next_start(small, at4, tmp_path):
    work = training(small / "archive", at4)
    stop = signal_itself(signal.SIGTERM)
    assert run_child(work, tmp_path / "log", setup=lambda: at_step(9, stop)) == 0
    assert newest(at4) == 10
    assert (at4 / "preempted").exists()
    assert steps_with(at4, "val_loss") == [0, 4, 8]
    work()
    assert not (at4 / "preempted").exists()
    assert log_lines(at4) == log_lines(small / "run")


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    small, tmp_path, capfd, file, damage
):
    run = Path(shutil.copytree(small / "run", tmp_path / "run"))
    path = run / "step_0000010" / file
    blob = bytearray(path.read_bytes())
    middle = len(blob) // 2
    if damage == "flip":  # one bit of one weight
        blob[middle] ^= 1
        path.write_bytes(blob)
    elif damage == "cut":
        path.write_bytes(blob[:middle])
    else:
        path.unlink()
    assert newest(run) == 8
    assert f"{path.parent}: unreadable" in capfd.readouterr().err


def test_a_damaged_checkpoint_does_not_push_out_a_sound_one(small, tmp_path):
    """Even where one checkpoint is kept, and the damaged one is of a later step."""
    run = Path(shutil.copytree(small / "run", tmp_path / "run"))
    state = run / "step_0000010" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1000])
    work = training(small / "archive", run, "--keep", 1)
    at_step(8, signal_itself(signal.SIGTERM))
    work()
    assert newest(run) == 9
    assert (run / "preempted").exists()
    assert not (run / "step_0000008").exists()
    work()
    assert_same_run(run, small / "run", step=10)


def test_the_last_checkpoints_stay_and_every_nth_for_good(small, at4):
    (at4 / "step_0000001.bak").mkdir()
    flags = ["--save_every", 1, "--keep", 2, "--keep_every", 3]
    training(small / "archive", at4, *flags)()
    assert sorted(path.name for path in at4.glob("step_*")) == [
        "step_0000001.bak",
        "step_0000006",
        "step_0000009",
        "step_0000010",
    ]


def test_the_log_has_no_duplicate_or_missing_step(small, at4):
    """Whatever a kill leaves in it: later lines, other records, a torn line, bytes of no text."""
    with open(at4 / "log.jsonl", "ab") as log:
        log.write(b'{"step": 5, "loss": 0}\n3\n[]\n{"step": "x"}\n\xff\xfe{"step": 4, "lo')
    training(small / "archive", at4)()
    assert_finished_alike(small / "run", at4)


def another_archive(archive: Path, to: Path, key: str, value) -> Path:
    """A copy whose manifest says otherwise what the image encoder is."""
    shutil.copytree(archive, to)
    path = to / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["crc32"]
    manifest["encoder"][key] = value
    path.write_text(json.dumps(manifest))
    return to


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("--width", 64, "--width: .* was started with 32"),
        ("--seed", 1, "--seed: .* was started with 0"),
        ("--batch_size", 3, "--batch_size 3 on 1 process.* global batch of 8"),
        ("--archive", {"sha256": "0"}, "another encoder"),
        ("--archive", {"image_size": 64}, "another encoder"),
    ],
)
def test_what_cannot_change_within_a_run(small, at4, tmp_path, flag, value, words):
    if flag == "--archive":
        [(key, changed)] = value.items()
        value = another_archive(small / "archive", tmp_path / "other", key, changed)
    with pytest.raises(InputError, match=words):
        training(small / "archive", at4, flag, value)()


def test_what_can_change_within_a_run_is_listed(small, at4, capfd):
    flags = ["--weight_decay", 5, "--batch_size", 8, "--init", small / "run"]
    training(small / "archive", at4, *flags)()
    printed = capfd.readouterr().out
    assert "weight_decay: 0.01 -> 5" in printed
    assert "accumulate: 2 -> 1, which keeps the global batch" in printed
    assert "not read: the checkpoint's weights go on" in printed
    training(small / "archive", at4, *flags, "--accumulate", 3)()
    assert "accumulate: not 3; 1 keeps the global batch" in capfd.readouterr().out
    assert load_state(at4, 10)["optimizer"]["param_groups"][0]["weight_decay"] == 5

    def size(run):
        return sum(weight.norm() for weight in load_state(run, 10)["model"].values())

    assert size(at4) < 0.99 * size(small / "run")


def test_resuming_mends_latest(small, at4, capfd):
    (at4 / "latest").write_text("step_0000001")
    training(small / "archive", at4, "--steps", 4)()
    assert (at4 / "latest").read_text() == "step_0000004"
    assert f"{at4} has 4 steps already: nothing to train" in capfd.readouterr().out


@pytest.mark.slow
def test_resuming_takes_another_precision(small, at4):
    training(small / "archive", at4, "--precision", "fp16", "--steps", 5)()
    training(small / "archive", at4, "--steps", 6)()
    assert newest(at4) == 6


def test_a_run_of_another_versions_layers_is_not_resumed(small, at4, monkeypatch):
    saved, averaged = checkpoints.newest_checkpoint(at4)
    for tensors in (saved["model"], averaged):
        tensors["pose_mlp.4.bias"] = torch.zeros(1)
    monkeypatch.setattr(checkpoints, "newest_checkpoint", lambda out: (saved, averaged))
    with pytest.raises(InputError, match="--out .*another version of this code .*pose_mlp.4.bias"):
        training(small / "archive", at4)()


def test_others_may_read_what_is_written(small):
    """As far as the umask lets them: a job's files are often another user's input."""
    for path in [*small.glob("archive/*"), *small.glob("run/step_*/*")]:
        assert path.stat().st_mode == (small / "run" / "log.jsonl").stat().st_mode, path


def test_a_lock_clears_away_only_what_is_ours(tmp_path):
    for name in (".state.pt.12.tmp", ".tmpAb12cd"):
        (tmp_path / name).touch()
    (tmp_path / ".step.tmp").mkdir()
    others = {".notes.tmp", ".tmpfile", "x.12.tmp", ".step.tmp.old"}
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".thesis.1.tmp").mkdir()
    files.lock(tmp_path, "--out").close()
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".thesis.1.tmp", "lock"}


# --------------------------------------------------------------------------- signals and processes


def test_a_signal_to_all_processes_of_a_job_lets_the_step_end(small, at4, tmp_path):
    """Its data workers get the signal, too, and the step still needs them."""

    def setup():
        os.setsid()
        at_step(4, lambda: os.killpg(0, signal.SIGTERM))

    log = tmp_path / "log"
    assert run_child(training(small / "archive", at4, "--workers", 1), log, setup) == 0
    assert "Traceback" not in log.read_text()
    assert (at4 / "preempted").exists()
    assert newest(at4) == 5


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_lets_the_compiler_end(small, at4, tmp_path):
    """A kernel is being compiled when the signal comes; here it is one second of sleep."""
    pytest.importorskip("triton")  # the compiler has processes of its own for triton alone

    def signal_while_compiling():
        from torch._inductor.async_compile import AsyncCompile

        kernel = AsyncCompile.process_pool().submit(time.sleep, 1)
        os.killpg(0, signal.SIGTERM)
        kernel.result(400)

    def setup():
        os.setsid()
        import torch._inductor.config

        torch._inductor.config.compile_threads = 2  # its variable was read as it was imported
        torch.nn.Module.compile = lambda self, **options: None  # it takes minutes of a CPU
        at_step(4, signal_while_compiling)

    log = tmp_path / "log"
    work = training(small / "archive", at4, "--compile")
    assert run_child(work, log, setup) == 0, log.read_text()[-3000:]
    assert log.read_text().count("stopping after this step; a second signal stops at once") == 1
    assert (at4 / "preempted").exists()
    assert newest(at4) == 5


def test_a_second_signal_stops_at_once(small, at4, tmp_path):
    def signal_twice():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(9)

    work = training(small / "archive", at4)
    code = run_child(work, tmp_path / "log", setup=lambda: at_step(4, signal_twice))
    assert code == -signal.SIGUSR1
    assert newest(at4) == 4


def test_a_killed_data_worker_is_one_line(small, at4, tmp_path):
    def kill_worker():
        multiprocessing.active_children()[0].kill()

    work = training(small / "archive", at4, "--workers", 1)
    assert run_child(work, tmp_path / "log", setup=lambda: at_step(4, kill_worker)) == 1
    assert_one_error(tmp_path / "log", "DataLoader worker")
    assert newest(at4) == 4


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ZeroDivisionError", "InputError"])
def test_whatever_ends_training_its_workers_end_too(archive, tmp_path, error):
    """Otherwise Python would wait for them before it exits, and torchrun for the rank."""
    code = f"""if True:
        import sys, train
        from lib.cli import InputError, run_script
        def fail(step, args):
            raise {error}("no foreseen one" if step else "")
        train.learning_rate = fail
        run_script(train.main)"""
    flags = ["--archive", archive, "--out", tmp_path / "run", *TINY_TRAIN, "--workers", 2]
    command = [sys.executable, "-c", code, *(str(flag) for flag in flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == (error != "InputError"), done.stderr


@pytest.mark.parametrize("which", ["training", "archiving"])
def test_a_second_job_on_one_folder_refuses_and_changes_nothing(small, tree, at4, tmp_path, which):
    if which == "training":
        folder = at4
        work = training(small / "archive", at4)
    else:
        folder = Path(shutil.copytree(small / "archive", tmp_path / "archive"))
        work = archiving(tree, folder)
    with files.lock(folder, "--out"):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert run_child(work, tmp_path / "log") == 1
        assert_one_error(tmp_path / "log", str(folder), "another job")
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def run_two_ranks(work, logs: Path, act) -> list[int | None]:
    """Exit codes of two ranks of a script's main `work`, which print to LOGS/log0 and log1.

    Each calls act(rank) first.
    """
    port = free_port()
    pids = []
    for rank in (0, 1):

        def setup(rank=rank):
            os.environ["RANK"] = str(rank)
            os.environ["LOCAL_RANK"] = str(rank)
            os.environ["WORLD_SIZE"] = "2"
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            os.environ["MASTER_PORT"] = str(port)
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            act(rank)

        pids.append(fork(work, logs / f"log{rank}", setup))
    return [wait_or_kill(pid) for pid in pids]


@pytest.mark.slow
def test_ranks_that_see_different_shards_are_refused(small, tmp_path):
    """So it is while an archive is being written, or through a network's file system."""
    whole = small / "archive"
    partial = Path(shutil.copytree(whole, tmp_path / "partial"))
    archives.shard_path(partial, 1).unlink()
    link = tmp_path / "archive"

    def see_another(rank):
        os.chdir(tmp_path / str(rank))

    for rank, archive in enumerate((whole, partial)):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / link.name).symlink_to(archive)
    work = training(link.name, tmp_path / "run")
    assert run_two_ranks(work, tmp_path, see_another) == [1, 1]
    for log in ("log0", "log1"):
        words = ("--archive", "rank 1 finds other training objects", "rank 0")
        assert_one_error(tmp_path / log, *words)


@pytest.mark.slow
def test_two_ranks_compile_a_model_that_recomputes(small, tmp_path):
    """torch 2.6 fails if it cuts the graph at DDP's buckets."""

    def compile_without_inductor(rank):
        compiled = torch.nn.Module.compile
        torch.nn.Module.compile = lambda self, **_: compiled(self, backend="aot_eager")

    flags = ["--steps", 2, "--batch_size", 2, "--channel_mult", 1, 2]
    work = training(small / "archive", tmp_path / "run", *flags, "--compile", "--checkpointing")
    codes = run_two_ranks(work, tmp_path, compile_without_inductor)
    assert codes == [0, 0], (tmp_path / "log0").read_text()[-3000:]


@pytest.mark.slow
def test_a_rank_that_dies_and_another_world_size(small, at4, tmp_path):
    """Two ranks go on where one stopped, one is killed, one goes on: only rounding changes."""

    def kill_rank_1(rank):
        if rank == 1:
            at_step(6, signal_itself(signal.SIGKILL))

    work = training(small / "archive", at4, "--batch_size", 2)
    codes = run_two_ranks(work, tmp_path, kill_rank_1)
    printed = (tmp_path / "log0").read_text()
    assert codes == [1, -signal.SIGKILL], printed
    assert "processes: 1 -> 2" in printed
    assert "batch_size: 4 -> 2" in printed
    assert newest(at4) == 6
    training(small / "archive", at4)()
    for key in ("loss", "val_loss"):
        assert steps_with(at4, key) == steps_with(small / "run", key)
        assert logged(at4, key) == pytest.approx(logged(small / "run", key), rel=1e-4)


class Torchrun:
    """train.py in two processes under torchrun, which gets SIGTERM as the block is left."""

    def __init__(self, archive: Path, out: Path):
        self.out = out
        flags = [*TINY_TRAIN, "--batch_size", 2, "--steps", 100_000, "--workers", 1]
        flags += ["--val_every", 0, "--save_every", 10]
        command = [sys.executable, *TORCHRUN, "--nproc_per_node=2", ROOT / "train.py"]
        if "--shutdown-timeout" in get_args_parser().format_help():  # not in torch 2.6
            command.insert(-1, "--shutdown-timeout=60")
        command += ["--archive", archive, "--out", out, *flags]
        with open(out / "printed", "w") as printed:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=printed,
                stderr=printed,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()
        try:
            self.process.wait(200)
        finally:
            self.process.kill()

    def printed(self) -> str:
        return (self.out / "printed").read_text()

    def wait_for_lines(self, count: int) -> None:
        """Returns once the log has so many lines."""
        end = time.monotonic() + 400
        while not (self.out / "log.jsonl").exists() or len(log_lines(self.out)) < count:
            assert self.process.poll() is None, self.printed()[-3000:]
            assert time.monotonic() < end, self.printed()[-3000:]
            time.sleep(0.1)


@pytest.mark.slow
def test_torchrun_passes_the_signal_on(archive, tmp_path):
    """SIGTERM to torchrun, which signals each rank's process group."""
    with Torchrun(archive, tmp_path) as job:
        job.wait_for_lines(12)
        if LONG:  # a rank is killed, and the job started again below
            children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children")
            os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
            assert job.process.wait(200) != 0
            assert newest(tmp_path) >= 10
    if LONG:
        with Torchrun(archive, tmp_path) as job:
            job.wait_for_lines(len(log_lines(tmp_path)) + 30)
    printed = job.printed()
    steps = steps_with(tmp_path, "loss")
    assert steps == list(range(1, len(steps) + 1))
    assert newest(tmp_path) == steps[-1]
    assert (tmp_path / "preempted").exists()
    assert f"by a signal after step {steps[-1]}" in printed, printed[-3000:]
    assert "DataLoader worker" not in printed, printed[-3000:]


# ------------------------------------------------------------------------------------ disk and data


@pytest.fixture
def disk(tmp_path):
    """(folder, fill): a small disk; fill(n) leaves n bytes of it and returns a child's set-up.

    Where no disk may be mounted, that set-up limits the size of the child's files instead.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-ttmpfs", "-osize=64m", "none", folder]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def fill(left: int):
        if not mounted:
            limit = max(left, 100_000)
            return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with open(folder / "filler", "wb") as file:
            free = os.statvfs(folder)
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - left))
        return None

    yield folder, fill, mounted
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_disk_full_while_training(small, tmp_path, disk):
    folder, fill, _ = disk
    run = Path(shutil.copytree(small / "at4", folder / "run"))
    work = training(small / "archive", run)
    size = sum(path.stat().st_size for path in (run / "step_0000004").iterdir())
    for left in (0, 4096, size // 2):
        assert run_child(work, tmp_path / "log", setup=fill(left)) == 1
        assert_one_error(tmp_path / "log", str(run))
        (folder / "filler").unlink(missing_ok=True)
        assert newest(run) == 4
    assert "older checkpoints are intact" in (tmp_path / "log").read_text()
    work()
    assert_finished_alike(small / "run", run)


def test_disk_full_while_archiving(small, tree, tmp_path, disk, monkeypatch):
    folder, fill, mounted = disk
    monkeypatch.setattr(precompute_dino, "check_space", lambda *_: 0)  # it would refuse beforehand
    archive = Path(shutil.copytree(small / "archive", folder / "a"))
    for shard in (1, 3, 4, 5):
        archives.shard_path(archive, shard).unlink()
    work = archiving(tree, archive)
    size = archives.shard_path(small / "archive", 0).stat().st_size
    # Without a disk of its own each file is limited, not their sum.
    for left in (0, size // 2, 3 * size // 2) if mounted else (0, size // 2):
        assert run_child(work, tmp_path / "log", setup=fill(left)) == 1
        assert_one_error(tmp_path / "log", ".safetensors: could not be written")
        (folder / "filler").unlink(missing_ok=True)
        assert not list(archive.glob(".*"))
    assert run_child(work, tmp_path / "log") == 0
    for path in (small / "archive").iterdir():
        assert (archive / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("out", ["file/run", "/proc/run", "/sys/run"])
def test_a_folder_that_cannot_be_written(small, tree, tmp_path, out):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"--out .*{out}: "):
        training(small / "archive", tmp_path / out)()
    with pytest.raises(InputError, match=f"--archive .*{out}: "):
        archiving(tree, tmp_path / out)()


@pytest.mark.parametrize("damage", [Path.unlink, lambda shard: os.truncate(shard, 9999)])
def test_a_shard_that_goes_away_while_training(small, at4, tmp_path, damage):
    archive = Path(shutil.copytree(small / "archive", tmp_path / "archive"))

    def damage_all():
        for shard in range(6):
            damage(archives.shard_path(archive, shard))

    at_step(5, damage_all)
    with pytest.raises(InputError, match=r"archive/0000\d.safetensors: (unreadable|changed)"):
        training(archive, at4)()
    assert newest(at4) == 4


# ----------------------------------------------------------------------------- non-finite gradients


def make_sgd(model, args) -> torch.optim.Optimizer:
    groups = [
        {"params": list(model.cc_projection.parameters()), "lr_multiple": 1.0},
        {"params": [p for p in model.unet.parameters() if p.requires_grad], "lr_multiple": 1.0},
    ]
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)


@pytest.mark.parametrize("optimizer", [train.make_optimizer, make_sgd])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_non_finite_gradient_updates_nothing_and_is_counted(
    small, tmp_path, monkeypatch, optimizer, precision
):
    run = tmp_path / "run"
    monkeypatch.setattr(train, "make_optimizer", optimizer)
    poison({2})
    flags = ["--precision", precision, "--steps", 4, "--save_every", 1, "--keep", 9]
    training(small / "archive", run, *flags, "--val_every", 0)()
    before, poisoned, after = (load_state(run, step) for step in (2, 3, 4))
    assert same(before["model"], poisoned["model"])
    assert not same(poisoned["model"], after["model"])
    assert same(before["optimizer"]["state"], poisoned["optimizer"]["state"])
    assert not same(poisoned["optimizer"]["state"], after["optimizer"]["state"])

    # the loss is scaled with fp16 alone, by half as much after an overflow
    scales = [state["scaler"]["scale"] for state in (before, poisoned, after)]
    assert scales == ([65536, 32768, 32768] if precision == "fp16" else [1, 1, 1])

    # the EMA goes on, towards weights that stayed
    ema_before = weights(run, 2)
    ema_after = weights(run, 3)
    for name, raw in poisoned["model"].items():
        torch.testing.assert_close(ema_after[name], ema_before[name].lerp(raw, 1 - 4 / 13))

    assert logged(run, "skipped") == [0, 0, 1, 1]
    losses = logged(run, "loss")
    assert losses[2] is None
    assert logged(run, "grad_norm")[2] is None
    assert losses[3] > 0


@pytest.mark.parametrize("log_every", [1, 5])
def test_ten_steps_without_a_finite_gradient_stop_the_run(small, at4, log_every):
    poison(range(5, 30))
    flags = ["--steps", 30, "--log_every", log_every, "--save_every", 100, "--val_every", 0]
    with pytest.raises(InputError, match="gradient was not finite 10 steps in a row, by step 15"):
        training(small / "archive", at4, *flags)()
    assert newest(at4) == 4


def test_nine_steps_without_a_finite_gradient_do_not_stop_the_run(small, at4):
    assert train.MAX_SKIPPED == 10
    poison([*range(5, 14), *range(15, 24)])
    training(small / "archive", at4, "--steps", 25, "--save_every", 100, "--val_every", 0)()
    assert logged(at4, "skipped")[-1] == 18
