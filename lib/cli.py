"""What every command line shares: errors in one line, checked flags, help, presets."""

import argparse
import atexit
import contextlib
import math
import os
import re
import shlex
import signal
import sys

import torch
from tqdm import tqdm


class InputError(ValueError):
    """What the user gave is wrong. The message is one line that names the file or the flag."""


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, at most 160 characters."""
    return " ".join(str(error).split())[:160]


@contextlib.contextmanager
def hint(text: str):
    """Adds the text to the message of an InputError that is raised inside the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}{text}") from None


# ------------------------------------------------------------------------------------------- flags


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with defaults in the help, presets, and errors in one line.

    doc: a module's docstring, of which the first line becomes the description.
    A preset is a text file of flags, one flag and its values a line, given as `@presets/small.txt`;
    what stands behind it on the command line overrides it. Lines may hold `#` comments.
    """

    def __init__(self, doc: str | None = None, **options):
        options.setdefault("description", doc.strip().splitlines()[0] if doc else None)
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(fromfile_prefix_chars="@", **options)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def error(self, message: str):
        """Raises InputError: `argument --lr: -1: must be ...` becomes `--lr -1: must be ...`."""
        message = re.sub(r"^argument ([^\s:]+): ", r"\1 ", message)
        raise InputError(f"{message} (--help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that ends with the flag's default, where it has one worth telling."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default == [] or default is argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


def _number(text: str, kind: type, accepts, rule: str):
    """The text as a number of this kind. Raises argparse's error where `accepts` says no to it."""
    try:
        value = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text}: not {what}") from None
    if not accepts(value):
        raise argparse.ArgumentTypeError(f"{text}: must be {rule}")
    return value


def positive_int(text: str) -> int:
    return _number(text, int, lambda n: n > 0, "above 0")


def nonnegative_int(text: str) -> int:
    return _number(text, int, lambda n: n >= 0, "0 or above")


def is_rank_0() -> bool:
    """Whether this is the process that speaks for its job. It is where there is but one, too."""
    return os.environ.get("RANK", "0") == "0"


def available_cores() -> int:
    """Those that this process may use: in a container often fewer than the machine has."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def default_workers(most: int = 4) -> int:
    """The default of --workers: a process for each core that this rank may use, at most so many.

    PyTorch warns of more. Ranks of one machine share its cores.
    """
    cores = available_cores()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(most, cores // ranks))


def seed(text: str) -> int:
    return _number(text, int, lambda n: 0 <= n < 2**63, "from 0 to 2^63 - 1")


def finite_float(text: str) -> float:
    return _number(text, float, math.isfinite, "finite")


def degrees(text: str) -> float:
    """Ten turns at most: the sine of 1e300 degrees is noise."""
    return _number(text, float, lambda x: abs(x) <= 3600, "between -3600 and 3600")


def input_degrees(text: str) -> float:
    return _number(text, float, lambda x: abs(x) <= 90, "between -90 and 90")


def scene_units(text: str) -> float:
    return _number(text, float, lambda x: abs(x) <= 1000, "between -1000 and 1000")


def positive_float(text: str) -> float:
    """Above 0, and possibly infinite: `--clip inf`."""
    return _number(text, float, lambda x: x > 0, "above 0")


def positive_finite_float(text: str) -> float:
    return _number(text, float, lambda x: 0 < x < math.inf, "above 0 and finite")


def nonnegative_float(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < math.inf, "0 or above, and finite")


def fraction(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x <= 1, "from 0 to 1")


# ------------------------------------------------------------------------------------------ errors


def run_script(main) -> None:
    """Calls `main()`. What a user can cause becomes one line on standard error and exit code 1.

    That is an InputError (a data worker's, too), a GPU whose memory is too small, and a data worker
    that died. Ctrl-C gives exit code 130. Any other error is a bug and keeps its traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as error:
        # A DataLoader raises its worker's error again, with the worker's traceback as the message.
        lines = str(error).strip().splitlines() or ["invalid input"]
        stop_with(re.sub(r"^[\w.]*InputError: ", "", lines[-1]))
    except (RuntimeError, OSError, EOFError) as error:
        message = explain(error)
        if message is None:
            raise
        stop_with(message)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if "RANK" in os.environ:
        # Under torchrun the work is done here. A thread that wakes while Python takes itself down
        # can abort the process (pytorch issue 190489), and torchrun would call the job failed.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def stop_with(message: str) -> None:
    """Exits with the message, on a line of its own, and code 1."""
    end_progress_bars()
    sys.exit(f"error: {message}")


def explain(error: Exception) -> str | None:
    """One line on an error of the machine: memory, /dev/shm, open files, a dead worker.

    None for any other error, which is a bug.
    """
    text = str(error)
    if out_of_memory(error):
        tried = text.split(" GPU ")[0].rstrip(". ")  # what follows is a paragraph of advice
        return (
            f"{tried}; a smaller --batch_size takes less (train.py: with more --accumulate, or "
            "--checkpointing)"
        )
    full = (
        "shared memory object",
        "shared memory(shm)",
        "insufficient shared memory",
        "out of shared memory",
        "Bus error",
        "unable to write to file </torch_",
    )
    if any(words in text for words in full):
        return (
            "data workers ran out of shared memory (/dev/shm, 64 MB in Docker by default); "
            "start the container with --shm-size 8g, or use --workers 0"
        )
    if "Too many open files" in text or "received 0 items of ancdata" in text:
        return "too many open files; raise the limit: ulimit -n 65536"
    if "Pin memory thread exited" in text:  # its own error stands above
        return "batches could not be received, as said above; too many open files? ulimit -n 65536"
    from_worker = "DataLoader worker" in text
    lost_connection = isinstance(error, (ConnectionError, EOFError))
    if not (from_worker or lost_connection):
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would raise once more
    if lost_connection:
        return f"a DataLoader worker died ({error!r}); was memory short? Rerun to go on"
    if "Caught" in text and "Traceback" in text:
        return None  # a bug inside a worker keeps its traceback
    return f"{text.splitlines()[0]}; was it killed, because memory was short? Rerun to go on"


def out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory was too small. cuBLAS and cuDNN have their own words for it."""
    theirs = ("STATUS_ALLOC_FAILED", "unable to find an engine to execute")
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in theirs)


# --------------------------------------------------------------------------------- progress bars


class LineProgress(tqdm):
    """tqdm for log files: a plain line every 30 seconds in place of a bar that is redrawn."""

    def __init__(self, *args, **options):
        super().__init__(*args, mininterval=30, miniters=0, ascii=True, **options)

    @staticmethod
    def status_printer(file):
        def print_status(text: str) -> None:
            if text:
                file.write(text.strip() + "\n")
                file.flush()

        return print_status

    def clear(self, nolock: bool = False) -> None:
        """There is nothing to clear."""


def progress(iterable=None, **options) -> tqdm:
    """tqdm's bar, with its options, on a terminal; elsewhere a line every 30 seconds.

    Elsewhere is a log file of SLURM, nohup or CI. TQDM_DISABLE=1 silences both.
    """
    if options.get("disable") is False:
        del options["disable"]  # it would override TQDM_DISABLE
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    return LineProgress(iterable, **options)


def end_progress_bars() -> None:
    """Closes tqdm's bars, so that what is printed next starts on a new line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
