"""Proves that --plan is right: bytes of weights, gradients, Adam, reference and cache are exact,
activations are within 6 % of the tensors that a forward and a backward pass keep alive, and FLOPs
and traffic are within 1 % of what torch counts. test_gpu.py compares the peak of a whole run."""

import os
import weakref
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import latro
from conftest import TOY
from harness import data, distributed, memory
from harness.errors import UserError
from harness.lora import add_adapters
from harness.model import load_config, load_model
from kernels import decode

SIZES = dict(vocab_size=1000, hidden_size=128, intermediate_size=360, num_hidden_layers=5,
             num_attention_heads=8, num_key_value_heads=2, eos_token_id=1, pad_token_id=0,
             bos_token_id=2, max_position_embeddings=1024)
CONFIGS = dict(llama=hf.LlamaConfig(**SIZES), phi3=hf.Phi3Config(**SIZES),
               tied=hf.Qwen2Config(**SIZES, tie_word_embeddings=True),
               qwen3=hf.Qwen3Config(**SIZES, head_dim=32),
               gemma3=hf.Gemma3TextConfig(**SIZES, head_dim=32, sliding_window=6),
               olmo2=hf.Olmo2Config(**SIZES), olmo3=hf.Olmo3Config(**SIZES, sliding_window=6),
               smollm3=hf.SmolLM3Config(**SIZES), granite=hf.GraniteConfig(**SIZES),
               mixtral=hf.MixtralConfig(**SIZES, num_local_experts=4),
               qwen3_moe=hf.Qwen3MoeConfig(**SIZES, head_dim=32, moe_intermediate_size=96,
                                           num_experts=4, num_experts_per_tok=2))
PROMPT, L, ANSWER, K = 40, 60, 10, 4  # tokens of prompt, rationale and answer; rationales
each_model = pytest.mark.parametrize("name", CONFIGS)
each_size = pytest.mark.parametrize("name, lora_rank", [
    *((name, 0) for name in CONFIGS), ("llama", 8), ("qwen3", 4)])


def make_args(**other):
    given = dict(model="m", task="qa", data="d", questions=2, K=K, L=L, micro=1)
    return latro.Args(**given | other)


def make_shape(name, W=1, **other):
    return memory.Shape(CONFIGS[name], make_args(**other), W, PROMPT, ANSWER)


def make_model(name, dtype=torch.float32, checkpointing=False, lora_rank=0, experts=None):
    policy = hf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    policy.set_attn_implementation("latro")
    if experts:
        policy.set_experts_implementation(experts)
    if lora_rank:
        add_adapters(policy, make_args(lora_rank=lora_rank))
    policy.logprobs = MethodType(latro.logprobs, policy)
    if checkpointing:
        policy.gradient_checkpointing_enable()
    return policy


def load_both(args):
    """Policy and reference of a run, both in float32 on the CPU."""
    return [latro.load_model(args, torch.device("cpu"), torch.float32, latro.logprobs)
            for _ in range(2)]


def longest_group():
    """K rationales of one question that are all cut at L."""
    return [latro.Rationale([], [5] * L, L, [6] * ANSWER, L, True)] * K


def longest_tree(policy):
    return latro.pack_tree([[4] * PROMPT], [longest_group()], 1.0, policy)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made since it was entered: those alive
    now, and the most that were alive at once."""

    def __init__(self, policy):
        super().__init__()
        before = [x.untyped_storage() for p in policy.parameters() for x in (p, p.grad)
                  if x is not None]
        self.known = {id(s): s for s in before}
        self.now = self.peak = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        made = call(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor):
                self.add(t.untyped_storage())
        return made

    def add(self, storage):
        if id(storage) in self.known:
            return
        size, key = storage.nbytes(), id(storage)
        self.known[key] = weakref.ref(storage, lambda _: self.remove(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def remove(self, key, size):
        del self.known[key]
        self.now -= size


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@each_size
def test_activations(name, dtype, checkpointing, lora_rank):
    """On a CPU, attention returns Phi-3's heads in an order that needs one more copy."""
    policy = make_model(name, dtype, checkpointing, lora_rank).train()
    itemsize, trained = dtype.itemsize, [p for p in policy.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    s = make_shape(name, checkpointing=checkpointing, lora_rank=lora_rank)
    planned = memory.memory_phases(s, itemsize)
    copy = s.S * s.query_width * itemsize * (name == "phi3")
    with LiveBytes(policy) as live:
        tree = longest_tree(policy)
        layout = tree.layout.additive(torch.empty(0, dtype=dtype), policy.config)
        hidden = policy.model(input_ids=tree.ids, layout=layout,
                              attention_mask=next(iter(layout.branch_masks.values())),
                              position_ids=tree.position, use_cache=False).last_hidden_state
        copies = copy * (1 if checkpointing else s.layers)
        saved = planned["head"]["activations"] + (0 if checkpointing else copies)
        assert live.now == pytest.approx(saved, rel=0.05)
        live.peak = 0
        hidden.sum().backward()
    assert live.peak == pytest.approx(planned["layer"]["activations"] + copies, rel=0.06)
    assert tree.ids.numel() == s.S and len(tree.targets) == s.T


@pytest.mark.parametrize("checkpointing", [False, True])
@each_size
def test_flops(name, checkpointing, lora_rank):
    """All FLOPs except attention's, which torch's counter does not see on a CPU. With LoRA, the
    input of the first block needs no gradient, which is not counted: up to 2 % here."""
    policy = make_model(name, checkpointing=checkpointing, lora_rank=lora_rank,
                        experts="eager").train()  # torch does not count grouped products
    s = make_shape(name, beta=0.0, questions=1, checkpointing=checkpointing, lora_rank=lora_rank)
    with FlopCounterMode(display=False) as counted:
        policy.logprobs(longest_tree(policy)).sum().backward()
    attention = (3 + checkpointing) * 4 * s.attention_pairs * s.query_width * s.layers
    rel = 0.02 if lora_rank else 0.01
    assert counted.get_total_flops() == pytest.approx(memory.flops(s) - attention, rel=rel)


def test_flops_of_the_reference():
    """The reference adds one forward pass."""
    policy = make_model("llama")
    s, without = (make_shape("llama", beta=beta, checkpointing=False) for beta in (1.0, 0.0))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        policy.logprobs(longest_tree(policy))
    attention = s.questions * 4 * s.attention_pairs * s.query_width * s.layers
    added = memory.flops(s) - memory.flops(without) - attention
    assert s.questions * counted.get_total_flops() == pytest.approx(added, rel=0.01)


@pytest.fixture
def join_group(monkeypatch):
    """A function that makes this process the first of W; the others are fake."""
    def join(W):
        monkeypatch.setenv("WORLD_SIZE", str(W))
        dist.init_process_group("fake", rank=0, world_size=W, store=FakeStore())
    yield join
    dist.destroy_process_group()


def local_bytes(tensors):
    """Bytes of the storages of some tensors on this process, each storage once."""
    parts = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    storages = (part.untyped_storage() for part in parts)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("W, shard", [(1, 0), (2, 0), (3, 0), (8, 0), (8, 2), (8, 4)])
@each_model
def test_bytes_at_rest(name, W, shard, join_group, tmp_path):
    """Weights, gradients, Adam's moments and the reference, to the byte."""
    join_group(W)
    CONFIGS[name].save_pretrained(tmp_path)
    make_model(name).save_pretrained(tmp_path)
    args = make_args(model=str(tmp_path), questions=2 * W, shard=shard)
    policy, reference = load_both(args)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()

    planned = memory.memory_phases(memory.Shape(CONFIGS[name], args, W), itemsize=4)["layer"]
    moments = [t for state in optimizer.state.values() for t in state.values()]
    assert local_bytes(policy.parameters()) == planned["weights"]
    assert local_bytes(reference.parameters()) == planned["reference"]
    assert local_bytes(p.grad for p in policy.parameters()) == planned["gradients"]
    assert local_bytes(moments) == planned["Adam"]


@pytest.mark.parametrize("W, shard", [(1, 0), (3, 0), (8, 2)])
def test_bytes_at_rest_with_adapters(W, shard, join_group, tmp_path):
    """The frozen model once, in the dtype that computes; adapters, their gradients and moments."""
    join_group(W)
    make_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    args = make_args(model=str(tmp_path), questions=2 * W, shard=shard, lora_rank=4)
    policy = latro.load_model(args, torch.device("cpu"), torch.float32, latro.logprobs)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    planned = memory.memory_phases(memory.Shape(CONFIGS["llama"], args, W), itemsize=4)["layer"]
    moments = [t for state in optimizer.state.values() for t in state.values()]
    assert local_bytes(policy.parameters()) == planned["weights"] and "reference" not in planned
    assert local_bytes(p.grad for p in trained) == planned["gradients"]
    assert local_bytes(moments) == planned["Adam"]


class ReceivedBytes(TorchDispatchMode):
    """Counts the bytes that a GPU receives in collectives, if they run as rings: from the processes
    that share its copy of the weights, and those summed with the other copies."""
    from_shards = summed = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.name()
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            part, whole = sorted(t.nbytes for t in args[:2])
            self.from_shards += whole - part
        elif name == "c10d::allreduce_":
            self.summed += sum(t.nbytes for t in args[0])
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("W, shard, micro, beta", [
    (8, 0, 1, 0.1), (8, 0, 10**6, 0.0), (8, 4, 1, 0.0), (8, 2, 600, 0.1)])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_traffic(name, W, shard, micro, beta, join_group, tmp_path):
    """The bytes that FSDP2 hands to the collectives in the second update. The first one differs:
    the reference keeps what it has gathered of embedding and head."""
    join_group(W)
    make_model(name).save_pretrained(tmp_path)
    args = make_args(model=str(tmp_path), questions=4 * W, shard=shard, micro=micro, beta=beta)
    policy, reference = load_both(args)
    examples = [data.Example("", "", [4] * PROMPT, [6] * ANSWER, [])] * 4
    groups = [longest_group()] * 4
    sizes = [*map(latro.tree_size, examples, groups)]
    micro_batches = distributed.make_micro_batches(sizes, micro)
    for _ in range(2):
        with ReceivedBytes() as received:
            with distributed.unsharded(policy):
                pass
            for indices in micro_batches:
                n = len(indices)
                logp, _ = latro.score(policy, reference if beta else None, examples[:n],
                                      groups[:n], args)
                distributed.backward(logp.sum(), policy, last=indices is micro_batches[-1])
    shape = memory.Shape(CONFIGS[name], args, W, PROMPT, ANSWER)
    from_shards, from_copies = memory.bytes_received(shape, itemsize=4)
    copies = W // (shard or W)
    assert received.from_shards == pytest.approx(from_shards, rel=0.01)
    assert received.summed * 2 * (copies - 1) / copies == pytest.approx(from_copies, rel=0.01)


@each_model
def test_cache(name, monkeypatch):
    """The cache as a GPU would have it, to the byte. Dropping half of the rows copies at most half
    of the keys or values of one layer."""
    monkeypatch.setitem(decode.PACES, "cpu", decode.PACES["cuda"])
    policy, s = make_model(name).eval(), make_shape(name)
    with torch.no_grad(), LiveBytes(policy) as live:
        decoder = decode.Decoder(policy, [[4] * PROMPT] * s.questions, K, L)
        decoder.prefill()
        decoder.set_length(L)
        cache = sum(t.nbytes for kv in decoder.cache.layers.values() for t in kv)
        live.peak = before = live.now
        decoder.select_rows(torch.arange(s.rollout_rows // 2))
    copied = cache // s.layers // 4
    assert cache + copied == memory.memory_phases(s, itemsize=4)["sample"]["cache"]
    assert copied / 2 < live.peak - before <= copied


def test_dz_bytes_is_that_of_the_kernel():
    token_logprob = pytest.importorskip("kernels.token_logprob")
    assert memory.DZ_BYTES == token_logprob.DZ_BYTES


@pytest.mark.parametrize("device, itemsize", [("cuda", 2), ("cpu", 4)])
def test_activations_are_recomputed_where_they_do_not_fit(device, itemsize, monkeypatch):
    """On a card of that size, or in half of a host's memory, as --plan says; unless the flag
    decides."""
    config, device = CONFIGS["llama"], torch.device(device)

    def peak(checkpointing):
        shape = memory.Shape(config, make_args(checkpointing=checkpointing), 1)
        return memory.peak_bytes(memory.memory_phases(shape, itemsize))

    def needs_checkpointing(**flags):
        return memory.needs_activation_checkpointing(config, make_args(**flags), 1, device)

    weights = itemsize * memory.Shape(config, make_args(), 1).parameters
    assert weights < peak(True) < peak(False)
    for available, expected in ((peak(False), False), (peak(False) - 1, True), (weights, True)):
        card = SimpleNamespace(total_memory=1.06 * available + 0.1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
        monkeypatch.setattr(os, "sysconf", dict(SC_PAGE_SIZE=2, SC_PHYS_PAGES=available).get)
        assert needs_checkpointing() == expected
        assert needs_checkpointing(checkpointing=True)
        assert not needs_checkpointing(checkpointing=False)


def test_weights_are_not_loaded(monkeypatch, capsys):
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", None)
    assert not latro.main(["--plan", "8", "--model", str(TOY)])
    printed = capsys.readouterr().out
    assert "GPUs: 8, each with 3 questions" in printed and "card of 16 GB" in printed


def test_columns_add_up(capsys):
    """Also where --out holds a run: a plan writes nothing."""
    assert not latro.main(["--plan", "4", "--questions", "8"])
    head, *lines = capsys.readouterr().out.splitlines()[1:]
    table = {name: cells for name, *cells in map(str.split, lines) if len(cells) == 5}
    for i, phase in enumerate(head.split()[3:]):
        column = [float(cells[i]) for name, cells in table.items()
                  if name != "total" and cells[i] != "-"]
        assert float(table["total"][i]) == pytest.approx(sum(column), abs=0.03), phase


@pytest.mark.parametrize("flags, lowered", [
    (dict(beta=0.0), "reference"), (dict(micro=1), "activations"), (dict(L=30), "cache"),
    (dict(K=2), "cache"), (dict(shard=0), "weights"), (dict(questions=4), "cache")])
def test_what_each_flag_lowers(flags, lowered):
    """Each flag that an out-of-memory message names lowers what it should, and raises no phase."""
    base = dict(questions=8, micro=9999, shard=2, L=200)
    before, after = (memory.memory_phases(make_shape("llama", 4, **base | other))
                     for other in ({}, flags))
    for phase, parts in before.items():
        if lowered in parts:
            assert after[phase].get(lowered, 0) < parts[lowered]
        assert sum(after[phase].values()) <= sum(parts.values())


def test_no_card_is_large_enough(monkeypatch, capsys):
    """More GPUs help, unless the weights alone are too large for one: all of them are gathered."""
    monkeypatch.setattr(memory, "CARDS", (3e-3,))
    assert not latro.main(["--plan", "8", "--questions", "8"])
    assert "no card of 0.003 GB holds it: more GPUs" in capsys.readouterr().out
    monkeypatch.setattr(memory, "CARDS", (2e-3,))
    for processes in ("8", "64"):
        assert not latro.main(["--plan", processes, "--questions", "64"])
        assert "however many there are" in capsys.readouterr().out


@pytest.mark.parametrize("flags, refused", [([], True), (["--objective", "sft"], False)])
def test_a_model_that_no_gpu_can_hold_is_not_loaded(flags, refused, monkeypatch):
    """SFT samples nothing, so nothing is gathered whole."""
    args, device = latro.parse(flags), torch.device("cuda")
    weights = 2 * memory.Shape(load_config(args), args, 1).parameters
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", None)
    for room, too_small in ((weights, False), (weights - 2, refused)):
        card = SimpleNamespace(total_memory=1.06 * room + 0.1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
        with pytest.raises(UserError, match="each GPU, however many" if too_small else "be read"):
            load_model(args, device, torch.bfloat16, latro.logprobs)
