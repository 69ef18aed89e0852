"""What the rows of a data set ask: (question, gold answer, gold rationale or "") for each task.

GSM8K {question, answer: "... #### N"} and ARC-Challenge {question, choices: {text, label},
answerKey} are as on the hub; any other JSONL has {question, answer} and perhaps a rationale.
"""

import re


def gsm8k(row: dict) -> tuple[str, str, str]:
    steps, gold = row["answer"].rsplit("####", 1)
    return f"{row['question']} Let's think step by step.", gold, re.sub("<<.*?>>", "", steps)


def arc_challenge(row: dict) -> tuple[str, str, str]:
    options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    asked = [row["question"], *(f"- {o}" for o in options.values()), "Let's think step by step."]
    return "\n".join(asked), options[row["answerKey"]], ""


def qa(row: dict) -> tuple[str, str, str]:
    return row["question"], row["answer"], row.get("rationale", "")


TASKS = {"gsm8k": gsm8k, "arc_challenge": arc_challenge, "toy": qa, "qa": qa}
CONFIGS = {"gsm8k": "main", "arc_challenge": "ARC-Challenge"}  # within the hub's data sets
