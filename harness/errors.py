"""Errors: one sentence on stderr that says what is wrong and what to do, and exit code 1."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import DistError

OOM_HINTS = dict(sample="--K, --L or --questions",
                 score="--micro, --K or --L, or take --checkpointing",
                 backward="--micro, --K or --L, or take --checkpointing",
                 step="--shard, or take more GPUs")
# torchrun ends all processes as soon as one has ended, so the others wait this long for the main
# one's report.
REPORT_SECONDS = 10
DIVERGENCE_HINT = "try a lower --lr, a higher --beta, or another --seed"


class UserError(Exception):
    """Bad input, or a run that cannot go on: one sentence that names the value and the way out."""


class LocalRankError(UserError):
    """An error of one process only. That process reports it; for a UserError the main one does."""


def usage_error(message: str):
    """Raises UserError for a bad command line."""
    raise UserError(f"{message}; see --help")


def short_error(e: Exception) -> str:
    """The class and the first 150 characters of an exception, on one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"


def printable(text: str) -> str:
    """The text with every control or invisible character spelled out (\\x1b, \\u202e), so that
    nothing a model writes can control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def is_oom(e: Exception) -> bool:
    """Whether memory ran out: a GPU's, or the CPU's for numpy or torch."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in str(e)


def is_peer_failure(e: RuntimeError) -> bool:
    """Whether another process died or does not answer."""
    phrases = "imed out", "timeout", "Connection closed", "Connection reset", "Broken pipe"
    return isinstance(e, DistError) or any(phrase in str(e) for phrase in phrases)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the time inside to seconds[phase]. Out of memory, names the phase and what to lower."""
    start = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError as e:
        peak = torch.cuda.max_memory_allocated() / 1e9
        raise LocalRankError(f"out of GPU memory in {phase}, {peak:.1f} GB at the peak: lower"
                             f" {OOM_HINTS[phase]} ({short_error(e)}); --out keeps its last"
                             " checkpoint") from e
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] += time.perf_counter() - start


def run_cli(program: str, work: Callable[[], None], lower: str, kept: str) -> int:
    """Runs a program; returns its exit code: 0, or 1 after one line on stderr.

    `lower` names the flags to lower when memory runs out, `kept` says what an error has not cost.
    An unexpected RuntimeError is a bug and keeps its traceback."""
    from .checkpoint import release_lock
    from .distributed import check_launch, is_main_process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know only ASCII
    try:
        check_launch()
        work()
        return 0
    except UserError as e:
        message = e if is_main_process() or isinstance(e, LocalRankError) else None
    except OSError as e:
        message = f"{short_error(e)}; {kept}"
    except OverflowError as e:
        message = f"a number is too large ({short_error(e)}); see --help"
    except (MemoryError, RuntimeError) as e:
        if is_oom(e):
            message = f"out of memory: lower {lower} ({short_error(e)})"
        elif is_peer_failure(e):
            message = (f"another process has died, or hung longer than --timeout"
                       f" ({short_error(e)}); {kept}")
        else:
            raise
    finally:
        release_lock()
        if dist.is_initialized():
            dist.destroy_process_group()
    if message:
        print(printable(f"{program}: {message}"), file=sys.stderr)
    else:
        time.sleep(REPORT_SECONDS)
    return 1
