"""The directory of a run: model, logs and training state.

    out/config.json, model.safetensors, tokenizer...   an ordinary Hugging Face directory
    out/latro.json                                     settings, pi_0, schedule, name, versions
    out/metrics.jsonl, evals.jsonl, samples.jsonl      logs, one row per line
    out/state/step-000050/                             weights, AdamW's moments, checksums

Files are replaced whole, written by one run at a time, and checked before use.
"""

import dataclasses
import fcntl
import json
import os
import pickle
import shutil
import time
import uuid
import zlib
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint import state_dict as states

from .distributed import all_gather_list, is_main_process, local_slice, print0, processes
from .errors import UserError, short_error
from .export import export_model
from .lora import merge, save_adapter
from .metrics import environment

UNFINISHED = "incomplete", "export"  # a state and a model that are being written
LOGS = "metrics.jsonl", "evals.jsonl", "samples.jsonl"
# All that a checkpoint's metadata names, besides dtypes and the classes of `metadata` itself.
METADATA_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout"),
                  ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
                  ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
LOCKS: list[IO] = []  # open lock files of this process


# ------------------------------------------------------------------------------ files
def atomic_write(path: Path, text: str) -> None:
    """Replaces a file as a whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)  # a full disk leaves half of it


def append_jsonl(path: Path, row: dict) -> None:
    """Appends a row to a log in one write, on the main process. Raises UserError as check_locks."""
    if is_main_process():
        check_locks()
        with path.open("a") as f:
            f.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a log, without a last line that a kill has torn. Raises UserError for a line that
    no run has written."""
    rows = []
    for i, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as e:
            raise UserError(f"{path}:{i}: not a row that a run has written; take that line"
                            " out") from e
    return rows


def acquire_lock(path: Path) -> bool:
    """Locks a file until release_lock, or until this process ends. False if another process holds
    it. A file system without locks always grants it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    LOCKS.append(file)
    return True


def check_locks() -> None:
    """Raises UserError where a folder that this process locked was moved or deleted: its old name
    may by now be that of another run, which would be written into."""
    for file in LOCKS:
        if not (os.path.exists(file.name) and os.path.samefile(file.name, file.fileno())):
            raise UserError(f"--out {Path(file.name).parents[1]}: moved or deleted during the run."
                            " Its checkpoints went along: --resume it where it is now")


def release_lock() -> None:
    """Releases all locks of this process."""
    while LOCKS:
        LOCKS.pop().close()


def checksum(path: Path) -> int:
    """CRC-32. It detects a torn file or flipped bits; it is not a protection against tampering."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def checksum_error(path: Path, crc: int) -> str | None:
    """What is wrong with a file that had this checksum when it was written; None if nothing is."""
    try:
        return None if checksum(path) == crc else f"{path} is not as it was written"
    except OSError as e:
        return f"{path} cannot be read ({e.strerror})"


class RestrictedUnpickler(pickle.Unpickler):
    """Reads a checkpoint's metadata. A pickle can call any function it names, so this raises
    UnpicklingError for every name that such metadata does not need."""

    def find_class(self, module: str, name: str):
        described = module == metadata.__name__ and isinstance(vars(metadata).get(name), type)
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if described or dtype or (module, name) in METADATA_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check_pickle(path: Path) -> None:
    """Raises UserError for a pickle that is not a checkpoint's metadata."""
    try:
        with path.open("rb") as file:
            RestrictedUnpickler(file).load()
    except Exception as e:  # a file that is no pickle raises anything
        raise UserError(f"{path} is not what a run writes ({short_error(e)}): do not trust its"
                        " directory") from e


# ------------------------------------------------------------------------------ a run
def init_run_dir(args) -> None:
    """Makes --out, locks it and writes latro.json. Raises UserError if another run holds it."""
    out = Path(args.out)
    dist.barrier()
    if is_main_process():
        (out / "state").mkdir(parents=True, exist_ok=True)
    if not all_gather_list([is_main_process() and acquire_lock(out / "state" / "lock")])[0]:
        raise UserError(f"--out {out}: another run that is still alive writes there; stop that one,"
                        " or choose another name")
    if is_main_process() and not (out / "latro.json").exists():
        settings = dataclasses.asdict(args) | dict(resume=False)
        base = args.reference or args.model
        name = f"{out.resolve().name}-{uuid.uuid4().hex[:8]}"
        note = dict(args=settings, base=base, id=name) | environment(processes())
        atomic_write(out / "latro.json", json.dumps(note, indent=2))
    dist.barrier()


def read_run_id(args) -> str:
    """The name of a run, which no other run has."""
    return json.loads(Path(args.out, "latro.json").read_text()).get("id", Path(args.out).name)


def record_schedule(args, start: int) -> bool:
    """Notes in latro.json that the run has args.steps updates, from update `start` on, which the
    learning rate depends on. Returns whether it had another number before."""
    path = Path(args.out, "latro.json")
    note = json.loads(path.read_text())
    known = note.get("schedule", [[0, note["args"]["steps"] or args.steps]])
    schedule = [entry for entry in known if entry[0] < start] or [[0, args.steps]]
    changed = schedule[-1][1] != args.steps
    schedule += [[start, args.steps]] * changed
    note["args"] |= dict(epochs=args.epochs, steps=None if args.epochs else args.steps)
    dist.barrier()  # all have read
    if is_main_process():
        atomic_write(path, json.dumps(note | dict(schedule=schedule), indent=2))
    return changed


def save_checkpoint(args, policy, optimizer, tokenizer, step: int) -> None:
    """Saves model and training state. On failure raises UserError; older checkpoints stay and
    temporary files are removed."""
    try:
        write_checkpoint(args, policy, optimizer, tokenizer, step)
    except (dcp.CheckpointException, OSError, SafetensorError) as e:
        cause = next(iter(e.failures.values()))[0] if isinstance(e, dcp.CheckpointException) else e
        free = shutil.disk_usage(args.out).free / 1e9
        raise UserError(f"update {step} cannot be saved to {args.out} ({short_error(cause)};"
                        f" {free:.1f} GB are free): make room, then --resume from its last"
                        " state") from e
    finally:
        remove_unfinished(args)


def training_state(policy, optimizer) -> dict[str, dict]:
    """What a state holds: the parameters that are trained, and the optimizer's state."""
    model, moments = states.get_state_dict(policy, optimizer)
    # Its ignore_frozen_params would leave out only the first name of a tied weight.
    named = policy.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in named if not p.requires_grad}
    return dict(model={name: t for name, t in model.items() if name not in frozen},
                optimizer=moments)


def write_checkpoint(args, policy, optimizer, tokenizer, step: int) -> None:
    """Writes every file whole before it gets its name: the model, then the state, which makes the
    checkpoint count. Then removes old states."""
    states_dir = Path(args.out, "state")
    fresh, export = (states_dir / name for name in UNFINISHED)
    remove_unfinished(args)  # of a run that was killed
    dist.barrier()
    dcp.save(training_state(policy, optimizer), checkpoint_id=fresh)
    mine = [(f.name, checksum(f)) for f in local_slice(sorted(fresh.iterdir()))]
    sums = dict(all_gather_list(mine))
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = states.get_model_state_dict(policy, options=options)
    if is_main_process():
        if args.lora_rank:
            save_adapter(policy, whole, export / "adapter")
            whole = merge(whole, args.lora_alpha / args.lora_rank)
        export_model(policy, whole, tokenizer, export)
        move_files(export, Path(args.out))
        atomic_write(fresh / "sums.json", json.dumps(sums))
        os.replace(fresh, states_dir / f"step-{step:06d}")
        for old in sorted(states_dir.glob("step-*"))[:-args.keep]:
            shutil.rmtree(old)
    dist.barrier()


def remove_unfinished(args) -> None:
    """Removes what a save that did not finish has left, on the main process."""
    if is_main_process():
        for name in UNFINISHED:
            shutil.rmtree(Path(args.out, "state", name), ignore_errors=True)


def move_files(source: Path, target: Path) -> None:
    """Moves the files of a folder, and of the folders in it. Each replaces the one before whole."""
    for file in [path for path in sorted(source.rglob("*")) if path.is_file()]:
        moved = target / file.relative_to(source)
        moved.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, moved)


def verify_checkpoint(state: Path) -> list[str]:
    """What is wrong with the files of a state; each rank reads some of them. [] if all are whole.
    Raises UserError for metadata that no run has written."""
    try:
        sums = json.loads((state / "sums.json").read_text())
        mine = [checksum_error(state / name, crc) for name, crc in local_slice([*sums.items()])]
        errors = [error for error in all_gather_list(mine) if error]
    except (AttributeError, OSError, ValueError) as e:
        return [f"{state / 'sums.json'} cannot be read ({short_error(e)})"]
    if not errors:
        check_pickle(state / ".metadata")
    return errors


def last_state(args) -> Path | None:
    """The newest state that is whole, or None if none was ever saved. Damaged ones are renamed."""
    found = sorted(Path(args.out, "state").glob("step-*"))
    for state in reversed(found):
        errors = verify_checkpoint(state)
        if not errors:
            return state
        print0(f"{errors[0]}: going back from {state.name}")
        dist.barrier()  # all have read it
        if is_main_process():
            os.replace(state, state.with_name(f"damaged-{time.time_ns()}-{state.name}"))
    if found:
        raise UserError(f"--out {args.out}: no state in it is whole; the model in it is that of the"
                        f" last one: begin anew with --model {args.out} and another --out")
    return None


def restore_checkpoint(args, policy, optimizer) -> int:
    """Loads the last whole state and cuts the logs back to it. Returns its step; 0 without one."""
    state, step = last_state(args), 0
    if state:
        step = int(state.name.removeprefix("step-"))
        saved = training_state(policy, optimizer)
        dcp.load(saved, checkpoint_id=state)
        states.set_state_dict(policy, optimizer, model_state_dict=saved["model"],
                              optim_state_dict=saved["optimizer"],
                              options=states.StateDictOptions(strict=not args.lora_rank))
    if is_main_process():
        for path in (Path(args.out, name) for name in LOGS):
            rows = [r for r in read_jsonl(path) if r["step"] <= step] if state else []
            atomic_write(path, "".join(json.dumps(r) + "\n" for r in rows))
    return step
