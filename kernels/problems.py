"""What goes wrong, and how it is said: one sentence, nothing in it that could steer a terminal."""

import torch
from torch.distributed import DistError


class Problem(Exception):
    """Bad input, or a run that cannot go on: one sentence that names the value and the way out."""


class Alone(Problem):
    """Trouble of one process of many: it speaks for itself, where else the first speaks for all."""


def brief(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"


def printable(text: str) -> str:
    """The text with all that could steer a terminal, or hide there, spelt out: \\x1b, \\u202e."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def exhausted(e: Exception) -> bool:
    """Whether there was no memory left: a GPU's, or the CPU's for numpy or torch."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in str(e)


def lost(e: RuntimeError) -> bool:
    """Whether another process does not answer."""
    words = "imed out", "timeout", "Connection closed", "Connection reset", "Broken pipe"
    return isinstance(e, DistError) or any(word in str(e) for word in words)
