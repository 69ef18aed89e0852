"""What is logged: a record per rationale, means over rationales, time, memory, versions."""

import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from kernels.reference import Scores

from .answers import flexible
from .errors import DIVERGENCE_HINT, UserError


def records(codec, examples: list, groups: list[list], logp: Tensor,
            scores: Scores) -> list[list[dict]]:
    """A record for each rationale of each question: text z, log-probs in nats, lengths in tokens.

    template, answer, end: log-probs of these parts of what follows z; None, as logp_y, where y was
    not scored. reaches: z alone leads to the gold answer. right: the policy's own answer is the
    gold one, where it gave one. logp (T,): the log-probs that gave `scores`."""
    sums = {k: v.tolist() for k, v in scores._asdict().items()
            if k != "token_weights" and v is not None}
    sums = iter([dict(zip(sums, row)) for row in zip(*sums.values())])
    tokens = iter(logp.tolist())

    def parts(example, rationale) -> dict:
        own = [next(tokens) for _ in rationale.actions + rationale.y]
        if not rationale.y:
            return dict.fromkeys(("logp_y", "template", "answer", "end"))
        n = len(example.answer)
        # The template is part of y, or of what ended z.
        t = len(rationale.y) - n or len(rationale.actions) - rationale.length
        return dict(template=sum(own[-n - t:-n]), answer=sum(own[-n:-1]), end=own[-1])

    def record(example, rationale) -> dict:
        z, ended_by = rationale.actions[:rationale.length], rationale.actions[rationale.length:]
        z, is_eos = codec.text(z), len(ended_by) == 1 and ended_by[0] in codec.eos
        return next(sums) | dict(
            z=z, z_len=rationale.length, finished=not rationale.truncated, eos=is_eos,
            actions=len(rationale.actions), answers=len(rationale.y),
            reaches=flexible(z, example.gold, example.options), **parts(example, rationale),
            **({} if rationale.right is None else dict(right=rationale.right)))
    return [[record(e, r) for r in group] for e, group in zip(examples, groups)]


def summary(questions: list[list[dict]]) -> dict:
    """Means over the rationales of all questions; log-probs in nats, lengths in tokens.

    elbo is E[log pi(y|x+z)] - KL whatever beta is, None without pi_0 or y. reward_right: the
    correlation of the reward with being right, within questions where both vary. unique: the share
    of different rationales. entropy: estimated, per token. finished, eos: the share that L did not
    cut, and of those that EOS ended."""
    samples = [s for q in questions for s in q]

    def mean(key: str) -> float | None:
        values = [s[key] for s in samples]
        return None if None in values else float(np.mean(values))
    kl = mean("logp_z") - mean("logp0_z") if "logp0_z" in samples[0] else None
    logp_y = mean("logp_y")
    pairs = [np.array([(s["reward"], s.get("right", s["reaches"])) for s in q], float)
             for q in questions]
    correlations = [np.corrcoef(p.T)[0, 1] for p in pairs if (p.std(0) > 0).all()]
    means = {k: mean(k) for k in "reward z_len finished eos template answer end reaches".split()}
    return dict(elbo=None if None in (kl, logp_y) else logp_y - kl, logp_y=logp_y, kl=kl,
                **means,
                reward_std=float(np.mean([np.std([s["reward"] for s in q]) for q in questions])),
                reward_right=float(np.mean(correlations)) if correlations else None,
                unique=float(np.mean([len({s["z"] for s in q}) / len(q) for q in questions])),
                entropy=-mean("logp_z") / (mean("actions") or 1))


def check_finite(examples: list, rows: list[list[dict]], step: int, out: str) -> None:
    """Raises UserError, on every rank, where a log-prob is not finite, and names the questions."""
    bad = [example.place for example, group in zip(examples, rows)
           if not all(math.isfinite(row["logp_z"] + (row["logp_y"] or 0)) for row in group)]
    if bad:
        raise UserError(f"update {step + 1}: log-probs are not finite for {', '.join(bad[:5])};"
                        f" {out} keeps its last state; {DIVERGENCE_HINT}")


def throughput(questions: list[list[dict]], seconds: dict[str, float]) -> dict:
    """What an update cost: seconds by phase, scored tokens per second over all of it."""
    tokens = sum(r["actions"] + r["answers"] for group in questions for r in group)
    return dict(seconds=seconds, tokens_per_s=tokens / sum(seconds.values()))


def peak_memory() -> float:
    """The peak of this process so far, in GB: of the GPU's memory, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def commit() -> str:
    """The commit of this project's files; "" where there is no git, or no repository."""
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def environment(processes: int) -> dict:
    """What a run's numbers depend on besides its settings: commit, versions, machine."""
    return dict(
        commit=commit(),
        torch=torch.__version__, transformers=transformers.__version__, python=sys.version,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cores=os.cpu_count(), processes=processes)
