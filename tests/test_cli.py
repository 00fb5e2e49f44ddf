"""lib/cli.py: flags that check themselves, and one line for what a user can cause."""

import argparse

import pytest
import torch
from helpers import script

from lib import cli
from lib.cli import ArgumentParser, InputError, run_script


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (cli.positive_int, ["1", "30000"], ["0", "-1", "1.5", "x", ""]),
        (cli.nonnegative_int, ["0", "7"], ["-1", "0.0", "nan"]),
        (cli.seed, ["0", str(2**62)], ["-1", str(2**63)]),
        (cli.finite_float, ["0", "-1e3"], ["nan", "inf", "x"]),
        (cli.positive_float, ["1e-9", "inf"], ["0", "-inf", "nan"]),
        (cli.positive_finite_float, ["1e-9"], ["0", "inf", "nan"]),
        (cli.nonnegative_float, ["0", "2.5"], ["-0.1", "inf", "nan"]),
        (cli.fraction, ["0", "0.5", "1"], ["-0.1", "1.1", "nan"]),
    ],
)
def test_types_of_flags(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lr", "-1"], "--lr -1: must be above 0"),
        (["--lr", "fast"], "--lr fast: not a number"),
        (["--form", "round"], "--form"),
        (["--unknown"], "--unknown"),
        (["--lr"], "--lr expected one argument"),
    ],
)
def test_a_wrong_flag_is_an_input_error_that_names_it(argv, words):
    parser = ArgumentParser("A script.")
    parser.add_argument("--lr", type=cli.positive_float)
    parser.add_argument("--form", choices=["square"])
    with pytest.raises(InputError, match=words) as error:
        parser.parse_args(argv)
    assert len(str(error.value).splitlines()) == 1


def fail_with(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("--flag: wrong"), "error: --flag: wrong"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"), "error"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_user_can_cause_has_no_traceback(error, code):
    with pytest.raises(SystemExit) as ended:
        run_script(fail_with(error))
    if isinstance(code, int):
        assert ended.value.code == code
    else:
        assert ended.value.code.startswith(code)
        assert len(ended.value.code.splitlines()) == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(fail_with(ZeroDivisionError("a bug")))
    with pytest.raises(RuntimeError, match="shapes"):
        run_script(fail_with(RuntimeError("shapes do not match")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, argv, words",
    [
        ("train", ["--archive", "NONE", "--out", "NONE", "--width", "48"], "manifest.json"),
        ("precompute_dino", ["--data", "NONE", "--archive", "NONE"], "NONE"),
        ("sample", ["--ckpt", "NONE", "--image", "NONE"], "NONE"),
        ("evaluate", ["--ckpt", "NONE", "--data", "NONE", "--out", "NONE/x.jsonl"], "NONE"),
        ("visualize", ["curves", "NONE", "--out", "NONE"], "NONE"),
        ("tools.shapes", ["--out", "FILE/x"], "--out"),
        ("tools.check", ["--data", "NONE"], "NONE"),
    ],
)
def test_one_line_on_the_command_line(tmp_path, name, argv, words):
    """Exit code 1, one line that names the file or the flag, no traceback."""
    (tmp_path / "FILE").touch()
    argv = [str(tmp_path / word) if word[:4] in ("NONE", "FILE") else word for word in argv]
    done = script(name, *argv, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert len(errors) == 1, done.stderr[-2000:]
    assert words in errors[0]


def test_an_error_that_is_a_bug_keeps_its_traceback():
    """A file that our code lost is no dead data worker, a kernel's memory is not /dev/shm."""

    def lose_a_file():
        open("no/such/file")  # noqa: SIM115 (it is not there)

    def ask_too_much_of_a_kernel():
        raise RuntimeError("out of resource: shared memory, Required: 2, Hardware limit: 1")

    with pytest.raises(FileNotFoundError):
        cli.run_script(lose_a_file)
    with pytest.raises(RuntimeError, match="out of resource"):
        cli.run_script(ask_too_much_of_a_kernel)
