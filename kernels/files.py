"""The files of a run: replaced whole, written by one run at a time, checked before use."""

import fcntl
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import IO

import torch
from torch.distributed.checkpoint import metadata

from .problems import Problem, brief

# All that a checkpoint's metadata names, beside dtypes and the classes of `metadata` itself.
PLAIN = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
         ("pathlib._local", "PosixPath"),
         ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
LOCKS: list[IO] = []  # open files of this process


def write(path: Path, text: str) -> None:
    """Replaces a file as a whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_text(text)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)  # a full disk leaves half of it


def logged(path: Path) -> list[dict]:
    """The rows of a log; a last line that a kill tore does not count. Raises Problem for others."""
    rows = []
    for i, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as e:
            raise Problem(f"{path}:{i}: not a row that a run has written; take that line out") from e
    return rows


def claim(path: Path) -> bool:
    """Locks a file until `release`, or until this process ends in whatever way; False where another
    process holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nothing can be said
        pass
    LOCKS.append(file)
    return True


def release() -> None:
    while LOCKS:
        LOCKS.pop().close()


def checksum(path: Path) -> int:
    """CRC-32: tells a file that was torn, or whose bits have flipped. It is no seal."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def changed(path: Path, crc: int) -> str | None:
    """What is wrong with a file that had this checksum."""
    try:
        return None if checksum(path) == crc else f"{path} is not as it was written"
    except OSError as e:
        return f"{path} cannot be read ({e.strerror})"


class Plain(pickle.Unpickler):
    """Reads what describes a checkpoint. Any pickle may name any function and have it called:
    raises UnpicklingError for all names but those that such a description needs."""

    def find_class(self, module: str, name: str):
        described = module == metadata.__name__ and isinstance(vars(metadata).get(name), type)
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if described or dtype or (module, name) in PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def plain(path: Path) -> list[str]:
    """Raises Problem for a pickle that names what a checkpoint's metadata has no use for."""
    try:
        with path.open("rb") as file:
            Plain(file).load()
    except Exception as e:  # what is no pickle at all raises whatever it likes
        raise Problem(f"{path} is not what a run writes ({brief(e)}): do not trust its"
                      " directory") from e
    return []
