"""LoRA (arXiv 2106.09685): small trained matrices beside frozen weights. The frozen model is pi_0
itself, adapters off, so no second copy of it is held.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states

from .errors import UserError

A, B, BASE = ".lora_A.default.", ".lora_B.default.", ".base_layer."  # in names of weights
PREFIX = "base_model.model."  # of peft's names


def add_adapters(model: nn.Module, args) -> None:
    """Adds B A alpha / R to every linear layer except the head, and freezes all other weights.

    B starts at 0; A depends on --seed only. Raises UserError without the package peft."""
    try:
        import peft  # only where it is needed
    except ModuleNotFoundError as e:
        raise UserError(f"--lora-rank {args.lora_rank} needs the package {e.name}, which is not"
                        " installed here: pip install peft") from e
    config = peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, task_type="CAUSAL_LM",
                             target_modules="all-linear", base_model_name_or_path=args.model)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        peft.inject_adapter_in_model(config, model)


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the frozen one. peft's own switch would also change requires_grad."""
    layers = lora_layers(model)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class FrozenBase:
    """pi_0 of a LoRA run: the policy with its adapters off."""

    def __init__(self, policy: nn.Module):
        self.policy = policy

    def logprobs(self, tree) -> Tensor:
        with adapters_off(self.policy):
            return self.policy.logprobs(tree)

    def modules(self) -> list[nn.Module]:
        """Nothing of its own."""
        return []


def merge(weights: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """A state dict with the adapters added to the weights, in float32, under the plain names."""
    def plain(name: str, weight: Tensor) -> Tensor:
        down, up = (weights.get(name.replace(BASE, part)) for part in (A, B))
        if BASE not in name or down is None:
            return weight
        return weight.float() + scaling * (up.float() @ down.float())
    return {name.replace(BASE, "."): plain(name, weight) for name, weight in weights.items()
            if A not in name and B not in name}


def save_adapter(policy: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes the adapters in peft's format: PeftModel.from_pretrained(base, folder) loads them."""
    own = {PREFIX + name.replace(".default.", "."): weight.contiguous()
           for name, weight in weights.items() if A in name or B in name}
    folder.mkdir(parents=True)
    save_file(own, folder / "adapter_model.safetensors", metadata=dict(format="pt"))
    policy.peft_config["default"].save_pretrained(folder)


def load_adapter(policy: nn.Module, folder: Path) -> None:
    """Sets the adapters of a policy to those of `save_adapter`, of the same rank."""
    file = Path(folder, "adapter_model.safetensors")
    own = {name.removeprefix(PREFIX).replace(".weight", ".default.weight"): weight
           for name, weight in load_file(file).items()}
    options = states.StateDictOptions(full_state_dict=True, strict=False)
    if states.set_model_state_dict(policy, own, options=options).unexpected_keys:
        raise UserError(f"{file}: adapters of another model, or of other layers")
