"""Does this project compute what transformers does? Asked of every model when it is loaded.

A list of architectures would be out of date at once, and a wrong mask or a missing factor would not
show: rewards would only be a little off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernels.attention import logits_divisor, windows
from kernels.decode import Decoder

from .distributed import compute_dtype, unsharded
from .errors import UserError

PROMPTS, BRANCHES = (4, 7), ((2, 9), (5, 3))  # lengths in tokens; two branches for each prompt
WINDOW = 5  # in tokens, of the example: shorter than its sequences
NATS = 1e-3  # a mean difference that is taken for rounding in float32


@contextmanager
def short_window(policy: nn.Module) -> Iterator[None]:
    """Inside, the sliding windows of a model are WINDOW tokens, so that a short example sees what
    they do."""
    owners = [policy.config, *policy.modules()]
    held = [(owner, owner.sliding_window) for owner in owners
            if getattr(owner, "sliding_window", None)]
    for owner, _ in held:
        owner.sliding_window = WINDOW
    yield
    for owner, window in held:
        owner.sliding_window = window


def logprobs_of(logits: Tensor, tokens: list[int]) -> Tensor:
    """Log-probs of tokens (n,) from the logits (n, V) that predict them, nats."""
    targets = torch.tensor(tokens, device=logits.device)
    return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def by_forward(policy: nn.Module, prompts: list, branches: list, attention: str) -> list[Tensor]:
    """Log-probs of each branch by a plain forward pass over its sequence, nats."""
    def alone(prompt: list[int], branch: list[int]) -> Tensor:
        ids = torch.tensor([prompt + branch], device=policy.device)
        logits = policy(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1:-1]
        return logprobs_of(logits, branch)
    policy.set_attn_implementation(attention)
    found = [alone(prompt, branch) for prompt, group in zip(prompts, branches) for branch in group]
    policy.set_attn_implementation("latro")
    return found


def by_decoding(policy: nn.Module, prompts: list, branches: list, n: int) -> list[Tensor]:
    """Log-probs of the first n tokens of each branch, decoded with all prompts in one batch."""
    rows = [branch for group in branches for branch in group]
    decoder = Decoder(policy, prompts, len(branches[0]), n)
    steps = [decoder.prefill()]
    for length in range(1, n):
        decoder.set_length(length)
        token = torch.tensor([row[length - 1] for row in rows], device=policy.device)
        steps.append(decoder.decode_step(token))
    logits = torch.stack(steps, 1) / logits_divisor(policy.config)  # (rows, n, V)
    return [logprobs_of(own, row[:n]) for own, row in zip(logits, rows)]


@torch.no_grad()
def differences(policy: nn.Module, pack: Callable) -> tuple[dict[str, float], float]:
    """The mean differences of log-probs from plain forward passes by transformers' own attention,
    nats: of "scoring", by the question tree, and of "sampling", by the decoder. And how much may be
    rounding: below float32's precision, three times what two of transformers' attentions differ by.

    pack(prompts, branches, policy): the tree in which all of the branches are scored as z."""
    draw = torch.Generator().manual_seed(0)
    V = policy.config.vocab_size

    def ids(length: int) -> list[int]:
        return torch.randint(V, (length,), generator=draw).tolist()
    prompts, branches = [*map(ids, PROMPTS)], [[*map(ids, group)] for group in BRANCHES]
    n = min(min(group) for group in BRANCHES)
    with short_window(policy):
        tree = policy.logprobs(pack(prompts, branches, policy))
        with unsharded(policy):
            decoded = by_decoding(policy, prompts, branches, n)
            plain, allowed = by_forward(policy, prompts, branches, "eager"), NATS
            if compute_dtype(policy.device) != torch.float32 or (
                    torch.get_float32_matmul_precision() != "highest"):
                other = by_forward(policy, prompts, branches, "sdpa")
                allowed += 3 * float((torch.cat(plain) - torch.cat(other)).abs().mean())
    start = torch.cat([row[:n] for row in plain])
    return dict(scoring=float((tree - torch.cat(plain)).abs().mean()),
                sampling=float((torch.cat(decoded) - start).abs().mean())), allowed


def check_equivalence(policy: nn.Module, pack: Callable, name: str) -> None:
    """Raises UserError for a model whose log-probs would not be its own here."""
    found, allowed = differences(policy, pack)
    wrong = {what: nats for what, nats in found.items() if nats > allowed}  # NaN: see check_finite
    if wrong:
        what, nats = next(iter(wrong.items()))
        sliding = any(windows(policy.config))
        cause = ("its cache" if "scoring" not in wrong else
                 "its sliding window or attention" if sliding else "its attention")
        raise UserError(f"--model {name}: {what} gives log-probs that differ by {nats:.2g} nats a"
                        f" token from those of transformers ({cause} is of another kind);"
                        " take another model")
