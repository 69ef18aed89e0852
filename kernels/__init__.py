"""What is there for speed: fused operations, attention over the question tree, the decoder.

    token_logprobs     log-probs of given tokens; defined in reference.py, in Triton in
                       token_logprob.py
    score_rationales   reward, advantage, token weights; defined in latro.py, in Triton in
                       rationale_score.py

`use` switches between the definition and the fused kernel; the default takes the kernel on a GPU.

Import this package before transformers: an optional client of the Hugging Face hub is also called
`kernels`, and transformers would mistake this package for it.
"""

from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from os import environ

import torch
from transformers import utils

for module in (utils, utils.import_utils):
    module.is_kernels_available = lambda *_, **__: False  # the hub's client is not installed

BACKENDS = "auto", "triton", "torch"
TRITON = find_spec("triton") is not None
DEFINITIONS = {}  # by name: the function in plain torch
backend = "auto"


def interpreted() -> bool:
    """Whether Triton runs in its interpreter: on any machine, slowly, for tests."""
    return environ.get("TRITON_INTERPRET") == "1"


def use(name: str, error: type[Exception] = ValueError) -> None:
    """Choose the implementation: "triton", "torch", or "auto" (Triton for tensors on a GPU).

    Raises `error` for a choice that cannot run here."""
    global backend
    if name not in BACKENDS:
        raise error(f"kernels {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "triton" and not (TRITON and (torch.cuda.is_available() or interpreted())):
        raise error("--kernels triton needs Triton and a CUDA device; auto takes what runs here")
    backend = name


def dispatcher(name: str, module: str):
    """A function that calls `name` of a Triton module, or its definition in plain torch."""
    def call(tensor, *args, **options):
        fits = TRITON and (tensor.is_cuda or interpreted())
        if backend == "triton" or backend == "auto" and fits:
            fused = import_module(f".{module}", __name__)  # late: Triton is slow to import
            return getattr(fused, name)(tensor, *args, **options)
        if name not in DEFINITIONS:
            raise RuntimeError(f"{name} is defined in latro.py: import latro to run it on a CPU")
        return DEFINITIONS[name](tensor, *args, **options)
    return call


token_logprobs = dispatcher("token_logprobs", "token_logprob")
score_rationales = dispatcher("score_rationales", "rationale_score")


def definition(function):
    """Decorator: registers a definition in plain torch and returns its dispatcher, so that on CUDA
    the Triton function of the same name takes its place. The definition stays as `__wrapped__`."""
    DEFINITIONS[function.__name__] = function
    return wraps(function)(globals()[function.__name__])


from . import reference  # noqa: E402, F401  registers the definition of token_logprobs
