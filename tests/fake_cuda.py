"""Score, backward pass, optimizer step and decoding on fake CUDA tensors, which have a shape, a
dtype and a device, but no values. Shows what each tensor's are, that none lies on the CPU, and that
the host reads no value. Custom operations are represented by what they register for fake tensors.

    python tests/fake_cuda.py      runs the tests below; needs a C++ compiler

A torch without CUDA refuses gradients of such tensors, until a library that it loads says that CUDA
is there. So these tests run in a process of their own.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

CUDA_IS_THERE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>);
}
"""


def load_cuda_hooks() -> None:
    """Before torch is imported: it looks for them once."""
    torch_folder = Path(find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "hooks.cpp"), Path(folder, "hooks.so")
        source.write_text(CUDA_IS_THERE)
        subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", "-I", torch_folder / "include",
                        source, "-o", library, "-L", torch_folder / "lib", "-ltorch_cpu", "-lc10",
                        f"-Wl,-rpath,{torch_folder / 'lib'}"], check=True)
        ctypes.CDLL(str(library))


def main() -> None:
    load_cuda_hooks()
    import pytest
    code = pytest.main([__file__, "-q", "--tb=short", "-p", "no:cacheprovider", *sys.argv[1:]])
    if os.environ.get("REACHED_LINES"):
        sys.modules["conftest"].write_reached_lines()
    sys.stdout.flush()
    os._exit(code)  # autograd's threads, one for each fake device, do not survive a normal end


if __name__ == "__main__":
    main()

from functools import partial
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import LlamaConfig, LlamaForCausalLM

import latro
from conftest import stops_of
from harness import distributed
from kernels import attention, decode, rationale_score
from kernels.reference import inverse_cdf_sample
from pretended_cuda import stub_torch_cuda

CONFIG = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, eos_token_id=1,
                     max_position_embeddings=256)
K, HALF, FULL = 3, torch.bfloat16, torch.float32


class OnlyCUDA(TorchDispatchMode):
    """Fails if an operation reads or makes a tensor that is not on CUDA. Notes the operations, with
    the dtypes of their results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        made = call(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "cuda" for x in tensors), call
        dtypes = [x.dtype for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.calls.append((call.overloadpacket.__name__, dtypes))
        return made


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """All tensors are fake, in a process group of one process."""
    stub_torch_cuda(partial(monkeypatch.setattr, raising=False))
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)  # as without stubs
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    init_device_mesh = torch.distributed.init_device_mesh

    def real_mesh(*args, **options):
        """The mesh itself is a tensor on the CPU whose values count."""
        with unset_fake_temporarily():
            return init_device_mesh(*args, **options)
    monkeypatch.setattr(torch.distributed, "init_device_mesh", real_mesh)
    with FakeTensorMode():
        yield
    torch.distributed.destroy_process_group()



def make_policy(dtype, checkpointing=False):
    """As load_model makes it, with random weights. Only, it is made where it belongs, since torch
    cannot move a fake parameter that autograd already knows."""
    with torch.device("cuda"):
        model = attention.patch_model(LlamaForCausalLM(CONFIG))
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.logprobs = MethodType(latro.logprobs, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", lambda module, device: module)
        model = distributed.apply_fsdp(model, torch.device("cuda"), dtype, 0).eval()
    assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"cuda"}
    assert {x.dtype for x in model.parameters()} == {dtype}
    return model


def make_tree():
    """The tree of two questions. It is made of values, which fake tensors lack, for a policy on the
    meta device, to which real tensors can move; then it is made fake."""
    rationale = latro.Rationale([4, 5, 6], [4, 5, 6], 3, [7, 1], 3, False)
    groups = [[rationale, rationale, rationale._replace(y=[8, 9, 1], truncated=True)]] * 2
    with unset_fake_temporarily(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention.PAD_MULTIPLE, "meta", attention.PAD_MULTIPLE["cuda"])
        there = SimpleNamespace(device=torch.device("meta"), config=CONFIG)
        tree = latro.pack_tree([[2, 3, 4], [3, 2]], groups, 0.9, there)
    assert {x.device.type for x in tree_leaves(tree) if isinstance(x, torch.Tensor)} == {"meta"}
    return tree_map_only(torch.Tensor, lambda x: torch.empty(
        x.shape, dtype=x.dtype, device="cuda"), tree)


class Kernel:
    """Stands for a Triton kernel, which would read values: its arguments must lie on CUDA."""
    launches = 0

    def __getitem__(self, grid):
        def launch(*args, **options):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            assert len(tensors) > 10 and all(x.is_cuda and x.is_contiguous() for x in tensors)
            self.launches += 1
        return launch


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update(checkpointing, monkeypatch):
    """Score, backward pass and optimizer step: float32 log-probs, gradients and moments; products
    in bfloat16."""
    policy, reference = make_policy(FULL, checkpointing), make_policy(HALF)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, fused=True)
    tree = make_tree()
    monkeypatch.setattr(latro, "pack_tree", lambda *_: tree)
    monkeypatch.setattr(rationale_score, "score_question", Kernel())
    args = latro.Args(**latro.PRESETS["toy"] | dict(K=K, questions=2))
    examples = [SimpleNamespace(x=None)] * 2
    with OnlyCUDA() as operations:
        logp, scores = latro.score(policy, reference, examples, None, args)
        distributed.backward(-(scores.token_weights * logp).sum(), policy)
    T, N = len(tree.targets), 2 * K
    for tensor, size in zip((logp, *scores), [T, *[N] * 5, T], strict=True):
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((size,), FULL, "cuda")
    assert rationale_score.score_question.launches == 1
    # The products of weights; those of attention are up to SDPA. The head's are a custom operation.
    products = [dtypes for name, dtypes in operations.calls if name == "mm"]
    # A block has 7: policy and reference forwards, and twice backwards. The last one is not
    # recomputed.
    each = 4 * 7 + (6 if checkpointing else 0)
    assert products == [[HALF]] * each * CONFIG.num_hidden_layers
    assert {p.grad.dtype for p in policy.parameters()} == {FULL}
    assert {p.grad.device.type for p in policy.parameters()} == {"cuda"}
    monkeypatch.setattr(latro.nn.utils, "clip_grad_norm_", norm_without_value)
    latro.optimizer_step(policy, optimizer, 0, args)
    states = [x for state in optimizer.state.values() for x in state.values()]
    assert {x.device.type for x in states} == {"cuda"} and {x.dtype for x in states} == {FULL}


def norm_without_value(*args):
    """clip_grad_norm_, with a number in place of the norm's value, which the host would read."""
    norm = torch.nn.utils.clip_grad.clip_grad_norm_(*args)
    assert (norm.shape, norm.dtype, norm.device.type) == ((), FULL, "cuda")
    return 1.0


def test_decoding():
    """Prefill and steps, as they are captured: logits in float32, all else in bfloat16 or int64,
    and the host neither waits nor brings a tensor along."""
    policy, L = make_policy(HALF), 5
    stops = stops_tensor()
    eos, uniform = (torch.zeros(*size, device="cuda", dtype=dtype)
                    for size, dtype in (((1,), torch.long), ((2 * K, L), torch.float64)))
    criteria = latro.StopCriteria(stops, eos, L, 0)
    state = decode.DecodeState(2 * K, L, policy.device)
    decoder = decode.Decoder(policy, [[2, 3, 4], [3, 2]], K, L)
    with torch.no_grad():
        logits = decoder.prefill()
        for length in range(1, 4):
            assert (logits.shape, logits.dtype) == ((2 * K, CONFIG.vocab_size), FULL)
            decoder.set_length(length)
            with OnlyCUDA() as operations:
                numbers = uniform[state.row, state.drawn]
                state.append(inverse_cdf_sample(logits, numbers, 1.0))
                criteria.update(state)
                logits = decoder.decode_step(state.token)
    assert decoder.pace.cuda_graphs and decoder.cache.width % 128 == 0
    assert {x.dtype for kv in decoder.cache.layers.values() for x in kv} == {HALF}
    heads = [dtypes for name, dtypes in operations.calls if dtypes == [FULL] and name == "mm"]
    assert len(heads) == 1, "one product, of the head, is kept in float32"


def stops_tensor():
    with unset_fake_temporarily():
        stops = stops_of(CONFIG.vocab_size)
    return torch.empty(stops.shape, dtype=stops.dtype, device="cuda")
