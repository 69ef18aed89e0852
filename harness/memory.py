"""Memory, arithmetic and time of a run, from the shapes of a model alone: the table of --plan.

Each GPU keeps its shard of the weights, gradients and Adam's moments in float32. It computes in
bfloat16, with weights that are gathered a block at a time, or all at once for sampling. The peak is
in one of these phases:

    sample     the whole policy is gathered; the KV cache; logits of the tokens that are drawn
    head       backward pass through the log-probs: every saved activation is still there
    layer      backward pass through the last block: its activations, recomputed if checkpointing
               is on, and the saved ones of the other blocks
    reduce     end of the backward pass: whole gradients of embedding and head, in float32
    evaluate   as sample, with the reference gathered too

Weights, gradients, Adam, reference and cache are exact. Activations and log-probs are what each
operation saves for its gradient. Not counted: the CUDA context, NCCL's buffers, fragmentation. A
card has about 6 % more memory than its name says, and that margin has to cover them.
"""

import copy
import dataclasses
import os

import torch

from kernels.attention import windows
from kernels.decode import PACES

from .errors import UserError

CARDS = 16, 24, 40, 48, 80, 96, 141, 192  # GB
H100_FLOPS, H100_BANDWIDTH = 989e12, 3.35e12  # bfloat16 operations and bytes per second
UTILIZATION = 0.4  # the share of both that is reached: assumed
NVLINK, NETWORK = 450e9, 50e9  # bytes per second that a GPU receives in its node, and from others
DZ_BYTES = 2**28  # as in kernels/token_logprob.py, which cannot be imported without Triton


class Shape:
    """Sizes of a model, of a run on W GPUs, and of one question tree: counts, not bytes."""

    def __init__(self, config, args, W: int, prompt_tokens: int = 256, answer_tokens: int = 16):
        """`answer_tokens` includes the template."""
        from transformers import AutoModelForCausalLM  # late: it is slow to import
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        blocks, block = model.model.layers, model.model.layers[0]

        # The model. A token uses `experts` of a mixture of experts, whose weights are 3D.
        self.weights = [*model.parameters()]
        self.parameters = sum(w.numel() for w in self.weights)
        self.blocks_parameters = sum(w.numel() for w in blocks.parameters())
        self.largest_block = max(sum(w.numel() for w in b.parameters()) for b in blocks)
        self.layers = len(blocks)
        self.root_parameters = self.parameters - self.blocks_parameters
        experts = getattr(config, "num_experts_per_tok", None) or 1
        self.used_by_a_token = sum(w.numel() * experts / len(w) if w.dim() == 3 else w.numel()
                                   for w in blocks.parameters())
        self.V, self.D = model.get_output_embeddings().weight.shape
        self.mlp_width = experts * (getattr(config, "moe_intermediate_size", None)
                                    or config.intermediate_size)
        self.copies = experts * (self.used_by_a_token < self.blocks_parameters)  # of a token
        norms = [child for child in block.children() if "Norm" in type(child).__name__]
        self.norm, self.norms = norms[0], len(norms)
        self.ends_by_norm = hasattr(block, "post_feedforward_layernorm")
        self.windows = len(windows(config))
        self.count_adapters(blocks, args.lora_rank)
        self.head_width = (getattr(config, "head_dim", None)
                           or self.D // config.num_attention_heads)
        self.query_width = self.head_width * config.num_attention_heads
        self.key_width = self.head_width * config.num_key_value_heads
        has_qk_norm = hasattr(block.self_attn, "q_norm")
        self.qk_norm_width = self.query_width + self.key_width if has_qk_norm else 0

        # The run. `shard` GPUs share one copy of the weights.
        self.W, self.shard = W, args.shard or W
        self.questions = args.questions // W  # per GPU and update
        self.rollout_rows = self.questions * args.K
        self.sampled = args.objective == "latro"
        self.has_reference = self.sampled and args.beta > 0
        # With LoRA, the reference is the policy's own frozen weights, which one GPU gathers from
        # nowhere.
        self.holds_reference = self.has_reference and not self.lora
        self.gathered_models = 2 if self.holds_reference and W > 1 else 1  # if sharded
        self.gathers_frozen = W > 1 or not self.lora
        self.checkpointing = bool(args.checkpointing)

        # One question tree: S tokens, of which T are scored.
        self.K = args.K if self.sampled else 1
        self.prompt_tokens, self.L, self.answer_tokens = prompt_tokens, args.L, answer_tokens
        self.T = self.K * (args.L + answer_tokens)
        self.S = prompt_tokens + self.T - self.K + 1  # no last token of y; one token of padding
        self.trees_per_pass = max(1, min(self.questions, args.micro / self.S))
        # Attention computes the prompt and each branch in rows of their own. Each branch also
        # attends to a copy of the prompt's keys.
        self.query_slots = prompt_tokens + self.T
        self.key_slots = prompt_tokens + self.K * prompt_tokens + self.T
        self.attention_pairs = (prompt_tokens * prompt_tokens
                                + self.T * (prompt_tokens + args.L + answer_tokens))

    def count_adapters(self, blocks, rank: int) -> None:
        """What is trained: all weights, or the two matrices of each linear layer's adapter."""
        linear = [m for m in blocks.modules() if isinstance(m, torch.nn.Linear)]
        self.lora, self.adapter_width = rank > 0, rank * len(linear) // len(blocks)
        adapters = [torch.empty(size, device="meta") for m in linear
                    for size in ((rank, m.in_features), (m.out_features, rank))]
        self.trained_weights = adapters if self.lora else self.weights
        self.trained = sum(w.numel() for w in self.trained_weights)

    def per_gpu(self, weights: list) -> int:
        """Parameters in a GPU's shard: FSDP2 gives each an equal number of rows, rounded up."""
        return sum(-(-len(w) // self.shard) * w[0].numel() for w in weights)

    def norm_bytes(self, itemsize: int) -> int:
        """Bytes that a norm saves of each number. Llama's saves its input in float32 and, for the
        gradient of its weight, the normalized input; others in float32, too."""
        dtype, saved = {2: torch.bfloat16, 4: torch.float32}[itemsize], {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape == x.shape:  # neither a weight nor one number a row
                saved[tensor.untyped_storage()._cdata] = tensor
            return tensor
        norm = copy.deepcopy(self.norm).to(dtype).requires_grad_(not self.lora)
        x = torch.empty(3, len(norm.weight), dtype=dtype, device="meta", requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            norm(x)
        return sum(tensor.itemsize for tensor in saved.values())

    def block_bytes(self, itemsize: int) -> int:
        """Bytes that one block saves of a tree for its gradient. `itemsize`: bytes of a number.

        Attention saves its input, q, k and v in rows, and its output both in rows and in the
        tree's order. The MLP saves its input, the gate, its SiLU, the up projection, and their
        product; experts also save a token's copies and their outputs. An adapter saves what is
        between its two matrices."""
        norms = (self.norms * self.D + self.qk_norm_width) * self.norm_bytes(itemsize)
        in_rows = (2 * self.query_slots * (self.query_width + self.key_width)
                   + 2 * self.key_slots * self.key_width)
        per_token = norms + itemsize * (2 * self.D + self.query_width + 4 * self.mlp_width
                                        + self.adapter_width + 2 * self.copies * self.D)
        return self.S * per_token + itemsize * in_rows

    def cache_bytes(self, tokens: float, itemsize: int = 2) -> float:
        """Bytes of the keys and values of all rows of a rollout, `tokens` in each row."""
        return self.rollout_rows * tokens * self.layers * 2 * self.key_width * itemsize


def memory_phases(s: Shape, itemsize: int = 2) -> dict[str, dict[str, float]]:
    """Bytes on one GPU, by phase and by what holds them. `itemsize`: bytes of a number in forward
    and backward passes."""
    shard, trained = s.per_gpu(s.weights), s.per_gpu(s.trained_weights)
    frozen = itemsize * shard if s.lora else 0
    resident = dict(weights=4 * trained + frozen, Adam=8 * trained + 4 * len(s.trained_weights))
    if s.holds_reference:
        resident |= dict(reference=itemsize * shard)
    with_gradients = resident | dict(gradients=4 * trained)
    # With several micro-batches, the earlier ones have left gradients.
    during_backward = with_gradients if s.trees_per_pass < s.questions else resident

    def rollout(gathered_parameters: int, tokens: int) -> dict[str, float]:
        # Dropping finished rows copies the keys, or the values, of half of the rows of one layer.
        copied = 1 + 1 / (4 * s.layers)
        cache = s.cache_bytes(PACES["cuda"].round_up(tokens), itemsize) * copied
        # Float32 logits, probabilities and one intermediate, each also in a captured graph.
        logits = 24 * s.rollout_rows * s.V
        return resident | dict(gathered=itemsize * gathered_parameters, cache=cache, logits=logits)

    # What a forward pass saves. Masks: as bool, and additive for each head that shares keys; one
    # for each window.
    saved = s.layers * (itemsize * s.S * s.D if s.checkpointing else s.block_bytes(itemsize))
    masks = s.windows * s.attention_pairs * (1 + itemsize * s.query_width // s.key_width)
    rope = s.windows * s.S * 2 * 4 * s.head_width  # cosines and sines, in float32
    saved = s.trees_per_pass * (saved + masks + rope)

    recomputed = s.checkpointing * s.block_bytes(itemsize)
    block_gradients = itemsize * s.S * (s.D + max(2 * s.mlp_width,
                                                  s.mlp_width + 3 * s.copies * s.D))
    adapters = s.trained if s.lora else 0
    whole = s.parameters * s.gathers_frozen + adapters
    root = itemsize * s.root_parameters * s.gathered_models * s.gathers_frozen
    # A block's weights, the next one's, its gradient, and that in float32.
    block = (2 * itemsize * s.largest_block * s.gathers_frozen
             + (itemsize + 4) * (adapters / s.layers if s.lora else s.largest_block))
    scored = s.trees_per_pass * s.T
    head_gradient = 0 if s.lora else itemsize * s.V * s.D
    root_gradient = 0 if s.lora else (itemsize + 4) * s.root_parameters
    hidden = s.trees_per_pass * s.S * s.D * (s.norm_bytes(itemsize) + itemsize)
    logprobs = (head_gradient + scored * s.D * (2 * itemsize + 4)
                + min(DZ_BYTES, itemsize * scored * s.V))
    return dict(
        sample=rollout(whole, s.prompt_tokens + s.L),
        head=during_backward | dict(gathered=root, activations=saved + hidden, logprobs=logprobs),
        layer=during_backward | dict(
            gathered=root + head_gradient + block,
            activations=saved + s.trees_per_pass * (recomputed + block_gradients)),
        reduce=with_gradients | dict(gathered=root + root_gradient),
        evaluate=rollout(whole * s.gathered_models,
                         s.prompt_tokens + s.L + s.answer_tokens))


def flops(s: Shape) -> float:
    """Floating-point operations of an update's forward and backward passes, on all GPUs."""
    passes = 3 + s.checkpointing + s.has_reference  # a backward pass costs as much as two forward
    # Frozen weights need no gradient, which is one of those two. Adapters are weights like others.
    blocks = (2 * s.S * s.used_by_a_token * (passes - s.lora)
              + 4 * s.attention_pairs * s.query_width * s.layers * passes
              + 2 * s.S * s.trained * (3 + s.checkpointing) * s.lora)
    # Recomputing a block stops before its last product, which no gradient needs, unless a norm or
    # a sum over experts follows it. With LoRA, that product is an adapter's.
    ends_by_product = not (s.lora or s.ends_by_norm or s.copies)
    not_recomputed = s.checkpointing * ends_by_product * 2 * s.S * s.layers * s.mlp_width * s.D
    # Of the head, the backward pass is 3, one of them its gradient.
    head = 2 * s.T * s.V * s.D * (4 + s.has_reference - s.lora)
    return s.W * s.questions * (blocks - not_recomputed + head)


def seconds(s: Shape) -> tuple[float, float]:
    """Seconds to sample, and seconds for the rest of an update, at UTILIZATION of an H100.

    Sampling reads the weights and the cache once per token; the rest is bound by arithmetic."""
    cache = s.cache_bytes(s.prompt_tokens + s.L / 2)
    bytes_read = s.L * (2 * s.parameters + cache) if s.sampled else 0
    return (bytes_read / (UTILIZATION * H100_BANDWIDTH),
            flops(s) / (s.W * UTILIZATION * H100_FLOPS))


def bytes_received(s: Shape, itemsize: int = 2) -> tuple[float, float]:
    """Bytes that a GPU receives in an update: from the GPUs of its own copy of the weights, and
    from the other copies.

    A ring of n passes on (n - 1) / n of what is gathered or scattered, and twice that of what is
    summed. Gathered: the policy once for sampling; embedding and head once per micro-batch; blocks
    for the forward pass, the backward pass, and the reference's forward pass. Gradients in float32
    are scattered in each micro-batch and summed over copies in the last."""
    micro_batches, copies = -(-s.questions // int(s.trees_per_pass)), s.W // s.shard
    blocks = (2 + s.has_reference) * s.blocks_parameters
    gathered = s.parameters * s.sampled + micro_batches * (s.root_parameters + blocks)
    scattered = 4 * micro_batches * s.trained
    from_shards = (itemsize * gathered + scattered) * (s.shard - 1) / s.shard
    return from_shards, 4 * s.trained / s.shard * 2 * (copies - 1) / copies


def fit_to_memory(config, args, W: int, available: float,
                  itemsize: int = 2) -> tuple[Shape, dict[str, dict[str, float]]]:
    """Shape and memory_phases of a run on devices with `available` bytes each. Unless the flag
    --checkpointing decides, activations are recomputed only if they would not fit otherwise."""
    for checkpointing in (False, True) if args.checkpointing is None else (args.checkpointing,):
        s = Shape(config, dataclasses.replace(args, checkpointing=checkpointing), W)
        table = memory_phases(s, itemsize)
        if peak_bytes(table) <= available:
            break
    return s, table


def peak_bytes(table: dict[str, dict[str, float]]) -> float:
    """Bytes of the largest phase."""
    return max(sum(parts.values()) for parts in table.values())


def needs_activation_checkpointing(config, args, W: int, device: torch.device) -> bool:
    """Whether a run on W such devices has to recompute activations. On a CPU, all processes are
    assumed to share one host and half of its memory. Raises UserError for weights that no GPU of
    this kind can hold."""
    if device.type == "cuda":
        available, itemsize = torch.cuda.get_device_properties(device).total_memory / 1.06, 2
    else:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available, itemsize = host / 2 / W, 4
    s, _ = fit_to_memory(config, args, W, available, itemsize)
    if device.type == "cuda" and s.sampled and itemsize * s.parameters > available:
        raise UserError(f"--model {args.model}: {what_is_gathered(s)}, and this one has"
                        f" {available / 1e9:.0f} GB; take a smaller model")
    return s.checkpointing


def what_is_gathered(s: Shape) -> str:
    return (f"a rollout gathers all {2e-9 * s.parameters * s.gathered_models:.0f} GB of weights on"
            " each GPU, however many there are")


def plan(config, args, W: int) -> str:
    """The table of --plan: GB (1e9 bytes) on each of W GPUs, the card that holds them, seconds."""
    for card in CARDS:
        s, table = fit_to_memory(config, args, W, 1e9 * card)
        fits = peak_bytes(table) <= 1e9 * card
        if fits:
            break
    verdict = (f"a card of {card} GB holds it" if fits else f"no card of {card} GB holds it: more"
               " GPUs, or lower --K, --L or --micro")
    if s.sampled and 2e-9 * s.parameters * s.gathered_models > card:
        verdict = f"no card of {card} GB holds it: {what_is_gathered(s)}; see docs/performance.md"
    rationales = W * s.questions * s.K
    total = [sum(parts.values()) / 1e9 for parts in table.values()]

    def row(name: str, cells) -> str:
        return f"{name:12}" + "".join(f"{'-' if c is None else f'{c:.2f}':>10}" for c in cells)

    names = dict.fromkeys(name for parts in table.values() for name in parts)
    sample_seconds, other_seconds = seconds(s)
    without = "without" if not s.checkpointing else "with"
    trained = f", {s.trained / 1e6:.1f} M trained" if s.lora else ""
    lines = [
        f"{s.parameters / 1e9:.2f} B parameters{trained}; GPUs: {W}, each with {s.questions}"
        f" questions of {s.prompt_tokens} tokens x {s.K} rationales of {s.L};"
        f" {without} checkpointing",
        f"{'GB a GPU':12}" + "".join(f"{phase:>10}" for phase in table),
        *(row(name, (parts[name] / 1e9 if name in parts else None for parts in table.values()))
          for name in names),
        row("total", total),
        f"{max(total):.1f} GB at the peak: {verdict}",
        f"an update: {rationales * s.L} tokens to sample,"
        f" {rationales * (s.L + s.answer_tokens)} to score, {flops(s) / 1e15:.3g} PFLOP;"
        f" {sample_seconds:.3g} s to sample and {other_seconds:.3g} s for the rest",
        f"if {UTILIZATION:.0%} (assumed) of an H100's {H100_FLOPS / 1e12:.0f} TFLOP/s and"
        f" {H100_BANDWIDTH / 1e12} TB/s are reached"]
    if W > 1:
        from_shards, from_copies = bytes_received(s)
        lines += [
            f"it receives {from_shards / 1e9:.3g} GB from the {s.shard} GPUs that share the"
            f" weights: {from_shards / NVLINK:.3g} s over NVLink,"
            f" {from_shards / NETWORK:.3g} s over 400 Gb/s",
            f"and {from_copies / 1e9:.3g} GB from other copies:"
            f" {from_copies / NETWORK:.3g} s over 400 Gb/s"]
    return "\n".join(lines)
