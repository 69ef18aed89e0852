"""What a run knows of each rationale, the means of it that are logged, and what they hang on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from .answers import flexible
from .reference import Scores
from .tasks import Example
from .tree import Rationale


def records(codec, batch: list[Example], groups: list[list[Rationale]], logp: Tensor,
            s: Scores) -> list[list[dict]]:
    """What is known of each rationale: its text z, log-probs in nats, lengths in tokens.
    template, answer, end: the log-probs of these tokens; reaches: z alone leads to the answer."""
    sums = {k: v.tolist() for k, v in s._asdict().items() if k != "weights" and v is not None}
    sums, tokens = iter([dict(zip(sums, row)) for row in zip(*sums.values())]), iter(logp.tolist())

    def row(e: Example, r: Rationale) -> dict:
        own, n = [next(tokens) for _ in r.actions + r.y], len(e.answer)
        t = len(r.y) - n or len(r.actions) - r.length  # the template is part of y, or of z's end
        z = codec.text(r.actions[:r.length])
        return next(sums) | dict(z=z, z_len=r.length, finished=not r.cut, actions=len(r.actions),
                                 answers=len(r.y), reaches=flexible(z, e.gold), end=own[-1],
                                 template=sum(own[-n - t:-n]), answer=sum(own[-n:-1]))
    return [[row(e, r) for r in group] for e, group in zip(batch, groups)]


def summary(questions: list[list[dict]]) -> dict:
    """Means over rationales; elbo is E[log pi(y|x+z)] - KL for any beta, None without pi_0.
    reward_right: the correlation of reward and being right within questions where both vary."""
    samples = [s for q in questions for s in q]
    mean = lambda key: float(np.mean([s[key] for s in samples]))
    kl = mean("logp_z") - mean("logp0_z") if "logp0_z" in samples[0] else None
    pairs = [np.array([(s["reward"], s.get("right", s["reaches"])) for s in q], float)
             for q in questions]
    ties = [np.corrcoef(p.T)[0, 1] for p in pairs if (p.std(0) > 0).all()]
    return dict(elbo=None if kl is None else mean("logp_y") - kl, logp_y=mean("logp_y"), kl=kl,
                **{k: mean(k) for k in "reward z_len finished template answer end reaches".split()},
                reward_std=float(np.mean([np.std([s["reward"] for s in q]) for q in questions])),
                reward_right=float(np.mean(ties)) if ties else None,
                unique=float(np.mean([len({s["z"] for s in q}) / len(q) for q in questions])),
                entropy=-mean("logp_z") / (mean("actions") or 1))  # a token's, by these samples


def speed(rows: list[list[dict]], seconds: dict[str, float]) -> dict:
    """What an update cost: seconds by phase, scored tokens a second."""
    tokens = sum(r["actions"] + r["answers"] for group in rows for r in group)
    return dict(seconds=seconds, tokens_per_s=tokens / sum(seconds.values()))


def facts(processes: int) -> dict:
    """What the numbers of a run hang on, beside its settings."""
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    return dict(
        commit=subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        torch=torch.__version__, transformers=transformers.__version__, python=sys.version,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cores=os.cpu_count(), processes=processes)
