"""What training a model holds in memory, from its shapes alone."""

import torch


def memory_table(config, args, questions: int, x: int = 256) -> str:
    """GB (1e9 bytes) that each GPU holds, by phase, for several numbers of GPUs.

    args: K, L, micro, checkpointing of latro.py; `questions`: a GPU's share of an update; x: tokens
    of a prompt. Bytes a parameter, split over the GPUs: 4 master weight, 8 Adam, 4 gradient, 2
    reference; whole in a rollout: 2. Estimates: the activations, a checkpoint a layer or about 16
    hidden states a layer, and the buffers of the log-probs' backward pass in Triton, dZ and dH."""
    from transformers import AutoModelForCausalLM  # it may be loading when this package is imported

    K, L, micro = args.K, args.L, args.micro
    with torch.device("meta"):
        n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    D, layers, tokens = config.hidden_size, config.num_hidden_layers, micro * (x + K * L)
    head = getattr(config, "head_dim", None) or D // config.num_attention_heads
    cache = questions * K * (x + L) * layers * 2 * config.num_key_value_heads * head * 2
    activations = tokens * D * 2 * layers * (1 if args.checkpointing else 16)
    logits = min(2**28, 2 * tokens * config.vocab_size) + 4 * tokens * D
    lines = [f"{n / 1e9:.2f} B parameters; {questions * K} rationales of {L} tokens; GB a GPU:",
             f"{'GPUs':>6}{'at rest':>10}{'rollout':>10}{'update':>10}"]
    for W in (1, 2, 4, 8, 16, 32):
        held = 14 * n / W, (14 / W + 2) * n + cache, 18 * n / W + activations + logits
        lines.append(f"{W:6}" + "".join(f"{h / 1e9:10.1f}" for h in held))
    return "\n".join(lines)
