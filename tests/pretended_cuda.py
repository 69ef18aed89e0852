#!/usr/bin/env python
"""Pretends that this machine has a CUDA device, so that the lines that only a GPU reaches run on a
CPU. Values are those of the CPU; times, and memory that was not asked for, mean nothing.

    python tests/pretended_cuda.py -m pytest tests/test_gpu.py -m gpu
    python tests/pretended_cuda.py latro.py --steps 1

Processes that it starts by sys.executable pretend as well. With the environment variable
REACHED_LINES, a folder, each process leaves a file there: the lines of this project that it has
run.

Tensors stay in the CPU's memory and say that they are on cuda:0, unless they were moved to the CPU.
Triton's kernels are interpreted, gloo stands for NCCL, and a tape stands for a CUDA graph. What a
GPU would refuse is refused here as well: a capture on the default stream, a wait for the device
inside a capture, or dtypes that no product of cuBLAS has.
"""

import atexit
import json
import multiprocessing
import os
import runpy
import sys
import weakref
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed import fsdp, tensor  # noqa: F401  they import before anything is replaced
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
TOTAL_MEMORY = 80e9  # bytes
HOST_WAITS = "_local_scalar_dense", "nonzero", "unique", "masked_select", "equal"
COPIED_FROM_HOST = "scalar_tensor", "lift_fresh"
FACTORIES = ("arange as_tensor empty empty_strided eye full linspace ones rand randint randn"
             " randperm tensor zeros").split()
LIKE = "empty_like full_like ones_like rand_like randn_like zeros_like".split()
METHODS = "new_empty new_full new_ones new_tensor new_zeros".split()
HALVES = torch.bfloat16, torch.float16


# ------------------------------------------------------------------------------ graphs
class Tape(TorchDispatchMode):
    """Records every operation with the tensors it was called on, and replays them. A function that
    depends on a number in Python, on a newly made tensor, or on what the host reads from the device
    would replay something else.

    Like a CUDA graph, except that capturing also runs: the first replay does nothing."""

    def __init__(self, function=None):
        super().__init__()
        self.calls, self.replays = [], 0
        if function:
            with self:
                function()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        refuse_waiting(call)
        result = call(*args, **(kwargs or {}))
        self.calls.append((call, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        if self.replays:
            for call, args, kwargs, result in self.calls:
                repeated = call(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(repeated)):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        self.replays += 1


def refuse_waiting(call) -> None:
    """Raises RuntimeError for an operation in which the host waits for the device."""
    name = call.overloadpacket.__name__
    if any(other in name for other in HOST_WAITS + COPIED_FROM_HOST):
        raise RuntimeError(f"{name} involves the host")


class WaitsAreErrors(TorchDispatchMode):
    """torch.cuda.set_sync_debug_mode("error")."""

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        refuse_waiting(call)
        return call(*args, **(kwargs or {}))


class CUDAGraph:
    """torch.cuda.CUDAGraph. After an error inside, a capture cannot end well either."""
    underway = None  # the graph that is being captured

    def capture_begin(self, pool=None, capture_error_mode="global"):
        if torch.cuda.current_stream() is DEFAULT_STREAM:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        if CUDAGraph.underway or capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError("another capture is underway, or the mode is unknown")
        CUDAGraph.underway, self.memory_pool, self.tape = self, pool or (id(self), 0), Tape()
        self.captured = False
        self.tape.__enter__()

    def capture_end(self):
        self.tape.__exit__(None, None, None)
        CUDAGraph.underway = None
        if sys.exc_info()[0]:
            raise RuntimeError("CUDA error: operation failed due to a previous error during"
                               " capture")
        self.captured = True

    def pool(self):
        return self.memory_pool if self.captured else None

    def replay(self):
        self.tape.replay()


class Stream:
    """torch.cuda.Stream: work runs at once, in the order in which it is launched."""

    def __init__(self, *_, **__):
        self.device, self.device_index, self.cuda_stream = GPU, 0, id(self)

    def wait_stream(self, other):
        assert isinstance(other, Stream)

    def wait_event(self, event):
        assert isinstance(event, Event)

    def record_event(self, event=None):
        return (event or Event()).record(self)

    def synchronize(self):
        synchronize()


class Event:
    """torch.cuda.Event. Time passes evenly: a millisecond for each event."""
    count = 0

    def __init__(self, *_, **__):
        self.time = None

    def record(self, stream=None):
        Event.count += 1
        self.time = float(Event.count)
        return self

    def wait(self, stream=None):
        assert self.time is not None, "a wait for an event that was not recorded"

    def query(self):
        return True

    def synchronize(self):
        synchronize()
        self.wait()

    def elapsed_time(self, end):
        return end.time - self.time


DEFAULT_STREAM = Stream()
streams = [DEFAULT_STREAM]  # the current one is last


@contextmanager
def stream(entered):
    """torch.cuda.stream."""
    streams.append(entered or streams[-1])
    try:
        yield
    finally:
        streams.pop()


def synchronize(device=None):
    if CUDAGraph.underway:
        raise RuntimeError("operation not permitted when stream is capturing")


def set_sync_debug_mode(mode):
    if mode == "error":
        waits.append(WaitsAreErrors())
        waits[-1].__enter__()
    elif waits:
        waits.pop().__exit__(None, None, None)


waits = []  # set_sync_debug_mode's mode, while it is on


# ------------------------------------------------------------------------------ memory
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make. Raises OutOfMemoryError beyond
    `limit`. Does not see inside custom operations."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak, self.limit = {}, 0, 0, TOTAL_MEMORY

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        made = call(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.add(getattr(tensor, "_local_tensor", tensor).untyped_storage())
        return made

    def add(self, storage):
        key, size = id(storage), storage.nbytes()
        if key in self.sizes:
            return
        if self.now + size > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        self.sizes[key] = weakref.ref(storage, lambda _: self.remove(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def remove(self, key, size):
        del self.sizes[key]
        self.now -= size

    def reset_peak(self):
        """Counts from the first call on: until then, memory is 0."""
        if not torch._C._len_torch_dispatch_stack() or self not in entered_modes():
            self.__enter__()
        self.peak = self.now

    def set_fraction(self, fraction):
        self.reset_peak()
        self.limit = fraction * TOTAL_MEMORY


def entered_modes():
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    return _get_current_dispatch_mode_stack()


# ------------------------------------------------------------------------------ torch.cuda
class device:
    """torch.cuda.device and device_of: there is one."""

    def __init__(self, of):
        assert isinstance(of, (int, str, torch.device, Tensor))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


class NCCL(c10d.ProcessGroupGloo):
    """ProcessGroupNCCL: gloo, since the tensors are in the CPU's memory."""

    class Options(SimpleNamespace):
        pass

    def __init__(self, store, rank, size, options):
        super().__init__(store, rank, size, timeout=options._timeout)


def torch_cuda() -> dict:
    """What is replaced in torch.cuda, by name."""
    properties = SimpleNamespace(name="pretended", total_memory=int(TOTAL_MEMORY), major=9, minor=0,
                                 multi_processor_count=132)
    memory = LiveBytes()
    constants = dict(
        is_available=True, is_initialized=True, device_count=1, current_device=0,
        get_device_properties=properties, get_device_name=properties.name, _lazy_init=None,
        get_device_capability=(9, 0), set_device=None, empty_cache=None, manual_seed_all=None,
        manual_seed=None, is_bf16_supported=True, _exchange_device=0, _maybe_exchange_device=0,
        mem_get_info=(int(TOTAL_MEMORY),) * 2, memory_reserved=0, set_stream=None,
        default_stream=DEFAULT_STREAM)
    functions = {name: lambda *_, value=value, **__: value for name, value in constants.items()}
    return functions | dict(
        Stream=Stream, Event=Event, CUDAGraph=CUDAGraph, stream=stream, device=device,
        device_of=device, synchronize=synchronize, set_sync_debug_mode=set_sync_debug_mode,
        current_stream=lambda device=None: streams[-1],
        is_current_stream_capturing=lambda: CUDAGraph.underway is not None,
        memory_allocated=lambda *_: memory.now, max_memory_allocated=lambda *_: memory.peak,
        reset_peak_memory_stats=lambda *_: memory.reset_peak(),
        set_per_process_memory_fraction=lambda fraction, *_: memory.set_fraction(fraction))


# ------------------------------------------------------------------------------ tensors
on_cpu = weakref.WeakValueDictionary()  # storages that were moved to the CPU, by id


def device_of(tensor) -> torch.device:
    """Where a tensor says that it is."""
    real = real_device.__get__(tensor)
    if real.type != "cpu" or not isinstance(getattr(tensor, "_local_tensor", tensor), Tensor):
        return real
    return CPU if id(getattr(tensor, "_local_tensor", tensor).untyped_storage()) in on_cpu else GPU


real_device = torch._C.TensorBase.device


def is_cuda_device(place) -> bool:
    return isinstance(place, (str, torch.device, int)) and not isinstance(place, bool) and (
        isinstance(place, int) or torch.device(place).type == "cuda")


def moved(tensor, place) -> Tensor:
    """A copy of a tensor that is on the GPU, or on the CPU."""
    if device_of(tensor).type == torch.device(place).type:
        return tensor
    copy = tensor.clone()
    return put_on_cpu(copy) if torch.device(place).type == "cpu" else copy


def put_on_cpu(tensor: Tensor) -> Tensor:
    """Marks a tensor, and what shares its memory. Results of operations on it are not marked."""
    storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
    on_cpu[id(storage)] = storage
    return tensor


class Generator(torch.Generator):
    """torch.Generator: one for any device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        pass


def making(function, default=None):
    """A factory of tensors that makes on the CPU what is asked of CUDA. `default`: the device if
    none is given; None: that of an argument."""
    @wraps(function)
    def made(*args, **options):
        place = options.get("device")
        if is_cuda_device(place):
            options["device"] = "cpu"
        made = function(*args, **options)
        is_on_cpu = not is_cuda_device(place) and (place or default) is not None
        return put_on_cpu(made) if is_on_cpu and real_device.__get__(made) == CPU else made
    return made


def in_context(real):
    """DeviceContext.__torch_function__: `with torch.device("cuda")` makes tensors on the CPU."""
    def call(context, function, types, args=(), kwargs=None):
        if context.device.type == "cuda":
            return function(*args, **(kwargs or {}))
        return real(context, function, types, args, kwargs)
    return call


def to(real):
    """Tensor.to. Flags such as non_blocking are left out: they change no value."""
    def moved_to(tensor, *args, **options):
        dtype, place = options.get("dtype"), options.get("device")
        for given in args:
            if isinstance(given, Tensor):
                place, dtype = device_of(given), given.dtype
            elif isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, (str, torch.device)):
                place = given
        if place is not None and torch.device(place).type in ("cpu", "cuda"):
            tensor = moved(tensor, place)
        elif place is not None:
            tensor = real(tensor, place)
        copied = {name: options[name] for name in ("copy", "memory_format") if name in options}
        return real(tensor, dtype or tensor.dtype, **copied)
    return moved_to


# ------------------------------------------------------------------------------ products
def mm(real):
    """torch.mm with cuBLAS's rules: operands of one dtype; the result in theirs, or in float32."""
    def multiply(a, b, out_dtype=None, *, out=None):
        check_product(a, b, out_dtype, out)
        if out_dtype in (None, a.dtype):
            return real(a, b) if out is None else real(a, b, out=out)
        product = real(a.to(out_dtype), b.to(out_dtype))
        return product if out is None else out.copy_(product)
    return multiply


def addmm(real):
    """torch.addmm with the same rules. What is added has the dtype of the result."""
    def multiply_and_add(total, a, b, out_dtype=None, *, out=None, **factors):
        if out_dtype in (None, a.dtype):
            return real(total, a, b, **factors, **({} if out is None else dict(out=out)))
        check_product(a, b, out_dtype, out)
        assert total.dtype == out_dtype, (total.dtype, out_dtype)
        result = real(total, a.to(out_dtype), b.to(out_dtype), **factors)
        return result if out is None else out.copy_(result)
    return multiply_and_add


def check_product(a, b, out_dtype, out) -> None:
    assert a.dtype == b.dtype and out_dtype in (None, a.dtype, torch.float32), (
        a.dtype, b.dtype, out_dtype)
    assert out_dtype in (None, a.dtype) or a.dtype in HALVES, (a.dtype, out_dtype)
    if out is not None:
        assert out.dtype == (out_dtype or a.dtype), (out.dtype, out_dtype)
        memory = {x.untyped_storage().data_ptr() for x in (a, b)}
        assert out.untyped_storage().data_ptr() not in memory, "out is also an operand"


# ------------------------------------------------------------------------------ lines
def record_lines(folder: str):
    """From now on, notes which lines of the project run. Written when the process ends. Returns the
    function that writes them."""
    reached, own = {}, {}

    def trace_call(frame, event, argument):
        name = frame.f_code.co_filename
        if name not in own:
            path = Path(name)
            inside = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests")
            own[name] = reached.setdefault(str(path.relative_to(ROOT)), set()) if inside else None
        return None if own[name] is None else trace_line

    def trace_line(frame, event, argument):
        if event == "line":
            own[frame.f_code.co_filename].add(frame.f_lineno)
        return trace_line

    def write() -> None:
        sys.settrace(None)
        lines = {name: sorted(numbers) for name, numbers in reached.items()}
        Path(folder, f"{os.getpid()}.json").write_text(json.dumps(lines))
    atexit.register(write)
    sys.settrace(trace_call)
    return write


# ------------------------------------------------------------------------------ start
def stub_torch_cuda(set_attribute=setattr) -> None:
    """Replaces torch.cuda and NCCL, and nothing of the tensors."""
    for name, value in torch_cuda().items():
        set_attribute(torch.cuda, name, value)
    set_attribute(c10d, "ProcessGroupNCCL", NCCL)
    set_attribute(c10d, "_NCCL_AVAILABLE", True)


def pretend() -> None:
    """From now on, for the whole process."""
    os.environ |= dict(TRITON_INTERPRET="1", PRETENDED_CUDA="1")
    _device_constructors()  # remembers what `with torch.device("meta")` changes
    DeviceContext.__torch_function__ = in_context(DeviceContext.__torch_function__)
    stub_torch_cuda()
    torch.Generator = Generator
    for owner, names, default in ((torch, FACTORIES, CPU), (torch, LIKE, None),
                                  (Tensor, METHODS, None)):
        for name in names:
            setattr(owner, name, making(getattr(owner, name), default))
    Tensor.device, Tensor.is_cuda = property(device_of), property(lambda t: device_of(t) == GPU)
    Tensor.is_cpu = property(lambda t: device_of(t) == CPU)
    Tensor.to, Tensor.get_device = to(Tensor.to), lambda t: 0
    Tensor.cuda = lambda t, *_, **__: moved(t, "cuda")
    Tensor.cpu = lambda t, *_, **__: moved(t, "cpu")
    Tensor.record_stream = lambda t, stream: None
    torch.mm, torch.addmm = mm(torch.mm), addmm(torch.addmm)
    torch.compile = lambda function=None, **_: function or (lambda f: f)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    sys.executable = str(Path(__file__).resolve())  # it is a program: see its first line
    multiprocessing.set_executable(sys.executable)


def main(argv: list[str]) -> None:
    """Runs a module (-m), code (-c) or script as python would. Flags such as -u are left out."""
    while len(argv[0]) == 2 and argv[0] not in ("-m", "-c"):
        argv = argv[1:]
    pretend()
    sys.modules["pretended_cuda"] = sys.modules[__name__]
    sys.path[0] = str(ROOT)
    if folder := os.environ.get("REACHED_LINES"):
        record_lines(folder)
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
