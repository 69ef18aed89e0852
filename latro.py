"""LaTRO, LaTent Reasoning Optimization (Chen et al., arXiv 2411.04282), in one file.

A policy writes K rationales z for a question x; its own log-probability of the gold answer y after
each of them is the reward. No reward model, no verifier, no gold rationales.

    python latro.py                                                        a toy, on a laptop
    torchrun --nproc_per_node 8 latro.py --model meta-llama/Llama-3.1-8B   the paper's GSM8K run

Objective (eq. 3), with pi_0 the policy before training:
    J = E_{z ~ pi(.|x)}[ log pi(y|x+z) ] - beta KL( pi(z|x) || pi_0(z|x) )
Gradient (eq. 4), estimated from K rationales for each of B questions, N = B K:
    1/N sum  A grad log pi(z|x) + grad log pi(y|x+z)        A_k = r_k - mean of the other r
    r = log pi(y|x+z) - beta log( pi(z|x) / pi_0(z|x) )

Ending z is an action of the policy, part of pi(z|x); kernels/tree.py says what counts as z and what
as y for each --credit. Each is one exact objective: tests/test_estimator.py enumerates them.

x, y, z                  question, answer, rationale: lists of token ids
K, L, beta               rationales a question, longest z in tokens, weight of the KL
logp_z, logp0_z, logp_y  log pi(z|x), log pi_0(z|x), log pi(y|x+z): sums over tokens, nats
r, A                     reward and leave-one-out advantage of a rationale, nats
"""

import argparse, dataclasses, json, math, os, resource, shutil, signal, sys, time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import kernels  # before transformers: see there
import transformers
from kernels import (TASKS, Alone, Codec, Example, Problem, Rationale, Scores, Tree, answer_in,
                     brief, changed, checksum, claim, conclude, exhausted, gold_rationale, logged,
                     lost, packs, plain, plant, printable, read_rows, records, release, same_answer,
                     sample, score_given, score_rationales, speed, summary, token_logprobs,
                     tree_size, write)
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
AttentionInterface.register("latro", kernels.attention)
transformers.logging.disable_progress_bar()

def refuse(why: str):
    raise Problem(f"{why}; see --help")

# ------------------------------------------------------------------------------ 1. arguments
def flag(default, help: str, choices=None, least=None):
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, min=least))

@dataclasses.dataclass
class Args:
    """The settings of a run. What is None here, and more for the toy, is set by PRESETS."""
    model: str = flag(None, "hub id or directory (default: the toy that ships with this file)")
    task: str = flag(None, "what is asked", (*TASKS,))
    data: str = flag(None, "directory with train.jsonl and test.jsonl, or a hub id")
    out: str = flag("out", "directory of the run: a Hugging Face model, logs, state")
    objective: str = flag("latro", "sft: log pi(y|x), with gold z if any", ("latro", "sft"))
    bound: str = flag("elbo", "iwae: the multi-sample bound", ("elbo", "iwae"))
    reward: str = flag("logp", "prob: reward pi(y|x+z) itself", ("logp", "prob"))
    credit: str = flag("answer", "y: the answer, or template and answer", ("answer", "full"))
    K: int = flag(16, "rationales a question; a baseline needs 2", least=2)
    L: int = flag(500, "longest rationale, tokens", least=1)
    beta: float = flag(0.05, "weight of the KL to the starting policy; 0 loads none", least=0)
    temperature: float = flag(1.0, "of sampling z, and of pi(z|x) in the objective", least=1e-3)
    questions: int = flag(None, "questions an update, over all processes (3 each)", least=1)
    micro: int = flag(8192, "tokens a forward; a question's go together", least=1)
    steps: int = flag(None, "updates (or give --epochs)", least=1)
    epochs: float = flag(6.0, "passes over the training questions (or give --steps)", least=1e-9)
    lr: float = flag(5e-7, "peak learning rate of AdamW, falling linearly to 0", least=0)
    warmup: int = flag(0, "updates over which the learning rate rises", least=0)
    grad_clip: float = flag(1.0, "largest gradient norm", least=0)
    answer_weight: float = flag(1.0, "of eq. 4's answer term; 0: the released code", least=0)
    truncation_penalty: float = flag(0.0, "nats off the reward of a z that L cut", least=0)
    eval_every: int = flag(100, "updates between evaluations; 0: first and last only", least=0)
    eval_questions: int = flag(200, "held-out questions of an evaluation", least=1)
    save_every: int = flag(100, "updates between checkpoints; 0: at the end only", least=0)
    keep: int = flag(2, "states to keep: should the last one be damaged", least=1)
    shard: int = flag(0, "processes that share one copy of the weights; 0: all", least=0)
    timeout: float = flag(30.0, "minutes that processes wait for each other", least=1e-3)
    checkpointing: bool = flag(None, "recompute activations in the backward pass; None: if needed")
    seed: int = flag(0, "of the data order and the samples", least=0)
    resume: bool = flag(False, "go on from the last checkpoint in --out")
    plan: int = flag(0, "GPUs to plan for: print what a run on them needs, and end", least=0)
    kernels: str = flag("auto", "the fused operations", kernels.BACKENDS)

FREE = "resume", "out", "micro", "checkpointing", "kernels", "keep", "timeout"  # change nothing

PRESETS = {  # where a task differs from the paper's GSM8K run, which the defaults above are
    "toy": dict(model=str(HERE / "toy/model"), data=str(HERE / "toy"), L=48, lr=3e-4, steps=50,
                epochs=None, questions=8, eval_every=0, save_every=0),
    "gsm8k": dict(data="openai/gsm8k"),
    "arc_challenge": dict(data="allenai/ai2_arc", beta=0.25, epochs=12.0),
}

def recall(folder: str | Path) -> dict:
    """latro.json of a run: its args, its base model; of any other directory, that nothing is known.
    Raises Problem for what this version does not write."""
    note = Path(folder, "latro.json")
    try:
        held = json.loads(note.read_text()) if note.exists() else dict(args={}, base=None)
        return dict(args=held["args"] and vars(Args(**held["args"])), base=held["base"])
    except (ValueError, TypeError, KeyError) as e:
        raise Problem(f"{note}: not what a run of this version writes ({brief(e)})") from e

def parse(argv: list[str] | None) -> Args:
    """Command line -> settings: what was given, else the task's preset, else the default."""
    parser = argparse.ArgumentParser(prog="latro.py", allow_abbrev=False)
    for f in dataclasses.fields(Args):
        how = (dict(action=argparse.BooleanOptionalAction) if f.type is bool
               else dict(type=f.type, choices=f.metadata["choices"]))
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default})", **how)
    parser.error = refuse
    given = vars(parser.parse_args(argv))
    task = given.get("task") or ("gsm8k" if "model" in given else "toy")
    processes = given.get("plan") or world_size()
    preset = dict(task=task, questions=3 * processes) | PRESETS.get(task, {})
    if "steps" in given or "epochs" in given:
        preset |= dict(steps=None, epochs=None)
    saved = Path(given.get("out", Args.out), "latro.json")
    if restarted() and saved.exists():
        given["resume"] = True
    if given.get("resume") and saved.exists():
        preset = recall(saved.parent)["args"]
        other = [f"--{k.replace('_', '-')} {preset[k]} -> {v}" for k, v in given.items()
                 if k not in FREE and preset[k] != v]
        if other:
            raise Problem(f"--resume: {saved.parent} began with other flags: {'; '.join(other)};"
                          " leave them out, or start a new run with another --out")
    return check(Args(**preset | given))

def check(args: Args) -> Args:
    """Refuses values that cannot work, before anything is loaded."""
    for f in dataclasses.fields(Args):
        value, least = getattr(args, f.name), f.metadata["min"]
        if value == "" or None not in (least, value) and not least <= value < math.inf:
            must = "not be empty" if value == "" else f"be at least {least}"
            raise Problem(f"--{f.name.replace('_', '-')} {value}: must {must}")
    if args.model is None or args.data is None:
        raise Problem(f"--task {args.task} needs --model and --data: hub ids or directories")
    if args.steps and args.epochs:
        raise Problem("--steps and --epochs both set the length: give one of them")
    if args.bound == "iwae" and args.reward == "prob":
        raise Problem("--bound iwae averages probabilities already: use it with --reward logp")
    out, run = Path(args.out), Path(args.out, "latro.json").exists()
    taken = not args.resume if run else out.is_file() or (out / "config.json").exists()
    if taken and not args.plan:
        what = "holds a run: --resume, or" if run else "holds a model, or is a file:"
        raise Problem(f"--out {out} {what} choose another name")
    if args.questions % (W := args.plan or world_size()) or args.shard and W % args.shard:
        raise Problem(f"{W} processes: --questions {args.questions} must be a multiple of {W}, and"
                      f" --shard {args.shard} divide it")
    return args

# ------------------------------------------------------------------------------ 2. processes
def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))

def is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0

def restarted() -> int:
    """How often torchrun --max-restarts has started all processes anew, because one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

def say(text: str) -> None:
    print(printable(text), flush=True) if is_first() else None

def connect(minutes: float = Args.timeout) -> torch.device:
    """Joins torchrun's processes, or makes a group of this one; returns this process's device."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, wait = dist.HashStore(), timedelta(minutes=minutes)
    if "RANK" in os.environ:  # apart from what processes that died have left in torchrun's store
        store, *_ = next(rendezvous("env://", timeout=wait))
        store = dist.PrefixStore(f"start {restarted()}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, timeout=wait,
                            rank=int(os.environ.get("RANK", 0)), world_size=world_size())
    return device

def share(items: list) -> list:
    """This process's part: every W-th item."""
    return items[dist.get_rank()::world_size()]

def gather(mine: list) -> list:
    """The inverse of share, on every process."""
    parts = [mine] * world_size()
    if len(parts) > 1:  # gloo's own threads would put OpenMP's to sleep between small operations
        dist.all_gather_object(parts, mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]

def deal(sizes: list[int], budget: int) -> list[list[int]]:
    """Which of all items this process takes, pass by pass: all make as many, each about as large."""
    W, order = world_size(), sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    return [[order[W * i + dist.get_rank()] for i in some]
            for some in packs([sizes[i] for i in order[::W]], budget)]

def compute_dtype(device: torch.device) -> torch.dtype:
    """Of forward passes; weights that learn, gradients and Adam are float32 on every device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32

def distribute(model: nn.Module, device: torch.device, dtype: torch.dtype, group: int) -> nn.Module:
    """Moves the model to its device as dtype; FSDP2 splits each block over `group` processes.

    One process has nothing to split, but perhaps weights in another dtype than it computes in."""
    W, computing = world_size(), compute_dtype(device)
    sizes = (W // group, group) if 0 < group < W else (W,)
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=("copy", "shard")[-len(sizes):])
    mixed = fsdp.MixedPrecisionPolicy(computing, torch.float32, cast_forward_inputs=False)
    for block in [*model.model.layers, model]:
        for p in block.parameters():
            p.data = p.data.to(device, dtype)  # not the buffers: RoPE's frequencies stay float32
        block.to(device)
        if W > 1 or dtype != computing:
            fsdp.fully_shard(block, mesh=mesh, mp_policy=mixed)
    fsdp.register_fsdp_forward_method(model, "logprobs")
    return model

@contextmanager
def gathered(*models: nn.Module | None) -> Iterator[None]:
    """Whole weights inside, gathered once, not once a token; no FSDP hooks, for CUDA graphs."""
    shards = [m for root in models if root is not None for m in root.modules()
              if isinstance(m, fsdp.FSDPModule)]
    hooks = [(of, dict(of)) for m in shards for of in (m._forward_pre_hooks, m._forward_hooks)]
    for m in shards:
        m.unshard()
    for of, _ in hooks:
        of.clear()
    yield
    for of, held in hooks:
        of.update(held)
    for m in shards:
        m.reshard()

def backward(loss: Tensor, policy: nn.Module, last: bool = True) -> None:
    """Adds the gradient of the sum of all processes' losses; FSDP would take their mean. Copies of
    the weights add theirs up in the last pass of an update."""
    if isinstance(policy, fsdp.FSDPModule):
        policy.set_requires_all_reduce(last)
    (loss * world_size()).backward()

# ------------------------------------------------------------------------------ 3. text to ids
def read_model(args: Args) -> tuple:
    """Configuration and tokenizer; refuses what is not there, or would get wrong log-probs here."""
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    except Exception as e:  # a directory may hold anything, and each library has its own words
        here = "no whole model" if Path(args.model).is_dir() else "no directory, nor on the hub"
        raise Problem(f"--model {args.model}: {here} ({brief(e)}); pass a directory in Hugging"
                      " Face's format, or a hub id") from e
    if odd := kernels.unsupported(config):
        raise Problem(f"--model {args.model}: {config.model_type} has {', '.join(odd)}, which is"
                      " not supported; take a Llama, Mistral, Qwen or Phi-3 model")
    if len(tokenizer) > config.vocab_size:
        raise Problem(f"--model {args.model}: its tokenizer has {len(tokenizer)} tokens, its"
                      f" embedding {config.vocab_size}; they do not belong together")
    return config, tokenizer

def read_codec(args: Args) -> tuple[Codec, int]:
    """The codec, and how many tokens --model's context holds."""
    config, tokenizer = read_model(args)
    try:
        eos = transformers.GenerationConfig.from_pretrained(args.model).eos_token_id
    except OSError:
        eos = config.eos_token_id
    eos = [t for t in (*np.atleast_1d(eos).tolist(), tokenizer.eos_token_id) if t is not None]
    if not eos:
        raise Problem(f"--model {args.model}: no EOS in its configuration or tokenizer; set one")
    return Codec(tokenizer, args.task, [*dict.fromkeys(eos)]), kernels.context(config)

def encode(codec: Codec, most: int, rows: list[tuple[str, dict]], args: Args) -> list[Example]:
    """Rows as token ids; refuses one that `most` tokens of context cannot hold."""
    examples = [codec.example(*r) for r in rows]
    for (where, _), e in zip(rows, examples):
        if len(e.x) + max(args.L, len(e.z)) + len(codec.join + e.answer) > most:
            raise Problem(f"{where}: {len(e.x)} tokens of prompt, --L {args.L} and an answer exceed"
                          f" the model's context of {most}; lower --L or drop the row")
    return examples

def prepare(args: Args) -> tuple[Codec, list[Example], list[Example]]:
    """Codec, training and held-out questions: checks all that needs no weights."""
    codec, most = read_codec(args)
    rows, held_out = read_rows(args, "train"), read_rows(args, "validation")
    if not held_out:  # never the test split: whoever looks at it while training chooses by it
        some = max(1, len(rows) // 16)
        rows, held_out = rows[:-some], rows[-some:]
    if not rows:
        raise Problem(f"--data {args.data}: needs a train split of 2 rows or more")
    return codec, *(encode(codec, most, r, args) for r in (rows, held_out[:args.eval_questions]))

# ------------------------------------------------------------------------------ 4. sample and score
def rollout(policy, codec: Codec, batch: list[Example], slots: list[int], stream: int, args: Args,
            K: int, room: int = 0, greedy: bool = False) -> list[list[Rationale]]:
    """K rationales a question; their randomness hangs on (seed, stream, slot), not on the batch."""
    draws = [np.random.default_rng((args.seed, stream, slot)) for slot in slots]
    uniform = None if greedy else torch.tensor(np.concatenate(  # z's do not hang on `room`
        [np.hstack([d.random((K, args.L)), d.random((K, room))]) for d in draws]))
    drawn = iter(sample(policy, [e.x for e in batch], codec.stops, codec.eos, K, args.L, uniform,
                        args.temperature, room))
    return [[conclude(codec, *next(drawn), e.answer, args.credit) for _ in range(K)] for e in batch]

def load(args: Args, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """--model with this project's attention and log-probs, its parameters in dtype on device."""
    try:
        policy, found = AutoModelForCausalLM.from_pretrained(
            args.model, dtype="auto", use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
    except Exception as e:  # as above
        raise Problem(f"--model {args.model}: its weights cannot be read ({brief(e)}); fetch or"
                      " save them again, as safetensors") from e
    if absent := found["missing_keys"]:  # transformers would make them up
        raise Problem(f"--model {args.model}: its files lack {len(absent)} weights, such as"
                      f" {min(absent)}; fetch or save them again")
    policy.logprobs = logprobs.__get__(kernels.adopt(policy))
    if kernels.crowded(policy.config, args, world_size(), device):
        getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)()
    return distribute(policy, device, dtype, args.shard)

def logprobs(self: nn.Module, tree: Tree) -> Tensor:
    """(T,) log-probs of the tree's targets, nats. A method, so that FSDP's hooks surround it."""
    self.train(torch.is_grad_enabled())  # train mode is what allows checkpointing
    head = self.get_output_embeddings().weight
    layout = tree.layout.biased(head, self.config)
    h = self.model(input_ids=tree.ids, position_ids=tree.position, attention_mask=layout.branches,
                   layout=layout, use_cache=False).last_hidden_state[0]
    self.eval()
    return token_logprobs(h[tree.sources], head, tree.targets, tree.temperature)

def score(policy, reference, batch: list[Example], groups: list[list[Rationale]],
          args: Args) -> tuple[Tensor, Scores]:
    """(T,) log-probs with gradient, and what they make of each rationale: reward, A, weights."""
    tree, K = plant([e.x for e in batch], groups, args.temperature, policy), len(groups[0])
    logp = policy.logprobs(tree)
    with torch.no_grad():
        logp0 = None if reference is None else reference.logprobs(tree)
    N = args.questions * K  # of the whole update: the gradient does not hang on how it is split
    if K == 1:  # SFT: maximise the log-prob of all that was planted
        return logp, score_given(logp, *tree.offsets, total=N)
    cut = torch.tensor([r.cut for g in groups for r in g], device=logp.device)
    return logp, score_rationales(
        logp, logp0, *tree.offsets, K, args.beta, bound=args.bound, reward=args.reward,
        answer_weight=args.answer_weight, penalty=args.truncation_penalty * cut, total=N)

# ------------------------------------------------------------------------------ 5. evaluation
@torch.no_grad()
def evaluate(policy, reference, codec: Codec, examples: list[Example], args: Args,
             k: int = 2, some: slice = slice(None)) -> list[dict]:
    """A record for each of some questions, the same however the work is split.
    text, said, right: the greedy reply; samples: k >= 2 replies at --temperature, scored as in
    training. A reply is right where z ends within L and the gold answer follows."""
    room = max(len(e.answer) for e in examples) + len(codec.join)
    size = max(1, args.questions * args.K // world_size() // k)  # as many sequences as in a rollout
    mine, done = share([*enumerate(examples)][some]), []

    def reply(e: Example, r: Rationale) -> dict:
        said = answer_in(text := codec.text(r.ids))
        return dict(text=text, said=said, right=same_answer(said, e.gold), actions=len(r.actions))

    with gathered(policy, reference):
        for slots, batch in (zip(*mine[i:i + size]) for i in range(0, len(mine), size)):
            best = rollout(policy, codec, batch, slots, 0, args, 1, room, greedy=True)
            drawn = rollout(policy, codec, batch, slots, 0, args, k, room)
            for e, (greedy,), group in zip(batch, best, drawn):
                [rows] = records(codec, [e], [group], *score(policy, reference, [e], [group], args))
                done.append(dict(question=e.ask, gold=e.gold, **reply(e, greedy),
                                 samples=[row | reply(e, r) for row, r in zip(rows, group)]))
    return gather(done)

# ------------------------------------------------------------------------------ 6. out/
def log(args: Args, name: str, row: dict) -> None:
    """Appends a row in one write."""
    if is_first():
        with open(Path(args.out, name), "a") as f:
            f.write(json.dumps(row) + "\n")

def open_run(args: Args) -> None:
    """Makes --out, locks it, and notes there what the run was asked to do."""
    out = Path(args.out)
    dist.barrier()
    if is_first():
        (out / "state").mkdir(parents=True, exist_ok=True)
    if not gather([is_first() and claim(out / "state" / "lock")])[0]:
        raise Problem(f"--out {out}: another run that is still alive writes there; stop that one,"
                      " or choose another name")
    if is_first() and not (out / "latro.json").exists():
        held = dataclasses.asdict(args) | dict(resume=False)
        note = dict(args=held, base=args.model) | kernels.facts(world_size())
        write(out / "latro.json", json.dumps(note, indent=2))
    dist.barrier()

def save(args: Args, policy, optimizer, tokenizer, step: int) -> None:
    """Model and state into --out, or a Problem that costs neither those before nor room."""
    try:
        save_whole(args, policy, optimizer, tokenizer, step)
    except (dcp.CheckpointException, OSError, SafetensorError) as e:
        cause = next(iter(e.failures.values()))[0] if isinstance(e, dcp.CheckpointException) else e
        free = shutil.disk_usage(args.out).free / 1e9
        raise Problem(f"update {step} cannot be saved to {args.out} ({brief(cause)}; {free:.1f} GB"
                      " are free): make room, then --resume from its last state") from e
    finally:
        for half in ("incomplete", "export") if is_first() else ():
            shutil.rmtree(Path(args.out, "state", half), ignore_errors=True)

def save_whole(args: Args, policy, optimizer, tokenizer, step: int) -> None:
    """Each file whole before it gets its name; the state last, then older ones go."""
    kept, fresh = Path(args.out, "state"), Path(args.out, "state", "incomplete")
    if is_first():
        shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
    dist.barrier()
    model, moments = states.get_state_dict(policy, optimizer)
    dcp.save(dict(model=model, optimizer=moments), checkpoint_id=fresh)
    sums = dict(gather([(f.name, checksum(f)) for f in share(sorted(fresh.iterdir()))]))
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = states.get_model_state_dict(policy, options=options)
    if is_first():
        export(args, policy, whole, tokenizer)
        write(fresh / "sums.json", json.dumps(sums))
        os.replace(fresh, kept / f"step-{step:06d}")
        for old in sorted(kept.glob("step-*"))[:-args.keep]:
            shutil.rmtree(old)
    dist.barrier()

def export(args: Args, policy, weights: dict[str, Tensor], tokenizer) -> None:
    """The model in the base's own dtype, as one file: one rename makes it the current one."""
    dtype, fresh = policy.config.dtype, Path(args.out, "state", "export")
    with torch.device("meta"):
        config = type(policy.config).from_dict(policy.config.to_dict())  # saving changes it
        shell = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shell.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
    shell.tie_weights()
    shell.generation_config = policy.generation_config
    shell.save_pretrained(fresh, max_shard_size="1TB")
    tokenizer.save_pretrained(fresh)
    for f in sorted(fresh.iterdir()):
        os.replace(f, Path(args.out, f.name))

def damage(state: Path) -> list[str]:
    """What is wrong with the files of a state; each process looks at some. Raises Problem for what
    no run has written: a pickle that would run code."""
    try:
        sums = json.loads((state / "sums.json").read_text())
        found = gather([changed(state / name, crc) for name, crc in share([*sums.items()])])
        return [wrong for wrong in found if wrong] or plain(state / ".metadata")
    except (AttributeError, OSError, ValueError) as e:
        return [f"{state / 'sums.json'} cannot be read ({brief(e)})"]

def last_state(args: Args) -> Path | None:
    """The newest state that is whole, None where none was saved; damaged ones are put aside."""
    found = sorted(Path(args.out, "state").glob("step-*"))
    for state in reversed(found):
        if not (wrong := damage(state)):
            return state
        say(f"{wrong[0]}: going back from {state.name}")
        dist.barrier()  # all have read it
        if is_first():
            os.replace(state, state.with_name(f"damaged-{time.time_ns()}-{state.name}"))
    if found:
        raise Problem(f"--out {args.out}: no state in it is whole; the model in it is that of the"
                      f" last one: begin anew with --model {args.out} and another --out")

def restore(args: Args, policy, optimizer) -> int:
    """Loads the last whole state, cuts the logs back to it; returns its step, 0 without one."""
    kept, step = last_state(args), 0
    if kept:
        step = int(kept.name.removeprefix("step-"))
        model, moments = states.get_state_dict(policy, optimizer)
        dcp.load(dict(model=model, optimizer=moments), checkpoint_id=kept)
        states.set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=moments)
    for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl") if is_first() else ():
        rows = [r for r in logged(Path(args.out, name)) if r["step"] <= step] if kept else []
        write(Path(args.out, name), "".join(json.dumps(r) + "\n" for r in rows))
    return step

# ------------------------------------------------------------------------------ 7. training
LESS = "--micro, --K or --L, or take --checkpointing"
LOWER = dict(sample="--K, --L or --questions", score=LESS, backward=LESS,
             step="--shard, or take more GPUs")
STEADIER = "try a lower --lr, a higher --beta, or another --seed"

@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise Alone(f"out of GPU memory in {phase}, {peak_memory():.1f} GB at the peak: lower"
                    f" {LOWER[phase]} ({brief(e)}); --out keeps its last checkpoint") from e
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[phase] += time.perf_counter() - start

def draw_batch(examples: list[Example], step: int, args: Args) -> list[Example]:
    """The questions of an update, all processes'; every epoch has its own order."""
    n, first = len(examples), step * args.questions
    places = [divmod(first + i, n) for i in range(args.questions)]  # epoch, place in it
    order = {e: np.random.default_rng((args.seed, e)).permutation(n) for e, _ in places}
    return [examples[order[e][i]] for e, i in places]

def require_numbers(batch: list[Example], rows: list[list[dict]], step: int, args: Args) -> None:
    """Stops where a log-prob is not finite, and names the questions; all processes alike."""
    odd = [e.where for e, group in zip(batch, rows)
           if not all(math.isfinite(s["logp_z"] + s["logp_y"]) for s in group)]
    if odd:
        raise Problem(f"update {step + 1}: log-probs are not finite for {', '.join(odd[:5])};"
                      f" {args.out} keeps its last state; {STEADIER}")

def update(policy, optimizer, step: int, args: Args) -> tuple[float, float]:
    """One step of AdamW on clipped gradients; returns the norm before clipping, and the rate."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise Problem(f"update {step + 1}: the gradient is {norm}; {args.out} keeps its last state;"
                      f" {STEADIER}")
    left, fall = args.steps - step, max(1, args.steps - args.warmup)
    lr = args.lr * min(1.0, (step + 1) / (args.warmup + 1), left / fall)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm, lr

def train(args: Args) -> None:
    """Algorithm 1 of the paper."""
    device, stopping = connect(args.timeout), []
    for number in (signal.SIGTERM, signal.SIGINT):  # once: finish the update; twice: leave at once
        signal.signal(number, lambda n, _: (stopping.append(n), signal.signal(n, signal.SIG_DFL)))
    kernels.use(args.kernels, Problem)
    codec, questions, held_out = prepare(args)
    policy, reference = load(args, device, torch.float32), None
    if args.objective == "latro" and args.beta > 0:
        reference = load(args, device, compute_dtype(device))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    open_run(args)
    start, epoch = restore(args, policy, optimizer), args.questions / len(questions)
    args.steps = args.steps or math.ceil(args.epochs / epoch)
    say(f"{args.steps} updates of {args.questions} questions = {args.steps * epoch:.3g} epochs")
    if start == 0:
        look(0, policy, reference, codec, held_out, args)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=not is_first())
    for step in bar:
        seconds, rows = dict.fromkeys(("sample", "score", "backward", "step"), 0.0), []
        batch = draw_batch(questions, step, args)
        if args.objective == "sft":
            groups = [[gold_rationale(codec, e.z, e.answer)] for e in batch]
        else:
            with timed(seconds, "sample"), gathered(policy):
                mine = share(batch), share(range(len(batch)))
                groups = gather(rollout(policy, codec, *mine, step + 1, args, args.K))
        for some in (passes := deal([*map(tree_size, batch, groups)], args.micro)):
            x, z = zip(*((batch[i], groups[i]) for i in some))
            with timed(seconds, "score"):
                logp, s = score(policy, reference, x, z, args)
            with timed(seconds, "backward"):
                backward(-(s.weights * logp).sum(), policy, last=some is passes[-1])
            rows += zip(some, records(codec, x, z, logp.detach(), s))
        rows = [row for _, row in sorted(gather(rows), key=lambda r: r[0])]
        require_numbers(batch, rows, step, args)
        with timed(seconds, "step"):
            norm, lr = update(policy, optimizer, step, args)
        step += 1
        log(args, "samples.jsonl", dict(step=step, split="train", question=batch[0].ask,
                                        samples=rows[0]))
        log(args, "metrics.jsonl", dict(step=step, epoch=step * epoch, **(row := summary(rows)),
                                        grad_norm=norm, lr=lr, **speed(rows, seconds),
                                        peak_mem_gb=peak_memory()))
        bar.set_postfix({name: f"{row[k]:.2f}" for k, name in SHOWN if row[k] is not None})
        stop, last = any(gather([bool(stopping)])), step == args.steps
        if last or args.eval_every and step % args.eval_every == 0:
            look(step, policy, reference, codec, held_out, args)
        if last or stop or args.save_every and step % args.save_every == 0:
            save(args, policy, optimizer, codec.tokenizer, step)
        if stop and not last:
            return say(f"stopped after update {step}: go on with --resume --out {args.out}")
    report(args)

def look(step: int, policy, reference, codec: Codec, held_out: list[Example], args: Args) -> None:
    """Logs how the policy does on the held-out questions."""
    done = evaluate(policy, reference, codec, held_out, args)
    greedy, sampled = (float(np.mean([r["right"] for r in of])) for of in (
        done, [s for r in done for s in r["samples"]]))
    log(args, "evals.jsonl", dict(step=step, split="held-out", n=len(done), greedy=greedy,
                                  sampled=sampled, **summary([r["samples"] for r in done])))
    log(args, "samples.jsonl", dict(step=step, split="held-out", questions=done[:3]))

def peak_memory() -> float:
    """GB, so far."""
    return (torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)

SHOWN = ("elbo", "ELBO"), ("logp_y", "log p(y|x+z)"), ("kl", "KL"), ("z_len", "length")

def report(args: Args) -> None:
    """Before and after, on the held-out questions."""
    evals, samples = (logged(Path(args.out, f"{name}.jsonl")) for name in ("evals", "samples"))
    rows, looks = [evals[0], evals[-1]], [r for r in samples if r["split"] == "held-out"]
    say(f"\n{rows[0]['n']:4} held-out questions     before   after")
    for k, name in (("greedy", "greedy accuracy"), ("sampled", "accuracy of a sample"), *SHOWN):
        say(f"{name:24}" + "".join("       -" if r[k] is None else f"{r[k]:8.3f}" for r in rows))
    for a, b in zip(looks[0]["questions"], looks[-1]["questions"]):
        say(f"\n{a['question']}  [{a['gold']}]\n  before: {a['text']}\n  after:  {b['text']}")

def guarded(program: str, work, lower: str, kept: str) -> int:
    """Exit code 0, or 1 after one line on stderr: flags to lower, what an error has not cost."""
    try:
        work()
        return 0
    except Problem as e:
        why = e if is_first() or isinstance(e, Alone) else None
    except OSError as e:
        why = f"{brief(e)}; {kept}"
    except OverflowError as e:
        why = f"a number is too large ({brief(e)}); see --help"
    except (MemoryError, RuntimeError) as e:
        if exhausted(e):
            why = f"out of memory: lower {lower} ({brief(e)})"
        elif lost(e):
            why = f"another process has died, or hung longer than --timeout ({brief(e)}); {kept}"
        else:
            raise
    finally:
        release()
        if dist.is_initialized():
            dist.destroy_process_group()
    if why:
        print(printable(f"{program}: {why}"), file=sys.stderr)
    return 1

def begin(args: Args) -> None:
    say(kernels.plan(read_model(args)[0], args, args.plan)) if args.plan else train(args)

def main(argv: list[str] | None = None) -> int:
    return guarded("latro.py", lambda: begin(parse(argv)), "--micro, --K, --L or --questions",
                   "--out keeps its last checkpoint: set that right, then --resume")

if __name__ == "__main__":
    sys.exit(main())
