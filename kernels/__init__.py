"""The operations that LaTRO spends its time in, behind one switch.

`reference.py` defines them in plain torch. `token_logprob.py` and `rationale_score.py` are the same
functions in Triton: what runs on CUDA unless `use` says otherwise.

transformers has use for a hub client that is also called `kernels`, and would take this package for
it where that one is installed. So this one comes first, and says that the other is not there.
"""

from functools import wraps
from importlib.util import find_spec
from os import environ

import torch
from transformers import utils

from . import reference
from .answers import (TEMPLATE, answer_in, as_number, canonical, flexible, majority, same_answer,
                      strict)
from .attention import adopt, attention, context, unsupported, window
from .files import changed, checksum, claim, logged, plain, release, write
from .planner import crowded, plan
from .problems import Alone, Problem, brief, exhausted, lost, printable
from .records import facts, records, speed, summary
from .reference import Scores, pick_tokens, score_given, span_sums
from .sampler import sample
from .tasks import TASKS, Codec, Example, read_rows
from .tree import Rationale, Tree, conclude, gold_rationale, packs, plant, tree_size

for module in (utils, utils.import_utils):
    module.is_kernels_available = lambda *_, **__: False

BACKENDS = "auto", "triton", "torch"
TRITON = find_spec("triton") is not None
chosen = "auto"


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter: on any machine, slowly, for tests."""
    return environ.get("TRITON_INTERPRET") == "1"


def use(name: str, error: type[Exception] = ValueError) -> None:
    """Chooses the implementation: "triton", "torch", or "auto": Triton for what is on a GPU.

    Raises `error` for what cannot run here."""
    global chosen
    if name not in BACKENDS:
        raise error(f"kernels {name!r}: there are {', '.join(BACKENDS)}")
    if name == "triton" and not (TRITON and (torch.cuda.is_available() or interpreted())):
        raise error("--kernels triton needs Triton and a CUDA device; auto takes what runs here")
    chosen = name


def dispatched(definition):
    """`definition`, or the function of its name in Triton where that one's turn has come."""
    @wraps(definition)
    def call(tensor, *args, **options):
        fits = TRITON and (tensor.is_cuda or interpreted())
        if chosen == "torch" or chosen == "auto" and not fits:
            return definition(tensor, *args, **options)
        from . import rationale_score, token_logprob  # late: Triton takes its time to load
        fused = token_logprob if definition is reference.token_logprobs else rationale_score
        return getattr(fused, definition.__name__)(tensor, *args, **options)
    return call


token_logprobs = dispatched(reference.token_logprobs)
score_rationales = dispatched(reference.score_rationales)
