"""The operations that LaTRO spends its time in, behind one switch.

`reference.py` defines them in plain torch and is what runs today, on CPU and on CUDA. A faster
implementation is a module with some of the same names, listed in BACKENDS after it.

transformers has use for a hub client that is also called `kernels`, and would take this package for
it where that one is installed. So this one comes first, and says that the other is not there.
"""

from functools import wraps
from types import ModuleType

from transformers import utils

from . import reference
from .attention import attention, context, tree_mask, unsupported, window
from .memory import memory_table
from .reference import Scores, score_given, span_sums
from .sampler import sample
from .tree import Rationale, Tree, conclude, gold_rationale, plant

for module in (utils, utils.import_utils):
    module.is_kernels_available = lambda *_, **__: False

BACKENDS: dict[str, ModuleType] = {"torch": reference}
chosen = reference


def use(name: str) -> None:
    """Chooses the implementation: "torch", "triton", or "auto" for the fastest that runs here.

    Raises ValueError for one that does not."""
    global chosen
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{name}: no such kernels here; there is auto, {', '.join(BACKENDS)}")
    chosen = list(BACKENDS.values())[-1] if name == "auto" else BACKENDS[name]


def dispatched(definition):
    """The chosen module's function of this name; the definition where it has none."""
    @wraps(definition)
    def call(*args, **options):
        return getattr(chosen, definition.__name__, definition)(*args, **options)
    return call


token_logprobs = dispatched(reference.token_logprobs)
score_rationales = dispatched(reference.score_rationales)
pick_tokens = dispatched(reference.pick_tokens)
