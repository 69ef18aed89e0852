"""--plan against runs: bytes of weights, gradients, Adam, reference and cache exactly; activations
against every tensor that a forward and a backward pass keep alive; FLOPs against torch's counter.
test_gpu.py compares the peak of a whole run."""

import os
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import kernels
import latro
from conftest import TOY
from kernels import planner, sampler

SHAPE = dict(vocab_size=1000, hidden_size=128, intermediate_size=360, num_hidden_layers=5,
             num_attention_heads=8, num_key_value_heads=2, eos_token_id=1, pad_token_id=0,
             bos_token_id=2, max_position_embeddings=1024)
CONFIGS = dict(llama=hf.LlamaConfig(**SHAPE), phi3=hf.Phi3Config(**SHAPE),
               tied=hf.Qwen2Config(**SHAPE, tie_word_embeddings=True),
               qwen3=hf.Qwen3Config(**SHAPE, head_dim=32))
X, L, Y, K = 40, 60, 10, 4  # tokens of prompt, rationale and answer; rationales
each_model = pytest.mark.parametrize("name", CONFIGS)


def args(**other):
    given = dict(model="m", task="qa", data="d", questions=2, K=K, L=L, micro=1)
    return latro.Args(**given | other)


def shape(name, W=1, **other):
    return memory.Shape(CONFIGS[name], args(**other), W, X, Y)


def model(name, dtype=torch.float32, checkpointing=False):
    policy = hf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    policy.set_attn_implementation("latro")
    policy.logprobs = latro.logprobs.__get__(policy)
    if checkpointing:
        policy.gradient_checkpointing_enable()
    return policy


def tree(policy):
    """A question whose rationales all run into L."""
    group = [latro.Rationale([], [5] * L, L, [6] * Y, L, True)] * K
    return latro.pack_tree([[4] * X], [group], 1.0, policy)


class Alive(TorchDispatchMode):
    """Bytes of all storages that operations have made since, and the most there ever were."""

    def __init__(self, policy):
        super().__init__()
        held = [x.untyped_storage() for p in policy.parameters() for x in (p, p.grad)
                if x is not None]
        self.known = {id(s): s for s in held}
        self.now = self.peak = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        made = call(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and id(s := t.untyped_storage()) not in self.known:
                n, name = s.nbytes(), id(s)
                self.known[name] = weakref.ref(s, lambda _, name=name, n=n: self.gone(name, n))
                self.now += n
                self.peak = max(self.peak, self.now)
        return made

    def gone(self, name, n):
        del self.known[name]
        self.now -= n


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@each_model
def test_activations(name, dtype, checkpointing):
    """A CPU's attention returns Phi-3's heads in an order that takes a
    copy."""
    policy, e = model(name, dtype, checkpointing).train(), dtype.itemsize
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    s = shape(name, checkpointing=checkpointing)
    planned, copy = memory.memory_phases(s, e), s.S * s.H * e * (name == "phi3")
    with Alive(policy) as alive:
        t = tree(policy)
        layout = t.layout.biased(torch.empty(0, dtype=dtype), policy.config)
        h = policy.model(input_ids=t.ids, attention_mask=layout.branches, layout=layout,
                         position_ids=t.position, use_cache=False).last_hidden_state
        copies = copy * (1 if checkpointing else s.layers)
        kept = planned["head"]["activations"] + (0 if checkpointing else copies)
        assert alive.now == pytest.approx(kept, rel=0.05)
        alive.peak = 0
        h.sum().backward()
    assert alive.peak == pytest.approx(planned["layer"]["activations"] + copies, rel=0.06)
    assert t.ids.numel() == s.S and len(t.targets) == s.T


@pytest.mark.parametrize("checkpointing", [False, True])
@each_model
def test_flops(name, checkpointing):
    """All but attention's, which torch's counter does not see on a CPU."""
    policy = model(name, checkpointing=checkpointing).train()
    s = shape(name, beta=0.0, questions=1, checkpointing=checkpointing)
    with FlopCounterMode(display=False) as counted:
        policy.logprobs(tree(policy)).sum().backward()
    attention = (3 + checkpointing) * 4 * s.pairs * s.H * s.layers
    assert counted.get_total_flops() == pytest.approx(memory.flops(s) - attention, rel=0.01)


def test_flops_of_the_reference():
    """One forward pass more."""
    policy = model("llama")
    s, without = (shape("llama", beta=beta, checkpointing=False) for beta in (1.0, 0.0))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        policy.logprobs(tree(policy))
    more = memory.flops(s) - memory.flops(without) - s.questions * 4 * s.pairs * s.H * s.layers
    assert s.questions * counted.get_total_flops() == pytest.approx(more, rel=0.01)


@pytest.fixture
def processes(monkeypatch):
    """A function that makes this process the first of W, the others pretended."""
    def join(W):
        monkeypatch.setenv("WORLD_SIZE", str(W))
        dist.init_process_group("fake", rank=0, world_size=W, store=FakeStore())
    yield join
    dist.destroy_process_group()


@pytest.mark.parametrize("W, group", [(1, 0), (2, 0), (3, 0), (8, 0), (8, 2), (8, 4)])
@each_model
def test_bytes_at_rest(name, W, group, processes, tmp_path):
    """Weights, gradients, Adam's moments and the reference, to the byte."""
    processes(W)
    CONFIGS[name].save_pretrained(tmp_path)
    model(name).save_pretrained(tmp_path)
    run = args(model=str(tmp_path), questions=2 * W, shard=group)
    policy, reference = (latro.load_model(run, torch.device("cpu"), torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()

    def held(tensors):
        own = {s.data_ptr(): s.nbytes() for s in (
            getattr(t, "to_local", lambda t=t: t)().untyped_storage() for t in tensors)}
        return sum(own.values())
    planned = memory.memory_phases(memory.Shape(CONFIGS[name], run, W), e=4)["layer"]
    moments = [t for state in optimizer.state.values() for t in state.values()]
    assert held(policy.parameters()) == planned["weights"]
    assert held(reference.parameters()) == planned["reference"]
    assert held(p.grad for p in policy.parameters()) == planned["gradients"]
    assert held(moments) == planned["Adam"]


class Received(TorchDispatchMode):
    """Bytes that a GPU receives in collectives, as a ring does them."""
    inside = across = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.name()
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            some, whole = sorted(t.nbytes for t in args[:2])
            self.inside += whole - some
        elif name == "c10d::allreduce_":
            self.across += sum(t.nbytes for t in args[0])
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("W, group, micro, beta", [
    (8, 0, 1, 0.1), (8, 0, 10**6, 0.0), (8, 4, 1, 0.0), (8, 2, 600, 0.1)])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_traffic(name, W, group, micro, beta, processes, tmp_path):
    """What FSDP2 hands to the collectives in an update: its second, for what the reference has
    gathered of embedding and head it keeps."""
    processes(W)
    model(name).save_pretrained(tmp_path)
    run = args(model=str(tmp_path), questions=4 * W, shard=group, micro=micro, beta=beta)
    policy, reference = (latro.load_model(run, torch.device("cpu"), torch.float32) for _ in range(2))
    some = [latro.Rationale([], [5] * L, L, [6] * Y, L, True)] * K
    questions, groups = [data.Example("", "", [4] * X, [6] * Y, [])] * 4, [some] * 4
    passes = distributed.make_micro_batches([*map(latro.tree_size, questions, groups)], micro)
    for _ in range(2):
        with Received() as received:
            with distributed.unsharded(policy):
                pass
            for some in passes:
                logp, _ = latro.score(policy, reference if beta else None, questions[:len(some)],
                                      groups[:len(some)], run)
                distributed.backward(logp.sum(), policy, last=some is passes[-1])
    inside, across = memory.bytes_received(memory.Shape(CONFIGS[name], run, W, X, Y), e=4)
    copies = W // (group or W)
    assert received.inside == pytest.approx(inside, rel=0.01)
    assert received.across * 2 * (copies - 1) / copies == pytest.approx(across, rel=0.01)


@each_model
def test_cache(name, monkeypatch):
    """To the byte, as a GPU would have it; rows that end cost half a layer of half of it."""
    monkeypatch.setitem(decode.PACES, "cpu", decode.PACES["cuda"])
    policy, s = model(name).eval(), shape(name)
    with torch.no_grad(), Alive(policy) as alive:
        decoder = decode.Decoder(policy, [[4] * X] * s.questions, K, L)
        decoder.begin()
        decoder.shape(L)
        held = sum(t.nbytes for kv in decoder.cache.kv.values() for t in kv)
        alive.peak = before = alive.now
        decoder.keep(torch.arange(s.rows // 2))
    some = held // s.layers // 4
    assert held + some == memory.memory_phases(s, e=4)["sample"]["cache"]
    assert some / 2 < alive.peak - before <= some


def test_dz_is_that_of_the_kernel():
    token_logprob = pytest.importorskip("kernels.token_logprob")
    assert memory.DZ == token_logprob.DZ_BYTES


@pytest.mark.parametrize("device, e", [("cuda", 2), ("cpu", 4)])
def test_activations_are_computed_again_where_they_do_not_fit(device, e, monkeypatch):
    """As --plan says of a card of that size, or of half of a host's memory, unless the flag
    decides."""
    config, device = CONFIGS["llama"], torch.device(device)
    needs = {again: memory.peak_bytes(memory.memory_phases(memory.Shape(
        config, args(checkpointing=again), 1), e)) for again in (False, True)}
    assert needs[True] < needs[False]
    for memory, crowded in ((needs[False], False), (needs[False] - 1, True), (1, True)):
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda _: SimpleNamespace(total_memory=1.06 * memory + 0.1))
        monkeypatch.setattr(os, "sysconf", dict(SC_PAGE_SIZE=2, SC_PHYS_PAGES=memory).get)
        assert memory.needs_activation_checkpointing(config, args(), 1, device) == crowded
        assert memory.needs_activation_checkpointing(config, args(checkpointing=True), 1, device)
        assert not memory.needs_activation_checkpointing(config, args(checkpointing=False), 1, device)


def test_weights_are_not_loaded(monkeypatch, capsys):
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", None)
    assert not latro.main(["--plan", "8", "--model", str(TOY)])
    printed = capsys.readouterr().out
    assert "GPUs: 8, each with 3 questions" in printed and "card of 16 GB" in printed


def test_columns_add_up(capsys):
    """Also in a directory that holds a run: a plan writes nothing."""
    assert not latro.main(["--plan", "4", "--questions", "8"])
    head, *lines = capsys.readouterr().out.splitlines()[1:]
    table = {name: cells for name, *cells in map(str.split, lines) if len(cells) == 5}
    for i, moment in enumerate(head.split()[3:]):
        column = [float(cells[i]) for name, cells in table.items()
                  if name != "total" and cells[i] != "-"]
        assert float(table["total"][i]) == pytest.approx(sum(column), abs=0.03), moment


@pytest.mark.parametrize("flags, fewer", [
    (dict(beta=0.0), "reference"), (dict(micro=1), "activations"), (dict(L=30), "cache"),
    (dict(K=2), "cache"), (dict(shard=0), "weights"), (dict(questions=4), "cache")])
def test_what_lowers_what(flags, fewer):
    """Each of the flags that an out-of-memory message names, at the moments that it should."""
    some = dict(questions=8, micro=9999, shard=2, L=200)
    more, less = (memory.memory_phases(shape("llama", 4, **some | other)) for other in ({}, flags))
    for moment, held in more.items():
        if fewer in held:
            assert less[moment].get(fewer, 0) < held[fewer]
        assert sum(less[moment].values()) <= sum(held.values())


def test_no_card(monkeypatch, capsys):
    monkeypatch.setattr(planner, "CARDS", (1e-4,))
    assert not latro.main(["--plan", "1"])
    assert "no card" in capsys.readouterr().out
