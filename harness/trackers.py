"""Logs where people look: TensorBoard, Weights & Biases, Trackio. The JSONL files stay the record.

A run has one name there, from latro.json, so a resumed run goes on in the same place.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from .checkpoint import read_run_id
from .distributed import is_main_process

PROJECT = "latro"
COLUMNS = "question", "z", "reward", "logp_y", "reaches"
TRACKERS: list["Tracker"] = []  # the one of this process, if --log-to asks for it


class Tracker:
    """Where rows go: `scalars` {name: number} and a table of samples, each at an update."""

    def __init__(self, scalars: Callable[[dict, int], None],
                 table: Callable[[list[tuple], int], None], close: Callable[[], None]):
        self.scalars, self.table, self.close = scalars, table, close


def start_tracker(args, start: int) -> None:
    """Opens what --log-to names, on the main process. `start`: updates that are done already."""
    if args.log_to and is_main_process():
        backends = dict(tensorboard=tensorboard, wandb=wandb, trackio=trackio)
        TRACKERS.append(backends[args.log_to](args, start))


def track(log: str, row: dict) -> None:
    """Passes on a row of metrics.jsonl, evals.jsonl or samples.jsonl."""
    for tracker in TRACKERS:
        if log == "samples":
            tracker.table([*samples_of(row)], row["step"])
        else:
            tracker.scalars(dict(numbers(log, row)), row["step"])


def stop_tracker() -> None:
    while TRACKERS:
        TRACKERS.pop().close()


def numbers(name: str, value) -> Iterator[tuple[str, float]]:
    """The numbers of a row by name: metrics/reward, metrics/seconds/sample. No step."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "step":
                yield from numbers(f"{name}/{key}", inner)
    elif isinstance(value, (int, float)):
        yield name, value


def samples_of(row: dict) -> Iterator[tuple]:
    """The COLUMNS of each rationale in a row of samples.jsonl."""
    for question in row.get("questions", [row]):
        for sample in question["samples"]:
            yield (question["question"], *(sample[key] for key in COLUMNS[1:]))


def tensorboard(args, start: int) -> Tracker:
    """In {--out}/tensorboard. What a killed run wrote after its last checkpoint is hidden."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(Path(args.out, "tensorboard")), purge_step=start + 1)

    def scalars(values: dict, step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def table(rows: list[tuple], step: int) -> None:
        cells = [[json.dumps(cell, ensure_ascii=False).replace("|", "\\|") for cell in row]
                 for row in rows]
        lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
        writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
    return Tracker(scalars, table, writer.close)


def wandb(args, start: int) -> Tracker:
    import wandb
    run = wandb.init(project=PROJECT, id=read_run_id(args), name=Path(args.out).resolve().name,
                     dir=args.out, config=vars(args), resume="allow")
    run.define_metric("*", step_metric="step")

    def table(rows: list[tuple], step: int) -> None:
        run.log(dict(samples=wandb.Table(columns=[*COLUMNS], data=rows), step=step))
    return Tracker(lambda values, step: run.log(values | dict(step=step)), table, run.finish)


def trackio(args, start: int) -> Tracker:
    import pandas
    import trackio
    run = trackio.init(project=PROJECT, name=read_run_id(args), config=vars(args), resume="allow")

    def table(rows: list[tuple], step: int) -> None:
        frame = pandas.DataFrame(rows, columns=[*COLUMNS])
        run.log(dict(samples=trackio.Table(dataframe=frame)), step=step)
    return Tracker(lambda values, step: run.log(values, step=step), table, run.finish)
