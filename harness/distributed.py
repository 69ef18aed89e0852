"""Processes: the only file that names rank and world size.

One process runs the same code as many. FSDP2 shards the weights of every model over all processes,
or over groups of --shard of them.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.rendezvous import rendezvous

from .errors import UserError, printable


def check_launch() -> None:
    """Raises UserError for an environment that names a process, but not where the others are."""
    needed = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    missing = [name for name in needed if name not in os.environ]
    if missing and ("RANK" in os.environ or "WORLD_SIZE" in os.environ):
        raise UserError(f"the environment sets {' and '.join(sorted({*needed[:2]} - {*missing}))}"
                        f" but not {' and '.join(missing)}: start several processes with torchrun,"
                        " or unset what is set")


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def restart_count() -> int:
    """How often torchrun --max-restarts has started all processes again after one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def print0(text: str) -> None:
    """Prints on the main process, control characters spelled out."""
    if is_main_process():
        print(printable(text), flush=True)


def init_distributed(minutes: float = 30.0) -> torch.device:
    """Joins torchrun's processes, or forms a group of this one process. Returns its device.

    `minutes`: how long processes wait for each other."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, timeout = dist.HashStore(), timedelta(minutes=minutes)
    if "RANK" in os.environ:
        # The prefix keeps apart what processes that died have left in torchrun's store.
        store, *_ = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"start {restart_count()}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, timeout=timeout,
                            rank=int(os.environ.get("RANK", 0)), world_size=processes())
    return device


def local_slice(items: list) -> list:
    """This process's part of a list that all processes have: every W-th item."""
    return items[dist.get_rank()::processes()]


def all_gather_list(mine: list) -> list:
    """The inverse of local_slice, on every process. Items are pickled."""
    parts = [mine] * processes()
    if len(parts) > 1:  # alone, gloo's threads would slow down OpenMP's between small operations
        dist.all_gather_object(parts, mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def make_micro_batches(sizes: list[int], budget: int) -> list[list[int]]:
    """Groups neighbours whose sizes add up to at most `budget`; a larger item stands alone."""
    groups, left = [], 0
    for i, size in enumerate(sizes):
        if size > left:
            groups.append([])
            left = budget
        groups[-1].append(i)
        left -= size
    return groups


def assign_micro_batches(sizes: list[int], budget: int) -> list[list[int]]:
    """This rank's micro-batches, as lists of indices into `sizes` (tokens). Every rank gets the
    same number of micro-batches, of similar size."""
    W, order = processes(), sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    return [[order[W * i + dist.get_rank()] for i in group]
            for group in make_micro_batches([sizes[i] for i in order[::W]], budget)]


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of forward passes. Trained weights, gradients and Adam's moments are float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def apply_fsdp(model: nn.Module, device: torch.device, dtype: torch.dtype, shard: int) -> nn.Module:
    """Moves a model to its device and shards each block over `shard` processes (0: all). Weights
    are in `dtype`; those trained while others are frozen, in float32.

    One process has nothing to shard, but FSDP2 also casts weights to the dtype that computes.
    RoPE's frequencies, which are buffers, stay float32."""
    W, computing = processes(), compute_dtype(device)
    sizes = (W // shard, shard) if 0 < shard < W else (W,)
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=("copy", "shard")[-len(sizes):])
    mixed = fsdp.MixedPrecisionPolicy(computing, torch.float32, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for block in [*model.model.layers, model]:
        for p in block.parameters():
            p.data = p.data.to(device, torch.float32 if frozen and p.requires_grad else dtype)
        block.to(device)
        if W > 1:
            fsdp.fully_shard(block, mesh=mesh, mp_policy=mixed)
        elif any(p.dtype != computing for p in block.parameters()):
            fsdp.fully_shard(block, mesh=mesh, mp_policy=mixed, ignored_params=frozen)
    fsdp.register_fsdp_forward_method(model, "logprobs")
    return model


@contextmanager
def unsharded(*models: nn.Module | None) -> Iterator[None]:
    """Whole weights inside: gathered once instead of once per token. FSDP's hooks are off, so that
    a decoding step can be captured as a CUDA graph."""
    shards = [m for root in models if root is not None for m in root.modules()
              if isinstance(m, fsdp.FSDPModule)]
    hooks = [(of, dict(of)) for m in shards for of in (m._forward_pre_hooks, m._forward_hooks)]
    for m in shards:
        m.unshard()
    for of, _ in hooks:
        of.clear()
    try:
        yield
    finally:
        for of, held in hooks:
            of.update(held)
        for m in shards:
            m.reshard()


def backward(loss: Tensor, policy: nn.Module, last: bool = True) -> None:
    """Adds the gradient of the sum of all ranks' losses; FSDP alone would take their mean. Copies
    of the weights sum their gradients once per update, in its last micro-batch."""
    if isinstance(policy, fsdp.FSDPModule):
        policy.set_requires_all_reduce(last)
    (loss * processes()).backward()


def catch_stop_signals() -> list[int]:
    """A list that fills when SIGTERM or Ctrl-C arrives. A second one ends the process at once."""
    received = []

    def receive(number: int, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, receive)
    return received


def exit_process(code: int) -> None:
    """Ends the program. One of several processes skips the interpreter's shutdown.

    gloo's threads outlive the process group if FSDP was used. If one of them drops the last
    reference to a tensor during the shutdown, Python before 3.14 aborts the process."""
    if processes() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
