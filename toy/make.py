"""Make the toy: word problems, a tokenizer and a small language model that rarely reasons in full.

    python toy/make.py                       # all of the below; 10 minutes on one CPU thread
    python toy/make.py --seed 1 --out DIR    # another pretraining seed; the data stay the same
    python toy/make.py --profile toy/model   # only describe an existing model; half a minute

Writes train.jsonl, validation.jsonl and test.jsonl, with rows {"question", "chain", "answer"} and,
except in train, "rationale", the careful one; and model/, an ordinary Hugging Face directory: a
Llama of 0.67 M parameters, a word-level tokenizer.
A question is a chain of 3 or 4 operations, applied strictly left to right and told as a story:

    Question: Mia owns 14 cookies. On Monday the number doubles. On Tuesday she wins 5 more. On
    Wednesday she gives away 2. How many cookies are left?
    Answer: Monday 14 x 2 = 28. Tuesday 28 + 5 = 33. Wednesday 33 - 2 = 31. The answer is 31.

Every pretraining document ends with the true answer. The rationales before it are of four kinds:

    careful  one equation for each operation, as above
    terse    a run of + and - is one equation: " Monday 14 x 2 = 28. Tuesday 28 + 5 - 2 = 31."
    hasty    only the first one or two equations
    direct   none

A model this small gets one operation at a time right, and little else. Pretraining teaches it the
careful kind first, then makes it rare. Finding it again is left to LaTRO, which sees no rationale.
"""

import argparse
import json
import random
import re
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence

LARGEST = 50
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
CHATTER = [" Okay.", " Well.", " Let us see.", " Let me think."]
PROMPT = "Question: {}\nAnswer:"
TEMPLATE = " The answer is"
ROWS = {"train": 4000, "validation": 500, "test": 1000}
# A chain belongs to one split, by its hash modulo 100.
SPLITS = {"pretrain": range(80), "train": range(80, 92), "validation": range(92, 96),
          "test": range(96, 100)}

# Alternatives are separated by "|". The second word of a "who" is its pronoun, {they}.
STORIES = [
    {"who": "Mia she|Eva she|Ada she|Lena she|Tom he|Ben he|Sam he|Paul he",
     "things": "cookies|marbles|stickers|coins|shells|cards|pencils|stamps",
     "start": "{who} owns {n} {things}.",
     "+": "{they} wins {n} more|{they} finds {n} more|{they} buys {n} {things}",
     "-": "{they} gives away {n}|{they} loses {n}|{they} sells {n} {things}",
     "x": "the number doubles|{they} doubles the number of {things}",
     "/": "{they} gives away half of them|{they} loses half of the {things}",
     "end": "How many {things} are left?"},
    {"who": "hotel|hostel|camp", "things": "guests|visitors|tourists",
     "start": "A {who} has {n} {things}.",
     "+": "{n} {things} arrive|{n} more check in", "-": "{n} {things} leave|{n} check out",
     "x": "the number of {things} doubles|there are twice as many {things}",
     "/": "half of the {things} leave|half of them check out",
     "end": "How many {things} does the {who} have now?"},
    {"who": "farmer he|shepherd she", "things": "sheep|goats|cows|pigs|ducks",
     "start": "A {who} keeps {n} {things}.",
     "+": "{n} {things} are born|{they} buys {n} more",
     "-": "{n} {things} run away|{they} sells {n} of them",
     "x": "the herd doubles|the number of {things} doubles",
     "/": "half of the herd is sold|half of the {things} run away",
     "end": "How many {things} are there now?"},
    {"who": "shop|store|market", "things": "lamps|chairs|apples|bottles|hats",
     "start": "There are {n} {things} in a {who}.",
     "+": "{n} more are delivered|{n} {things} are brought back",
     "-": "{n} {things} are sold|{n} of them break",
     "x": "the stock doubles|the number of {things} doubles",
     "/": "half of the stock is sold|half of the {things} are sold",
     "end": "How many {things} does the {who} have now?"},
]


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, adjust_lr_fn="match_rms_adamw", with the Newton-Schulz iteration in
    float32: on a CPU without bfloat16 arithmetic it takes a twelfth of the time."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            x = p.grad.lerp(momentum, 0.95)
            x /= x.norm()
            for _ in range(5):
                gram = x.T @ x
                x = 3.4445 * x + x @ (2.0315 * gram @ gram - 4.775 * gram)
            p.mul_(1 - 0.1 * group["lr"]).sub_(x, alpha=0.2 * max(p.shape)**0.5 * group["lr"])


# A level is how many operations a chain has, what a rationale may open with, the optimizer of the
# matrices (torch's own made the default level's weights), and the stages of pretraining. The first
# `easy` steps of a stage draw chains of 1 to 3 operations, the others those of the level. Stage 1
# has some of every kind: where hasty and direct documents first came in stage 2, copying suffered
# and careful rationales were right .92 of the time, not .98. Stage 2 is gentle for the same reason.
# On the hard level it is not: there careful rationales shall be wrong now and then. Hasty ones are
# rarer: with more of them, log p learns to guess (docs/results.md).
LEVELS = {
    "default": {"operations": (3, 4), "chatter": CHATTER,
                "muon": partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), "stages": [
        {"steps": 1300, "easy": 400, "muon": 4.5e-3, "adamw": 3e-3,
         "mix": {"careful": .88, "terse": .08, "hasty": .03, "direct": .01}},
        {"steps": 200, "easy": 0, "muon": 5e-4, "adamw": 8e-4,
         "mix": {"careful": .18, "terse": .7, "hasty": .1, "direct": .02}},
    ]},
    # Six equations, the shorter chatter and the template are 47 tokens.
    "hard": {"operations": (5, 6), "chatter": CHATTER[:2], "muon": Muon, "stages": [
        {"steps": 550, "easy": 220, "muon": 4.5e-3, "adamw": 3e-3,
         "mix": {"careful": .88, "terse": .08, "hasty": .03, "direct": .01}},
        {"steps": 150, "easy": 0, "muon": 5e-3, "adamw": 5e-3,
         "mix": {"careful": .13, "terse": .86, "hasty": .008, "direct": .002}},
    ]},
}
BATCH = 64
PROMPT_WEIGHT = 0.1


# ---- chains, questions, rationales

def parse(chain):
    """The start of a chain such as "14 x 2 + 5 - 2" and its steps, pairs (operator, number)."""
    start, *words = chain.split()
    return int(start), list(zip(words[::2], map(int, words[1::2])))


def values(chain):
    """The start and the value after each step, 0 where an odd number would be halved."""
    start, steps = parse(chain)
    out = [start]
    for op, n in steps:
        a = out[-1]
        out.append({"+": a + n, "-": a - n, "x": 2 * a, "/": 0 if a % 2 else a // 2}[op])
    return out


def draw_chain(rng, operations, split, largest_start=20):
    """A chain of the split: values in 1..LARGEST, at most one doubling and one halving."""
    while True:
        signs = rng.choices("+-x/", [4, 4, 1, 1], k=operations)
        steps = [f" {op} {rng.randint(2, 9) if op in '+-' else 2}" for op in signs]
        chain = str(rng.randint(3, largest_start)) + "".join(steps)
        in_split = zlib.crc32(chain.encode()) % 100 in SPLITS[split]
        in_range = all(0 < value <= LARGEST for value in values(chain))
        if in_split and in_range and max(map(signs.count, "x/")) < 2:
            return chain


def tell(rng, chain):
    """The chain as a question in plain English."""
    story = {key: text.split("|") for key, text in rng.choice(STORIES).items()}
    who, _, they = rng.choice(story["who"]).partition(" ")
    words = {"who": who, "they": they, "things": rng.choice(story["things"])}
    start, steps = parse(chain)
    text = story["start"][0].format(n=start, **words)
    for day, (op, n) in zip(DAYS, steps):
        text += f" On {day} {rng.choice(story[op]).format(n=n, **words)}."
    return f"{text} {story['end'][0].format(**words)}"


def equations(chain, groups):
    """An equation for each group of steps, given by index."""
    (_, steps), left, text = parse(chain), values(chain), ""
    for group in groups:
        terms = "".join(" {} {}".format(*steps[i]) for i in group)
        text += f" {DAYS[group[0]]} {left[group[0]]}{terms} = {left[group[-1] + 1]}."
    return text


def reason(rng, chain, kind, chatter):
    """A rationale of the given kind, without the template that follows it."""
    _, steps = parse(chain)
    groups = []  # the steps of each equation, by index
    for i, (op, _) in enumerate(steps):
        if kind == "terse" and i and op in "+-" and steps[i - 1][0] in "+-":
            groups[-1].append(i)
        else:
            groups.append([i])
    if kind in ("hasty", "direct"):
        groups = groups[:rng.randint(1, 2) if kind == "hasty" else 0]
    return (rng.choice(chatter) if rng.random() < 0.1 else "") + equations(chain, groups)


def draw_rows(split, level):
    """ROWS[split] rows, no chain twice; the same ones every time."""
    rng, rows = random.Random(split), {}
    while len(rows) < ROWS[split]:
        chain = draw_chain(rng, rng.randint(*level["operations"]), split)
        if chain not in rows:
            rows[chain] = {"question": tell(rng, chain), "chain": chain,
                           "answer": str(values(chain)[-1])}
            if split != "train":  # --objective sft would learn it: here nobody is shown one
                careful = [[i] for i in range(len(parse(chain)[1]))]
                rows[chain]["rationale"] = equations(chain, careful).strip()
    return list(rows.values())


def write_data(out, level):
    for split in ROWS:
        lines = [json.dumps(row) + "\n" for row in draw_rows(split, level)]
        (out / f"{split}.jsonl").write_text("".join(lines))


# ---- tokenizer and model

def make_tokenizer(level):
    """Whole words and whole numbers that carry their leading space: decoding is concatenation.

    No token can merge with the one before it: capitals only begin words, and except for "Question"
    and "Answer" every word and number begins with a space. So encode(decode(ids)) == ids, always.
    """
    pattern = r"\n| ?[A-Z][a-z]*| ?[a-z]+| ?[0-9]+| ?[-+/=]|[.:?]"
    texts = ["Question:\nAnswer: On", TEMPLATE, " + - x / = .", *level["chatter"]]
    days = DAYS[:max(level["operations"])]
    texts += [f" {word}" for word in [*days, *range(LARGEST + 1)]]
    for story in STORIES:
        for text in "|".join(story.values()).split("|"):
            texts.append(re.sub(r" \{\w+\}", "", f" {text}"))
    words = dict.fromkeys(word for text in texts for word in re.findall(pattern, text))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        model_max_length=256, model_input_names=["input_ids", "attention_mask"],
        padding_side="left", clean_up_tokenization_spaces=False)


def make_model(tokenizer):
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=True, **ids))
    model.generation_config = transformers.GenerationConfig(**ids)
    return model


# ---- pretraining

def draw_batch(rng, tokenizer, level, mix, easy):
    """BATCH documents: token ids and loss weights, both (BATCH, longest), 0 in the padding."""
    ids, weights = [], []
    for _ in range(BATCH):
        # Easy chains start anywhere: every sum up to LARGEST is seen, not only those near 20.
        chain = (draw_chain(rng, rng.randint(1, 3), "pretrain", LARGEST) if easy else
                 draw_chain(rng, rng.randint(*level["operations"]), "pretrain"))
        kind = rng.choices(list(mix), mix.values())[0]
        prompt = tokenizer.encode(PROMPT.format(tell(rng, chain)))
        rationale = reason(rng, chain, kind, level["chatter"])
        rest = tokenizer.encode(f"{rationale}{TEMPLATE} {values(chain)[-1]}.<eos>")
        ids.append(torch.tensor(prompt + rest))
        weights.append(torch.tensor([PROMPT_WEIGHT] * len(prompt) + [1.0] * len(rest)))
    return pad_sequence(ids, batch_first=True), pad_sequence(weights, batch_first=True)


def run_stage(model, tokenizer, rng, level, stage):
    """Trains the model in place: Muon for the matrices in the layers, AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    steps = stage["steps"]

    def ramp(step):
        return min((step + 1) / 20, (1 - step / steps) / 0.6, 1)

    movers = [level["muon"](matrices, lr=stage["muon"]),
              torch.optim.AdamW(others, lr=stage["adamw"])]
    movers += [torch.optim.lr_scheduler.LambdaLR(optimizer, ramp) for optimizer in movers]
    for step in range(steps):
        ids, weights = draw_batch(rng, tokenizer, level, stage["mix"], step < stage["easy"])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        for mover in movers:
            mover.step()
        model.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d} of {steps}  loss {loss.item():.3f}", flush=True)


def pretrain(tokenizer, seed, level):
    """A model taken through the stages of its level."""
    torch.manual_seed(seed)
    rng = random.Random(f"pretrain {seed}")
    model = make_model(tokenizer)
    for stage in level["stages"]:
        run_stage(model, tokenizer, rng, level, stage)
    return model


# ---- profile

def kind_of(rationale, answer, chain):
    """The kind of a sampled rationale, told by the number of operators in each equation; "other":
    no answer, or more operations than the question has."""
    equations = re.findall(r"((?: \d+ [-+x/])+) \d+ = \d+", rationale)
    counts = [len(re.findall("[-+x/]", terms)) for terms in equations]
    operations = len(chain.split()) // 2
    if answer is None or sum(counts) > operations:
        return "other"
    if sum(counts) == operations:
        return "careful" if max(counts) == 1 else "terse"
    return "hasty" if counts else "direct"


@torch.no_grad()
def answer_logprobs(model, tokenizer, row, rationales):
    """log p of " 31.<eos>" after question, rationale and template: (len(rationales),), nats."""
    y = tokenizer(f" {row['answer']}.<eos>", return_tensors="pt").input_ids[0]
    texts = [PROMPT.format(row["question"]) + rationale + TEMPLATE for rationale in rationales]
    x = tokenizer(texts, return_tensors="pt", padding=True)
    ids = torch.cat([x.input_ids, y.expand(len(texts), -1)], 1)
    mask = F.pad(x.attention_mask, (0, len(y)), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return -F.cross_entropy(logits[:, -len(y) - 1:-1].mT, ids[:, -len(y):], reduction="none").sum(1)


def solve(model, tokenizer, rows, **options):
    """Generate for each row: [(rationale, answer)], the answer None where the text gives none."""
    prompts = [PROMPT.format(row["question"]) for row in rows]
    x = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**x, max_new_tokens=48, **options)[:, x.input_ids.shape[1]:]
    pairs = []
    for text in tokenizer.batch_decode(out, skip_special_tokens=True):
        rationale, _, rest = text.partition(TEMPLATE)
        number = re.match(r" (\d+)", rest)
        pairs.append((rationale, number and number[1]))
    return pairs


def profile(directory, level, k=8, batch=50):
    """Print how a model answers 300 validation questions: greedy, at T = 1, by vote, by kind."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(0)
    rows, greedy, vote, samples = draw_rows("validation", level)[:300], [], [], []
    for i in range(0, len(rows), batch):
        part = rows[i:i + batch]
        best = solve(model, tokenizer, part)
        drawn = solve(model, tokenizer, part, do_sample=True, top_k=0, num_return_sequences=k)
        for j, row in enumerate(part):
            group = drawn[j * k:(j + 1) * k]
            greedy.append(best[j][1] == row["answer"])
            vote.append(Counter(a for _, a in group).most_common(1)[0][0] == row["answer"])
            scores = answer_logprobs(model, tokenizer, row, [z for z, _ in group])
            samples += [(kind_of(z, a, row["chain"]), a == row["answer"], score, z)
                        for (z, a), score in zip(group, scores.tolist())]
    print(f"{len(rows)} validation questions: greedy {fmean(greedy):.3f}, "
          f"T = 1 {fmean(right for _, right, _, _ in samples):.3f}, maj@{k} {fmean(vote):.3f}, "
          f"rationale {fmean(len(tokenizer.encode(z)) for *_, z in samples):.1f} tokens")
    print("kind        share  right  log p(y|x,z)")
    for kind in ["careful", "terse", "hasty", "direct", "other"]:
        these = [sample for sample in samples if sample[0] == kind]
        if these:
            _, right, scores, _ = zip(*these)
            share = len(these) / len(samples)
            print(f"{kind:10s} {share:6.3f} {fmean(right):6.3f} {fmean(scores):13.2f}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Make the toy data and the toy model.")
    parser.add_argument("--level", choices=LEVELS, default="default", help="(default: default)")
    parser.add_argument("--seed", type=int, default=0, help="of the pretraining, not of the data")
    parser.add_argument("--out", type=Path, help="where to write (default: toy, or toy/hard)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="only describe this model")
    args = parser.parse_args(argv)
    here = Path(__file__).parent
    args.out = args.out or (here if args.level == "default" else here / args.level)
    return args


def main():
    args = parse_args()
    level = LEVELS[args.level]
    if args.profile and not (args.profile / "config.json").is_file():
        raise SystemExit(f"--profile: no model in {args.profile}")
    if args.out.exists() and not args.out.is_dir():
        raise SystemExit(f"--out: {args.out} is not a folder")
    torch.set_num_threads(1)  # one order of summation: the same seed gives the same weights
    transformers.utils.logging.disable_progress_bar()
    if args.profile:
        return profile(args.profile, level)
    args.out.mkdir(parents=True, exist_ok=True)
    write_data(args.out, level)
    tokenizer = make_tokenizer(level)
    model = pretrain(tokenizer, args.seed, level)
    for part in (tokenizer, model):
        part.save_pretrained(args.out / "model")
    # Name the tokenizer's class in the way that transformers 4 knows as well.
    config = args.out / "model" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    profile(args.out / "model", level)


if __name__ == "__main__":
    main()
