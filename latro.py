"""LaTRO, LaTent Reasoning Optimization (Chen et al., arXiv 2411.04282), in one file.

A policy writes K rationales z for a question x; its own log-probability of the gold answer y after
each of them is the reward. No reward model, no verifier, no gold rationale.

    python latro.py                                                        a toy, on a laptop
    torchrun --nproc_per_node 8 latro.py --model meta-llama/Llama-3.1-8B   the paper's GSM8K run

Objective (eq. 3), with pi_0 the policy before training:

    J = E_{z ~ pi(.|x)}[ log pi(y|x+z) ] - beta KL( pi(z|x) || pi_0(z|x) )

Its gradient (eq. 4), estimated from K rationales for each of B questions, N = B K in all:

    1/N sum  A grad log pi(z|x) + grad log pi(y|x+z)        A_k = r_k - mean of the other r
    r = log pi(y|x+z) - beta log( pi(z|x) / pi_0(z|x) )

Ending z is an action of the policy: the tokens that end it, the template "The answer is" or EOS,
are part of pi(z|x). With --credit answer (the default) y is the answer after the template that z
wrote; with --credit full, the paper to the letter, y starts with the template. A z that EOS or L
ended has the template appended to it, and pays for that inside log pi(y|x+z). Each is one exact
objective: the expectation of the reward over the policy's ways to write and end z.

x, y, z                  question, answer, rationale: lists of token ids
K, L, beta               rationales a question, longest z in tokens, weight of the KL
logp_z, logp0_z, logp_y  log pi(z|x), log pi_0(z|x), log pi(y|x+z): sums over tokens, in nats
r, A                     reward and leave-one-out advantage of a rationale
B, N, S, T               questions, rationales, tokens of a tree, scored tokens of a forward

What the paper, its released code and this file do differently is a table in README.md.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import kernels
from kernels import Cache, Scores, pick_tokens, score_rationales, span_sums, token_logprobs

HERE = Path(__file__).resolve().parent


class Problem(Exception):
    """Bad input, or a run that cannot go on: one sentence that names the value and the way out."""


# ------------------------------------------------------------------------------ 1. arguments

def flag(default, help: str, choices: tuple | None = None, least: float | None = None):
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least))


@dataclass
class Args:
    """The settings of a run. None stands for the task's preset."""
    model: str = flag(None, "hub id or directory (default: the toy that ships with this file)")
    task: str = flag(None, "what is asked", ("gsm8k", "arc_challenge", "toy", "qa"))
    data: str = flag(None, "directory with train.jsonl and test.jsonl, or a hub id")
    out: str = flag("out", "directory of the run: a Hugging Face model, logs, state")
    objective: str = flag("latro", "sft: log pi(y|x), with gold rationales if any", ("latro", "sft"))
    bound: str = flag("elbo", "iwae: the multi-sample bound", ("elbo", "iwae"))
    reward: str = flag("logp", "prob: reward pi(y|x+z) itself", ("logp", "prob"))
    credit: str = flag("answer", "y: the answer, or template and answer", ("answer", "full"))
    K: int = flag(None, "rationales a question", least=1)
    L: int = flag(None, "longest rationale, tokens", least=1)
    beta: float = flag(None, "weight of the KL to the starting policy; 0 loads none", least=0)
    temperature: float = flag(1.0, "of sampling z, and of pi(z|x) in the objective", least=1e-3)
    questions: int = flag(None, "questions an update, over all processes", least=1)
    micro: int = flag(None, "questions a forward", least=1)
    steps: int = flag(None, "updates (or give --epochs)", least=1)
    epochs: float = flag(None, "passes over the training questions (or give --steps)", least=0)
    lr: float = flag(None, "peak learning rate of AdamW, falling linearly to 0", least=0)
    warmup: int = flag(0, "updates over which the learning rate rises", least=0)
    grad_clip: float = flag(1.0, "largest gradient norm", least=0)
    answer_weight: float = flag(1.0, "of eq. 4's answer term; 0: the released code", least=0)
    truncation_penalty: float = flag(0.0, "nats off the reward of a z that L cut", least=0)
    eval_every: int = flag(None, "updates between evaluations; 0: first and last only", least=0)
    eval_questions: int = flag(None, "held-out questions of an evaluation", least=1)
    save_every: int = flag(None, "updates between checkpoints; 0: at the end only", least=0)
    shard: int = flag(0, "processes that share one copy of the weights; 0: all", least=0)
    checkpointing: bool = flag(None, "recompute activations in the backward pass")
    seed: int = flag(0, "of the data order and the samples", least=0)
    resume: bool = flag(False, "go on from the last checkpoint in --out")
    plan: bool = flag(False, "print the memory that training needs, load nothing")
    kernels: str = flag("auto", "the fused operations", ("auto", "triton", "torch"))


PAPER = dict(K=16, L=500, beta=0.05, lr=5e-7, epochs=6.0, micro=1, eval_every=100,
             eval_questions=256, save_every=100, checkpointing=True)
PRESETS = {
    "toy": dict(model=str(HERE / "toy/model"), data=str(HERE / "toy"), K=16, L=48, beta=0.05, lr=3e-4,
                steps=50, questions=8, micro=8, eval_every=0, eval_questions=200, save_every=0,
                checkpointing=False),
    "gsm8k": PAPER | dict(data="openai/gsm8k"),
    "arc_challenge": PAPER | dict(data="allenai/ai2_arc", beta=0.25, epochs=12.0),
    "qa": PAPER,
}


def parse(argv: list[str] | None) -> Args:
    """Command line -> settings: what was given, else the task's preset, else the default."""
    parser = argparse.ArgumentParser(prog="latro.py", allow_abbrev=False)
    for f in dataclasses.fields(Args):
        how = (dict(action=argparse.BooleanOptionalAction) if f.type is bool
               else dict(type=f.type, choices=f.metadata["choices"]))
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f.metadata["help"], **how)
    given = vars(parser.parse_args(argv))
    task = given.get("task") or ("gsm8k" if "model" in given else "toy")
    if given.get("steps") is not None and given.get("epochs") is not None:
        raise Problem("--steps and --epochs say the same thing twice: give one of them")
    preset = {k: v for k, v in PRESETS[task].items()
              if k not in ("steps", "epochs") or not {"steps", "epochs"} & set(given)}
    settings = dict(task=task, questions=3 * world_size()) | preset | given
    saved = Path(settings.get("out", "out"), "latro.json")
    if settings.get("resume") and saved.exists():
        settings = resumed(json.loads(saved.read_text())["args"], given)
    for name in ("model", "data"):
        if name not in settings:
            raise Problem(f"--task {task} needs --{name}: a directory here, or a hub id")
    return check(Args(**settings))


def resumed(saved: dict, given: dict) -> dict:
    """The saved run's settings; flags that would make it another run are refused."""
    changed = [f"--{k.replace('_', '-')} {saved[k]} -> {v}" for k, v in given.items()
               if k not in ("resume", "out", "plan", "kernels", "micro") and saved[k] != v]
    if changed:
        raise Problem(f"--resume: that run was started with other flags ({'; '.join(changed)});"
                      " leave them out, or start a new run with another --out")
    return saved | given


def check(args: Args) -> Args:
    """Refuses values that cannot work, before anything is loaded."""
    for f in dataclasses.fields(Args):
        value, least = getattr(args, f.name), f.metadata["least"]
        if least is not None and value is not None and not least <= value < math.inf:
            raise Problem(f"--{f.name.replace('_', '-')} {value}: must be at least {least}")
    if args.objective == "latro" and args.K < 2:
        raise Problem(f"--K {args.K}: the leave-one-out baseline needs at least 2 rationales")
    if args.bound == "iwae" and args.reward == "prob":
        raise Problem("--bound iwae averages probabilities already: use it with --reward logp")
    if args.questions % world_size():
        raise Problem(f"--questions {args.questions}: must be a multiple of the {world_size()}"
                      " processes, which share them")
    if args.shard and world_size() % args.shard:
        raise Problem(f"--shard {args.shard}: must divide the {world_size()} processes")
    return args


# ------------------------------------------------------------------------------ 2. processes

def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def connect() -> torch.device:
    """Joins torchrun's processes, or makes a group of this one; returns this process's device."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    return device


def share(items: list) -> list:
    """This process's part: every W-th item."""
    return items[dist.get_rank()::world_size()]


def gather(mine: list) -> list:
    """The inverse of share, on every process."""
    parts = [None] * world_size()
    dist.all_gather_object(parts, mine)
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank::len(parts)] = part
    return whole


def distribute(model: nn.Module, device: torch.device, dtype: torch.dtype, group: int) -> nn.Module:
    """Moves the model to its device as dtype, block by block, split over `group` processes.

    FSDP2: on CUDA it computes in bfloat16 and reduces gradients in float32; on CPU all is float32.
    One CPU process has nothing to split."""
    sizes = (world_size() // group, group) if 0 < group < world_size() else (world_size(),)
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=("copy", "shard")[-len(sizes):])
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    policy = mixed if device.type == "cuda" else MixedPrecisionPolicy()
    for block in [*model.model.layers, model]:
        for p in block.parameters():
            p.data = p.data.to(device, dtype)  # not the buffers: RoPE's frequencies stay in float32
        block.to(device)
        if world_size() > 1 or device.type == "cuda":
            fully_shard(block, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "logprobs")
    return model


@contextmanager
def gathered(*models: nn.Module | None) -> Iterator[None]:
    """Whole weights and eval mode inside: decoding gathers each parameter once, not once a token."""
    shards = [(m, root) for root in models if root for m in root.modules() if isinstance(m, FSDPModule)]
    modes = [(root, root.training) for root in models if root]
    for root, _ in modes:
        root.eval()
    for m, _ in shards:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m, root in shards:
            m.reshard()
            m.set_reshard_after_forward(m is not root, recurse=False)
        for root, training in modes:
            root.train(training)


def backward(loss: Tensor) -> None:
    """Adds the gradient of the sum of all processes' losses; FSDP would take the mean."""
    (loss * world_size()).backward()


# ------------------------------------------------------------------------------ 3. tasks

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")


def same_answer(said: str, gold: str) -> bool:
    """As numbers where gold is one (1,200 = $1200.00; "2*3=6" says 6), else as text but for case."""
    said, gold = (unicodedata.normalize("NFKC", t).replace("\u2212", "-").replace("$", "").strip()
                  for t in (said, gold))
    if not NUMBER.fullmatch(gold):
        return said.rstrip(".").casefold().split() == gold.rstrip(".").casefold().split()
    found = NUMBER.search(said.rpartition("=")[2])
    try:
        return found is not None and Fraction(found[0].replace(",", "")) == Fraction(gold.replace(",", ""))
    except ZeroDivisionError:
        return False


def options(row: dict) -> dict[str, str]:
    return dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))


@dataclass(frozen=True)
class Task:
    """What is asked and answered for a row of data; y is "{template} {answer}." and end of turn."""
    ask: Callable[[dict], str] = lambda row: row["question"]
    answer: Callable[[dict], str] = lambda row: row["answer"]
    rationale: Callable[[dict], str | None] = lambda row: row.get("rationale")
    gap: str = "\n"  # between a rationale and the template appended to it
    config: str | None = None  # of the hub's data set
    template: str = "The answer is"

    def said(self, text: str) -> str:
        """What a reply answers: the rest of the line after its last template."""
        return text.rpartition(self.template)[2].split("\n")[0].strip() if self.template in text else ""


TASKS = {
    "toy": Task(gap=" "),
    "qa": Task(),
    "gsm8k": Task(
        ask=lambda row: f"{row['question']} Let's think step by step.",
        answer=lambda row: row["answer"].rpartition("####")[2],
        rationale=lambda row: re.sub("<<.*?>>", "", row["answer"].rpartition("####")[0]).strip(),
        config="main"),
    "arc_challenge": Task(
        ask=lambda row: "\n".join([row["question"], *(f"- {text}" for text in options(row).values()),
                                   "Let's think step by step."]),
        answer=lambda row: options(row)[row["answerKey"]], config="ARC-Challenge"),
}


def brief(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"


def read_rows(args: Args, split: str) -> list[tuple[str, dict]]:
    """(where it stands, row) of a split, from {--data}/{split}.jsonl or the hub; [] if there is none."""
    if Path(args.data).is_dir():
        path = Path(args.data, f"{split}.jsonl")
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        try:
            return [(f"{path}:{i}", json.loads(s)) for i, s in enumerate(lines, 1) if s.strip()]
        except json.JSONDecodeError:
            bad = next(i for i, s in enumerate(lines, 1) if s.strip() and not is_json(s))
            raise Problem(f"{path}:{bad}: not JSON; every line is one object") from None
    import datasets  # only where the hub is asked

    try:
        hub = datasets.load_dataset(args.data, TASKS[args.task].config)
    except Exception as e:  # offline, missing, gated: each its own class, one way out
        raise Problem(f"--data {args.data}: no directory here, and not to be had from the hub"
                      f" ({brief(e)}); pass a directory with train.jsonl and test.jsonl") from e
    return [(f"{args.data} {split}:{i}", row) for i, row in enumerate(hub.get(split, []))]


class Example(NamedTuple):
    """A row of data as token ids."""
    ask: str
    gold: str
    x: list[int]
    answer: list[int]  # " 18." and the end of the turn: y after the template
    z: list[int]  # the data's own rationale, or nothing


class Codec:
    """Text to token ids, once: nothing that was sampled is decoded and tokenised again."""

    def __init__(self, tokenizer, task: Task, eos: list[int]):
        self.tokenizer, self.task, self.eos, self.chat = tokenizer, task, eos, tokenizer.chat_template
        self.turn_end = next((t for t in self.after_reply() if t in eos), eos[0])
        self.lead = self.opening(task.template)
        self.join = self.after(".", task.gap + task.template)
        variants = {(*self.lead,), (*self.join,)} | {
            (*self.after(before, gap + task.template),) for before in ".\n" for gap in ("", " ", "\n")}
        self.stops = [v for v in variants if not any(v != w == v[-len(w):] for w in variants)]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def after(self, before: str, text: str) -> list[int]:
        """The ids of `text` behind `before`; refused where a token would span both."""
        head, whole = self.ids(before), self.ids(before + text)
        if whole[:len(head)] != head:
            raise Problem(f"this tokenizer merges {before!r} and {text!r}: z and y have no boundary")
        return whole[len(head):]

    def opening(self, text: str) -> list[int]:
        """The ids of `text` at the start of a reply."""
        return self.ids(text) if self.chat else self.after(":", " " + text)

    def turns(self, *contents: str) -> list[int]:
        turns = [dict(role=role, content=c) for role, c in zip(("user", "assistant"), contents)]
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=len(turns) == 1, return_dict=True)["input_ids"]

    def after_reply(self) -> list[int]:
        """What the chat template writes behind a reply, the reply included."""
        return self.turns("a", "b")[len(self.turns("a")):] if self.chat else []

    def prompt(self, ask: str) -> list[int]:
        if self.chat:
            return self.turns(ask)
        ids = self.tokenizer(f"Question: {ask}\nAnswer:")["input_ids"]
        return ids[:-1] if ids[-1] in self.eos else ids

    def example(self, where: str, row: dict) -> Example:
        """Raises Problem, naming the row, where a field is missing or the answer is empty."""
        try:
            ask, gold, z = self.task.ask(row), self.task.answer(row).strip(), self.task.rationale(row)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise Problem(f"{where}: no question and answer as the task wants them ({brief(e)});"
                          " mend the row, or choose another --task") from e
        answer = self.after(self.task.template, f" {gold}.")
        if not gold or not self.after(self.task.template, f" {gold}"):
            raise Problem(f"{where}: the answer {gold!r} tokenises to nothing; mend or drop the row")
        return Example(ask, gold, self.prompt(ask), [*answer, self.turn_end], self.opening(z) if z else [])

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


# ------------------------------------------------------------------------------ 4. sampler

class Draw(NamedTuple):
    """A sampled continuation."""
    ids: list[int]  # z, what ended it, and what followed where there was room
    end: int  # tokens of z and of what ended it
    stop: int  # what ended it: a template of that many tokens, 0: L, -1: EOS


def window(config) -> float:
    """Tokens that a layer looks back, its own included."""
    return getattr(config, "sliding_window", None) or math.inf


@torch.no_grad()
def sample(policy, codec: Codec, prompts: list[list[int]], K: int, L: int, uniform: Tensor | None,
           temperature: float = 1.0, room: int = 0) -> list[Draw]:
    """K continuations of each of B prompts, driven by uniform (B*K, L + room) in [0, 1); None: greedy.

    z ends with a template, at EOS, or after L tokens. With room, a z that L did not cut goes on to
    its answer, until EOS or for `room` tokens past L."""
    prompt_len, N = torch.tensor([*map(len, prompts)], device=policy.device), K * len(prompts)
    P, column = max(map(len, prompts)), torch.arange(max(map(len, prompts)) + L + room, device=policy.device)
    x = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=policy.device)
    real = column >= P - prompt_len[:, None]  # prompts are padded on the left, and pads never seen
    cache, reach = Cache(L + room), window(policy.config)

    def next_logits(ids: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        out = policy(ids, position_ids=position, attention_mask=mask[:, None], past_key_values=cache,
                     use_cache=True, logits_to_keep=1)
        cache.length += ids.shape[1]
        return out.logits[:, -1].float()

    causal = (column[:P, None] >= column[:P]) & (column[:P, None] - column[:P] < reach)
    itself = torch.eye(P, dtype=torch.bool, device=policy.device)  # a pad that saw nothing would be NaN
    logits = next_logits(x, (column[:P] - P + prompt_len[:, None]).clamp(min=0),
                         causal & real[:, None, :P] | itself)
    row = torch.arange(N, device=policy.device)
    cache.select(row // K)
    logits, real, prompt_len = (v[row // K] for v in (logits, real, prompt_len))
    ids = torch.full((N, L + room), -1, device=policy.device)
    end, stop = torch.zeros(2, N, dtype=torch.long, device=policy.device)
    eos, *stops = (torch.tensor(s, device=policy.device) for s in (codec.eos, *codec.stops))
    running = row >= 0
    for t in range(L + room):
        token = pick_tokens(logits, None if uniform is None else uniform[row, t], temperature)
        ids[row, t] = token.where(running, -1)
        is_eos = torch.isin(token, eos)
        by = -is_eos.long()
        for s in stops:
            if t + 1 >= len(s):
                by = by.where((ids[row, t + 1 - len(s):t + 1] != s).any(1), len(s))
        ended = running & (end[row] == 0) & ((by != 0) | (t + 1 == L))
        end[row], stop[row] = end[row].where(~ended, t + 1), stop[row].where(~ended, by)
        running = running & ~is_eos & ~(ended & ((by == 0) | (room == 0)))
        left = int(running.sum())
        if not left or t + 1 == L + room:
            break
        if left < 0.8 * len(row):  # dropping finished rows copies the cache: several at a time
            cache.select(running)
            row, token, real, prompt_len, running = (
                v[running] for v in (row, token, real, prompt_len, running))
        seen = real[:, :P + t + 1] & (P + t - column[:P + t + 1] < reach)
        logits = next_logits(token[:, None], (prompt_len + t)[:, None], seen[:, None])
    return [Draw([i for i in z if i >= 0], *e)
            for z, *e in zip(ids.tolist(), end.tolist(), stop.tolist())]


def rollout(policy, codec: Codec, examples: list[Example], slots: list[int], stream: int, args: Args,
            K: int, greedy: bool = False, room: int = 0) -> list[list[Draw]]:
    """K draws for each question; a question's randomness hangs on (seed, stream, slot) alone."""
    noise = None if greedy else torch.from_numpy(np.concatenate([
        np.random.default_rng((args.seed, stream, slot)).random((K, args.L + room)) for slot in slots]))
    draws = sample(policy, codec, [e.x for e in examples], K, args.L,
                   noise if greedy else noise.to(policy.device), args.temperature, room)
    return [draws[i:i + K] for i in range(0, len(draws), K)]


# ------------------------------------------------------------------------------ 5. question tree

class Rationale(NamedTuple):
    """A finished z, and the y to be scored after it."""
    actions: list[int]  # every token that the policy chose, those that ended z included
    context: int  # how many of them y follows
    y: list[int]
    length: int  # tokens of z without what ended it
    cut: bool  # by L


def conclude(codec: Codec, draw: Draw, answer: list[int], credit: str) -> Rationale:
    """What counts as z and what as y: see --credit in the docstring of this file."""
    actions, length = draw.ids[:draw.end], draw.end - abs(draw.stop)
    if draw.stop <= 0:
        return Rationale(actions, length, (codec.join if length else codec.lead) + answer, length,
                         draw.stop == 0)
    if credit == "full":
        return Rationale(actions, length, actions[length:] + answer, length, False)
    return Rationale(actions, draw.end, answer, length, False)


def gold_rationale(codec: Codec, e: Example) -> Rationale:
    """The data's own rationale and answer, all of it scored: what SFT learns."""
    actions = e.z + (codec.join if e.z else codec.lead)
    return Rationale(actions, len(actions), e.answer, len(e.z), False)


class Tree(NamedTuple):
    """A row per question: x, then a branch [z y] per rationale, which sees x and itself.

    Positions go on from x in every branch. So one forward gives every log pi(z_k|x) and
    log pi(y|x+z_k), and computes x once. Row sources[t] of the flattened hidden states predicts
    targets[t]; the targets are z, y of one rationale after the other."""
    ids: Tensor  # (B, S)
    position: Tensor  # (B, S)
    mask: Tensor  # (B, 1, S, S), true where the query may look
    sources: Tensor  # (T,)
    targets: Tensor  # (T,)
    temperature: Tensor  # (T,): of sampling on z, 1 on y
    offsets: tuple[Tensor, Tensor, Tensor]  # z_start, y_start, end of each rationale, (N,)


def plant(prompts: list[list[int]], groups: list[list[Rationale]], temperature: float, config,
          device: torch.device) -> Tree:
    """The tree of each prompt with its rationales."""
    rows, sources, targets, edges = [], [], [], [0]
    S = max(len(x) + sum(r.context + len(r.y) - 1 for r in g) for x, g in zip(prompts, groups))
    for b, (x, group) in enumerate(zip(prompts, groups, strict=True)):
        row = [(token, p, 0) for p, token in enumerate(x)]
        for branch, r in enumerate(group, 1):
            tokens = r.actions[:r.context] + r.y[:-1]
            path = [b * S + i for i in (len(x) - 1, *range(len(row), len(row) + len(tokens)))]
            row += [(token, p, branch) for p, token in enumerate(tokens, len(x))]
            sources += path[:len(r.actions)] + path[r.context:]
            targets += r.actions + r.y
            edges += [len(targets) - len(r.y), len(targets)]
        rows.append(row + [(0, 0, -1)] * (S - len(row)))
    ids, position, branch = torch.tensor(rows, device=device).unbind(-1)
    sees = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
    near = position[:, :, None] - position[:, None] < window(config)
    causal = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    edges = torch.tensor(edges, device=device)
    heat = torch.tensor([temperature, 1.0] * (len(edges) // 2), device=device)
    return Tree(ids, position, (sees & near & causal)[:, None], torch.tensor(sources, device=device),
                torch.tensor(targets, device=device), heat.repeat_interleave(edges.diff()),
                (edges[:-1:2], edges[1::2], edges[2::2]))


# ------------------------------------------------------------------------------ 6. score

def logprobs(self: nn.Module, tree: Tree) -> Tensor:
    """(T,) log-probs of the tree's targets, nats. A method, so that FSDP's hooks surround it."""
    h = self.model(input_ids=tree.ids, attention_mask=tree.mask, position_ids=tree.position,
                   use_cache=False).last_hidden_state.flatten(0, 1)[tree.sources]
    h = h / tree.temperature[:, None].to(h.dtype)
    return token_logprobs(h, self.get_output_embeddings().weight, tree.targets)


def load(args: Args, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """--model with this project's attention and log-probs, its parameters on the device as dtype."""
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", use_safetensors=True)
    policy.set_attn_implementation("latro")
    policy.logprobs = logprobs.__get__(policy)
    for m in policy.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0  # what is sampled and what is scored must be one policy
    if args.checkpointing:
        policy.gradient_checkpointing_enable()
    return distribute(policy, device, dtype, args.shard).train()


def supported(config) -> None:
    """Refuses architectures whose log-probs this file would get wrong."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    odd = [k for k in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")
           if getattr(config, k, None) not in (None, 1.0)]
    odd += ["mixed attention layers"] * (len(kinds) > 1) + ["an encoder"] * config.is_encoder_decoder
    if odd:
        raise Problem(f"{type(config).__name__}: {', '.join(odd)} not supported;"
                      " take a Llama, Mistral, Qwen or Phi-3 model")


def score(policy, reference, tree: Tree) -> tuple[Tensor, Tensor | None]:
    """(T,) log-probs under the policy, with gradient, and under the reference, if there is one."""
    with torch.no_grad():
        logp0 = reference.logprobs(tree) if reference else None
    return policy.logprobs(tree), logp0


# ------------------------------------------------------------------------------ 7. objective

def objective(args: Args, tree: Tree, groups: list[list[Rationale]], logp: Tensor,
              logp0: Tensor | None) -> Scores:
    """Rewards, advantages and token weights (see kernels/reference.py), over the update's N."""
    N = args.questions * len(groups[0])
    if args.objective == "sft":
        logp_z, logp_y = span_sums(logp, *tree.offsets)
        return Scores(logp_z, None, logp_y, logp_y, 0 * logp_y, torch.full_like(logp, 1 / N))
    cut = torch.tensor([r.cut for g in groups for r in g], device=logp.device)
    return score_rationales(
        logp, logp0, *tree.offsets, args.K, args.beta, bound=args.bound, reward=args.reward,
        answer_weight=args.answer_weight, penalty=args.truncation_penalty * cut, total=N)


def samples_of(groups: list[list[Rationale]], **values: Tensor | None) -> list[list[dict]]:
    """A record of each rationale: lengths in tokens, and the given (N,) values."""
    columns = {k: iter(v.tolist()) for k, v in values.items() if v is not None}
    return [[dict(z_len=r.length, finished=not r.cut, actions=len(r.actions), answers=len(r.y))
             | {k: next(v) for k, v in columns.items()} for r in g] for g in groups]


def summary(questions: list[list[dict]]) -> dict:
    """Means over rationales; elbo is E[log pi(y|x+z)] - KL, whatever beta weighs. Nats, tokens."""
    samples = [s for q in questions for s in q]
    mean = {k: float(np.mean([s[k] for s in samples])) for k in samples[0] if k not in ("text", "said")}
    kl = mean["logp_z"] - mean["logp0_z"] if "logp0_z" in mean else None
    return dict(elbo=None if kl is None else mean["logp_y"] - kl, logp_y=mean["logp_y"], kl=kl,
                z_len=mean["z_len"], finished=mean["finished"],
                entropy=-mean["logp_z"] / (mean["actions"] or 1))  # of a token, as the samples show it


# ------------------------------------------------------------------------------ 8. evaluation

@torch.no_grad()
def evaluate(policy, reference, codec: Codec, examples: list[Example], args: Args, k: int = 2) -> list[dict]:
    """A record a question, the same however the work is split over processes.

    text, said, right: the greedy reply; samples: k replies at --temperature, scored as in training.
    A reply is right where its z ends within L and its answer is the gold one."""
    room = max(len(e.answer) for e in examples) + 4
    size = max(1, args.questions * (args.K or 1) // world_size() // k)  # sequences: as in a rollout
    mine, records = share([*enumerate(examples)]), []
    with gathered(policy, reference):
        for slots, part in (zip(*mine[i:i + size]) for i in range(0, len(mine), size)):
            greedy = rollout(policy, codec, part, slots, 0, args, 1, greedy=True, room=room)
            drawn = rollout(policy, codec, part, slots, 0, args, k, room=room)
            for e, (best,), draws in zip(part, greedy, drawn):
                group = [[conclude(codec, d, e.answer, args.credit) for d in draws]]
                tree = plant([e.x], group, args.temperature, policy.config, policy.device)
                logp, logp0 = score(policy, reference, tree)
                logp_z, logp_y = span_sums(logp, *tree.offsets)
                logp0_z = None if logp0 is None else span_sums(logp0, *tree.offsets)[0]
                [samples] = samples_of(group, logp_z=logp_z, logp0_z=logp0_z, logp_y=logp_y)
                records.append(dict(question=e.ask, gold=e.gold, **reply(codec, e, best), samples=[
                    s | reply(codec, e, d) for s, d in zip(samples, draws)]))
    return gather(records)


def reply(codec: Codec, e: Example, draw: Draw) -> dict:
    text = codec.text(draw.ids)
    said = codec.task.said(text)
    return dict(text=text, said=said, right=same_answer(said, e.gold))


def accuracy(records: list[dict]) -> dict:
    """Of greedy decoding and of single samples, shares of 1."""
    return dict(n=len(records), greedy=float(np.mean([r["right"] for r in records])),
                sampled=float(np.mean([s["right"] for r in records for s in r["samples"]])))


# ------------------------------------------------------------------------------ 9. out/

def write(path: Path, text: str) -> None:
    """Replaces a file as a whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    os.replace(fresh, path)


def read_log(path: Path) -> list[dict]:
    """The rows of a log; a line that a kill tore does not count."""
    return [json.loads(s) for s in path.read_text().split("\n")[:-1]] if path.exists() else []


def log(args: Args, name: str, row: dict) -> None:
    """Appends a row in one write."""
    if is_first():
        with open(Path(args.out, name), "a") as f:
            f.write(json.dumps(row) + "\n")


def open_run(args: Args) -> None:
    """Makes --out, unless it holds another run, and records there what the run's numbers hang on."""
    out = Path(args.out)
    held = [f for f in ("latro.json", "config.json") if (out / f).exists()]
    if held and not args.resume:
        raise Problem(f"--out {out}: holds {held[0]} already; add --resume, or choose another name")
    dist.barrier()
    if is_first() and not (out / "latro.json").exists():
        (out / "state").mkdir(parents=True, exist_ok=True)
        git = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True)
        cuda = torch.cuda.is_available()
        write(out / "latro.json", json.dumps(dict(
            args=dataclasses.asdict(args) | {"resume": False}, base=args.model, commit=git.stdout.strip(),
            torch=torch.__version__, transformers=transformers.__version__, python=sys.version,
            processes=world_size(), cores=os.cpu_count(),
            hardware=torch.cuda.get_device_name() if cuda else platform.machine()), indent=2))
    dist.barrier()


def save(args: Args, policy, optimizer, tokenizer, step: int) -> None:
    """The state, then the model, each whole before it gets its name; the last state goes after that."""
    states, fresh = Path(args.out, "state"), Path(args.out, "state", "incomplete")
    if is_first():
        shutil.rmtree(fresh, ignore_errors=True)
    dist.barrier()
    model, moments = get_state_dict(policy, optimizer)
    dcp.save(dict(model=model, optimizer=moments), checkpoint_id=fresh)
    whole = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_first():
        os.replace(fresh, states / f"step-{step:06d}")
        export(args, policy, whole, tokenizer)
        for old in sorted(states.glob("step-*"))[:-1]:
            shutil.rmtree(old)
    dist.barrier()


def export(args: Args, policy, weights: dict[str, Tensor], tokenizer) -> None:
    """The model in the base's own dtype, as one file: one rename makes it the current one."""
    dtype, fresh = policy.config.dtype, Path(args.out, "state", "export")
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(policy.config, dtype=dtype)
    shell.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
    shell.tie_weights()
    shell.generation_config = policy.generation_config
    shell.save_pretrained(fresh, max_shard_size="1TB")
    tokenizer.save_pretrained(fresh)
    for f in sorted(fresh.iterdir()):
        os.replace(f, Path(args.out, f.name))


def restore(args: Args, policy, optimizer) -> int:
    """Loads the last complete state, cuts the logs back to it, and returns its step; 0 without one."""
    states = sorted(Path(args.out, "state").glob("step-*"))
    step = int(states[-1].name.removeprefix("step-")) if states else -1
    if states:
        model, moments = get_state_dict(policy, optimizer)
        dcp.load(dict(model=model, optimizer=moments), checkpoint_id=states[-1])
        set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=moments)
    if is_first():
        for path in Path(args.out).glob("*.jsonl"):
            write(path, "".join(json.dumps(r) + "\n" for r in read_log(path) if r["step"] <= step))
    return max(step, 0)


# ------------------------------------------------------------------------------ 10. training

@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] += time.perf_counter() - start


def draw_batch(examples: list[Example], step: int, args: Args) -> tuple[list[int], list[Example]]:
    """This process's slots of an update, and their questions; every epoch has its own order."""
    slots, n = share([*range(args.questions)]), len(examples)
    places = [divmod(step * args.questions + slot, n) for slot in slots]
    order = {e: np.random.default_rng((args.seed, e)).permutation(n) for e, _ in places}
    return slots, [examples[order[e][i]] for e, i in places]


def rationales(policy, codec: Codec, batch: list[Example], slots: list[int], step: int,
               args: Args) -> list[list[Rationale]]:
    """K sampled rationales a question; for SFT the data's own one."""
    if args.objective == "sft":
        return [[gold_rationale(codec, e)] for e in batch]
    with gathered(policy):
        drawn = rollout(policy, codec, batch, slots, step + 1, args, args.K)
    return [[conclude(codec, d, e.answer, args.credit) for d in g] for e, g in zip(batch, drawn)]


def update(policy, optimizer, step: int, args: Args) -> float:
    """A step of AdamW on clipped gradients at the step's learning rate; returns the gradient norm."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise Problem(f"update {step + 1}: the gradient is {norm}; {args.out} keeps its last checkpoint;"
                      " try a lower --lr, a higher --beta, or another --seed")
    rise, fall = (step + 1) / (args.warmup + 1), (args.steps - step) / max(1, args.steps - args.warmup)
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1.0, rise, fall)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def prepare(args: Args) -> tuple[Codec, list[Example], list[Example]]:
    """Codec, training and held-out questions: checks all that needs no weights."""
    try:
        config = AutoConfig.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as e:
        raise Problem(f"--model {args.model}: no model directory here, and not to be had from the hub"
                      f" ({brief(e)}); pass a directory in Hugging Face's format") from e
    supported(config)
    try:
        eos = transformers.GenerationConfig.from_pretrained(args.model).eos_token_id
    except OSError:
        eos = config.eos_token_id
    eos = [t for t in (*np.atleast_1d(eos).tolist(), tokenizer.eos_token_id) if t is not None]
    codec = Codec(tokenizer, TASKS[args.task], [*dict.fromkeys(eos)])
    rows, held_out = read_rows(args, "train"), read_rows(args, "validation")
    if not held_out:  # never the test split: whoever looks at it while training chooses by it
        some = max(1, len(rows) // 16)
        rows, held_out = rows[:-some], rows[-some:]
    if not rows:
        raise Problem(f"--data {args.data}: needs a train split of 2 rows or more")
    sets = [[codec.example(*r) for r in part] for part in (rows, held_out[:args.eval_questions])]
    for e, (where, _) in zip(sum(sets, []), rows + held_out):
        size = len(e.x) + max(args.L, len(e.z)) + len(codec.join) + len(e.answer)
        if size > config.max_position_embeddings:
            raise Problem(f"{where}: its prompt of {len(e.x)} tokens, --L {args.L} and the answer exceed the"
                          f" model's context of {config.max_position_embeddings}; lower --L or drop it")
    return codec, *sets


def train(args: Args) -> None:
    """Algorithm 1 of the paper."""
    device, stopping = connect(), []
    for s in (signal.SIGTERM, signal.SIGINT):  # once: finish the update; twice: leave at once
        signal.signal(s, lambda s, _: (stopping.append(s), signal.signal(s, signal.SIG_DFL)))
    codec, questions, held_out = prepare(args)
    if args.steps is None:
        args = dataclasses.replace(args, steps=math.ceil(args.epochs * len(questions) / args.questions))
    open_run(args)
    policy = load(args, device, torch.float32)
    with_kl = args.objective == "latro" and args.beta > 0
    frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
    reference = load(args, device, frozen).eval().requires_grad_(False) if with_kl else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    start = restore(args, policy, optimizer)
    say(f"{args.steps} updates of {args.questions} questions are"
        f" {args.steps * args.questions / len(questions):.2f} epochs of {len(questions)}")

    def look(step: int) -> None:
        records = evaluate(policy, reference, codec, held_out, args)
        log(args, "evals.jsonl", dict(step=step, split="held out", **accuracy(records),
                                      **summary([r["samples"] for r in records])))
        for r in records[:3]:
            log(args, "samples.jsonl", dict(step=step, split="held out", **r))

    if start == 0:
        look(0)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=not is_first())
    for step in bar:
        seconds = dict.fromkeys(("sample", "score", "backward", "step"), 0.0)
        slots, batch = draw_batch(questions, step, args)
        with timed(seconds, "sample"):
            groups = rationales(policy, codec, batch, slots, step, args)
        rows = []
        for i in range(0, len(batch), args.micro):
            part = slice(i, i + args.micro)
            with timed(seconds, "score"):
                tree = plant([e.x for e in batch[part]], groups[part], args.temperature,
                             policy.config, device)
                logp, logp0 = score(policy, reference, tree)
                s = objective(args, tree, groups[part], logp, logp0)
            with timed(seconds, "backward"):
                backward(-(s.weights * logp).sum())
            rows += samples_of(groups[part], logp_z=s.logp_z, logp0_z=s.logp0_z, logp_y=s.logp_y,
                               reward=s.reward, advantage=s.advantage)
        with timed(seconds, "step"):
            grad_norm = update(policy, optimizer, step, args)
        rows = gather(rows)
        reward = np.array([[r["reward"] for r in g] for g in rows])
        row = summary(rows) | dict(reward=reward.mean(), reward_std=reward.std(1).mean())
        log(args, "metrics.jsonl", dict(
            step=step + 1, epoch=(step + 1) * args.questions / len(questions), **row, grad_norm=grad_norm,
            lr=optimizer.param_groups[0]["lr"], seconds=seconds,
            tokens_per_s=sum(r["actions"] + r["answers"] for g in rows for r in g) / sum(seconds.values()),
            peak_mem_gb=peak_memory()))
        bar.set_postfix_str(f"ELBO {row['elbo']:.2f} ")
        last = step + 1 == args.steps
        if last or args.eval_every and (step + 1) % args.eval_every == 0:
            look(step + 1)
        stop = any(gather([bool(stopping)]))
        if last or stop or args.save_every and (step + 1) % args.save_every == 0:
            save(args, policy, optimizer, codec.tokenizer, step + 1)
        if stop and not last:
            say(f"stopped after update {step + 1}; go on with: {' '.join(sys.argv)} --resume")
            return
    report(args)


def say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def peak_memory() -> float:
    """GB, of the GPU, or of the process on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def report(args: Args) -> None:
    """Before and after, on the held-out questions."""
    evals = read_log(Path(args.out, "evals.jsonl"))
    keys = ("greedy", "sampled", "logp_y", "elbo", "z_len")
    say("".join(f"{k:>10}" for k in ("", *keys)))
    for name, row in (("before", evals[0]), ("after", evals[-1])):
        say(f"{name:>10}" + "".join(f"{row[k]:10.3f}" for k in keys))
    texts = read_log(Path(args.out, "samples.jsonl"))
    for before, after in zip(texts[:3], texts[-3:]):
        say(f"\n{before['question']} [{before['gold']}]\n  before: {before['text']}\n  after: {after['text']}")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr."""
    try:
        train(parse(argv))
        return 0
    except Problem as e:
        if is_first():
            print(f"latro.py: {e}", file=sys.stderr)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 1


if __name__ == "__main__":
    sys.exit(main())
