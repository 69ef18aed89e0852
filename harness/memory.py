"""What a run needs, from the shapes of a model alone: memory at each moment, arithmetic, seconds.

On each of W GPUs: weights, gradients and Adam's moments in float32, their rows split over `group`
GPUs; bfloat16 for what computes, gathered a block at a time, or all at once in order to sample.

    sample     the policy gathered, the cache, logits while tokens are drawn
    head       the backward pass of the log-probs: all that was kept is still there
    layer      that of the last block, computed once more beside what the others keep
    reduce     the end of the backward pass: whole gradients of embedding and head, in float32
    evaluate   as sample, with the reference gathered as well

Weights, gradients, Adam, reference and cache are exact; activations and log-probs are what each
operation keeps for its gradient. Not counted: CUDA's context, NCCL's buffers, the allocator's gaps.
A card holds some 6 % more than its name says, which must do for these.
"""

import dataclasses
import os

import torch

from kernels.decode import PACES

CARDS = 16, 24, 40, 48, 80, 96, 141, 192  # GB
FLOPS, BANDWIDTH, SHARE = 989e12, 3.35e12, 0.4  # an H100's, bfloat16; the share of both assumed
NVLINK, NETWORK = 450e9, 50e9  # bytes a second that a GPU receives in a node, and from others
DZ = 2**28  # DZ_BYTES of token_logprob.py, which cannot be imported without Triton


class Shape:
    """Sizes of a model and of a run on W GPUs, in numbers (not bytes).

    x, y: tokens of a prompt, and of an answer with its template."""

    def __init__(self, config, args, W: int, x: int = 256, y: int = 16):
        from transformers import AutoModelForCausalLM  # late: it is slow to import
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.parameters, block = [*model.parameters()], model.model.layers[0]
        self.n, self.block = (sum(p.numel() for p in m.parameters()) for m in (model, block))
        self.V, self.D = model.get_output_embeddings().weight.shape
        self.mlp, self.layers = config.intermediate_size, config.num_hidden_layers
        self.root = self.n - self.layers * self.block  # embedding, head, last norm
        self.width = getattr(config, "head_dim", None) or self.D // config.num_attention_heads
        self.H, self.G = (self.width * heads for heads in (  # of all queries, of all keys
            config.num_attention_heads, config.num_key_value_heads))
        self.normed = self.H + self.G if hasattr(block.self_attn, "q_norm") else 0
        self.W, self.group, self.questions = W, args.shard or W, args.questions // W
        self.rows = self.questions * args.K
        self.K = args.K if args.objective == "latro" else 1  # of an update's tree
        self.x, self.y, self.L, self.T = x, y, args.L, self.K * (args.L + y)
        self.S = x + self.T - self.K + 1  # the last token of y predicts nothing; one for padding
        self.trees = max(1, min(self.questions, args.micro / self.S))  # of a forward pass
        self.places = x + self.T  # of a tree's tokens, trunk and branches in rows of their own
        self.seen = x + self.K * x + self.T  # by those rows: each branch sees the trunk as well
        self.pairs = x * x + self.T * (x + args.L + y)  # of places and what they could see
        self.reference = args.objective == "latro" and args.beta > 0
        self.checkpointing = bool(args.checkpointing)

    def held(self) -> int:
        """Parameters that a GPU keeps: FSDP2 gives each an equal number of rows, rounded up."""
        return sum(-(-len(p) // self.group) * p[0].numel() for p in self.parameters)

    def block_bytes(self, e: int) -> int:
        """What the gradient of a block needs of a tree; e: bytes of a number.

        A norm keeps its input in float32, it normalised, and what it returns; attention q, k and v
        of the rows, and what it returns, moved back too; the MLP gate, its SiLU, up, and their
        product."""
        norms = 2 * self.D * (4 + 2 * e) + self.normed * (4 + e)
        rows = 2 * self.places * (self.H + self.G) + 2 * self.seen * self.G
        return self.S * (norms + e * (self.H + 4 * self.mlp)) + e * rows

    def cache(self, tokens: float, e: int = 2) -> float:
        """Bytes of the keys and values of all rows of a rollout, of so many tokens each."""
        return self.rows * tokens * self.layers * 2 * self.G * e


def memory_phases(s: Shape, e: int = 2) -> dict[str, dict[str, float]]:
    """Bytes on a GPU at the memory_phases that can be its peak, by what holds them; e: bytes of a number
    that is computed with."""
    both = 2 if s.reference and s.W > 1 else 1  # the reference is gathered too, if it is split
    rest = dict(weights=4 * s.held(), Adam=8 * s.held() + 4 * len(s.parameters))
    rest |= dict(reference=e * s.held()) if s.reference else {}

    def rollout(gathered: int, tokens: int) -> dict[str, float]:
        more = 1 + 1 / (4 * s.layers)  # keys, or values, of half of the rows move at a time
        cache = s.cache(PACES["cuda"].round_up(tokens), e) * more
        return rest | dict(gathered=e * gathered, cache=cache,
                           logits=24 * s.rows * s.V)  # logits, p and one between, and recorded
    kept = s.layers * (e * s.S * s.D if s.checkpointing else s.block_bytes(e))
    masks = s.pairs * (1 + e * s.H // s.G)  # as bool, and as numbers for heads that share keys
    kept = s.trees * (kept + masks + s.S * 2 * e * s.width)  # cosines and sines
    again = s.checkpointing * s.block_bytes(e) + e * s.S * (s.D + 2 * s.mlp)
    T, root, dW = s.trees * s.T, e * s.root * both, e * s.V * s.D
    known = rest | dict(gradients=4 * s.held())
    earlier = known if s.trees < s.questions else rest  # gradients of passes before the last
    return dict(
        sample=rollout(s.n, s.x + s.L),
        head=earlier | dict(gathered=root, activations=kept + s.trees * s.S * s.D * (4 + 2 * e),
                          logprobs=dW + T * s.D * (2 * e + 4) + min(DZ, e * T * s.V)),
        layer=earlier | dict(gathered=root + dW + (3 * e + 4) * s.block,
                           activations=kept + s.trees * again),
        reduce=known | dict(gathered=root + (e + 4) * s.root),
        evaluate=rollout(s.n * both, s.x + s.L + s.y))


def flops(s: Shape) -> float:
    """Of an update's forward and backward passes, on all GPUs."""
    passes = 3 + s.checkpointing + s.reference  # a backward pass costs two forward ones
    blocks = 2 * s.S * s.layers * s.block + 4 * s.pairs * s.H * s.layers
    spared = s.checkpointing * 2 * s.S * s.layers * s.mlp * s.D  # a block's last product
    head = 2 * s.T * s.V * s.D * (4 + s.reference)  # of which its backward pass is 3
    return s.W * s.questions * (passes * blocks - spared + head)


def seconds(s: Shape) -> tuple[float, float]:
    """Of sampling, which reads weights and cache once a token, and of the rest of an update, at
    SHARE of BANDWIDTH and of FLOPS."""
    read = s.L * (2 * s.n + s.cache(s.x + s.L / 2)) if s.K > 1 else 0
    return read / (SHARE * BANDWIDTH), flops(s) / (s.W * SHARE * FLOPS)


def bytes_received(s: Shape, e: int = 2) -> tuple[float, float]:
    """Bytes that a GPU receives in an update: from the `group` that it shares the weights with, and
    from other copies. A ring passes on (n - 1) / n of what is gathered or scattered, and twice that
    of what is summed.

    To sample, the policy is gathered once; in each pass embedding and head once, blocks for the
    forward and for the backward pass, the reference's for its own; gradients in float32 are
    scattered in each pass, and summed over copies in the last."""
    passes, copies = -(-s.questions // int(s.trees)), s.W // s.group
    gathered = s.n * (s.K > 1) + passes * (s.root + (2 + s.reference) * s.layers * s.block)
    inside = (e * gathered + 4 * passes * s.n) * (s.group - 1) / s.group
    return inside, 4 * s.n / s.group * 2 * (copies - 1) / copies


def fit_to_memory(config, args, W: int, memory: float,
           e: int = 2) -> tuple[Shape, dict[str, dict[str, float]]]:
    """Shape and memory_phases of a run; activations are computed again in the backward pass if args say
    so, or say nothing and a device of so many bytes would not hold them all."""
    for again in (False, True) if args.checkpointing is None else (args.checkpointing,):
        s = Shape(config, dataclasses.replace(args, checkpointing=again), W)
        table = memory_phases(s, e)
        if peak_bytes(table) <= memory:
            break
    return s, table


def peak_bytes(table: dict[str, dict[str, float]]) -> float:
    """Bytes."""
    return max(sum(held.values()) for held in table.values())


def needs_activation_checkpointing(config, args, W: int, device: torch.device) -> bool:
    """Whether a run on W such devices has to compute its activations again. On a CPU all processes
    are taken to share one host, and half of its memory to be theirs."""
    if device.type == "cuda":
        memory, e = torch.cuda.get_device_properties(device).total_memory / 1.06, 2
    else:
        memory, e = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / W, 4
    return fit_to_memory(config, args, W, memory, e)[0].checkpointing


def plan(config, args, W: int) -> str:
    """The table of --plan: GB (1e9 bytes) on each of W GPUs, the card that holds them, seconds."""
    for card in CARDS:
        s, table = fit_to_memory(config, args, W, 1e9 * card)
        if fits := peak_bytes(table) <= 1e9 * card:
            break
    verdict = (f"a card of {card} GB holds it" if fits else f"no card of {card} GB holds it: more"
               " GPUs, or lower --K, --L or --micro")
    updates, total = W * s.questions * s.K, [sum(held.values()) / 1e9 for held in table.values()]

    def row(name: str, cells) -> str:
        return f"{name:12}" + "".join(f"{'-' if c is None else f'{c:.2f}':>10}" for c in cells)
    parts = dict.fromkeys(part for held in table.values() for part in held)
    (drawn, rest), (inside, across) = seconds(s), bytes_received(s)
    return "\n".join([
        f"{s.n / 1e9:.2f} B parameters; GPUs: {W}, each with {s.questions} questions of {s.x}"
        f" tokens x {s.K} rationales of {s.L}; with{'out' * (not s.checkpointing)} checkpointing",
        f"{'GB a GPU':12}" + "".join(f"{moment:>10}" for moment in table),
        *(row(p, (h[p] / 1e9 if p in h else None for h in table.values())) for p in parts),
        row("total", total), f"{max(total):.1f} GB at the peak: {verdict}",
        f"an update: {updates * s.L} tokens to sample, {updates * (s.L + s.y)} to score,"
        f" {flops(s) / 1e15:.3g} PFLOP; {drawn:.3g} s to sample and {rest:.3g} s for the rest",
        f"if {SHARE:.0%} (assumed) of an H100's {FLOPS / 1e12:.0f} TFLOP/s and"
        f" {BANDWIDTH / 1e12} TB/s are reached", *([
            f"it receives {inside / 1e9:.3g} GB from the {s.group} GPUs that share the weights:"
            f" {inside / NVLINK:.3g} s over NVLink, {inside / NETWORK:.3g} s over 400 Gb/s",
            f"and {across / 1e9:.3g} GB from other copies: {across / NETWORK:.3g} s over 400 Gb/s",
        ] if W > 1 else [])])
