"""latro.py with broken credit: what a run still learns, it does not owe to its advantages.

    python experiments/controls.py zero --seed 1      every advantage is 0
    python experiments/controls.py shuffled --seed 1  each is that of another rationale of its group

The flags after the control are those of latro.py. The answer term stays as it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import latro  # noqa: E402
from harness.distributed import exit_process  # noqa: E402

CONTROLS = "zero", "shuffled"


def broken_credit(control: str):
    """A score_rationales whose advantages are all 0 ("zero"), or those of another rationale of the
    same group ("shuffled")."""
    score_rationales = latro.score_rationales

    def score(logp, logp0, z_start, y_start, end, K, beta, *, total, **options):
        scores = score_rationales(logp, logp0, z_start, y_start, end, K, beta, total=total,
                                  **options)
        A = scores.advantage.view(-1, K)
        A = (torch.zeros_like(A) if control == "zero" else A.roll(1, 1)).flatten()
        for n, (start, stop) in enumerate(zip(z_start.tolist(), y_start.tolist())):
            scores.token_weights[start:stop] = A[n] / total
        return scores._replace(advantage=A)

    return score


def main(argv: list[str]) -> int:
    """Exit code as latro.py's."""
    if argv[:1] not in [[name] for name in CONTROLS]:
        print(f"controls.py: the first argument must be one of {', '.join(CONTROLS)}",
              file=sys.stderr)
        return 1
    latro.score_rationales = broken_credit(argv[0])
    return latro.main(argv[1:])


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
