"""What becomes of a Slurm job after an attempt: done, requeued, or stopped.

``python -m mlomae.slurm.requeue --code N -- ARGUMENTS OF TRAIN``, run by the batch script. Looks at files
only and imports no torch. Each attempt of a run leaves a line in ``attempts.jsonl`` of its run directory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlomae.arguments import EXIT_INTERRUPTED, EXIT_LOST, EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR, Parser
from mlomae.errors import UserError
from mlomae.run_dir import write_atomically

ATTEMPTS = "attempts.jsonl"
PATIENCE = 3
"""Attempts in a row without a new checkpoint, after which a job is not requeued any more."""
_CHECKPOINT = re.compile(r"step-(\d+)(\.previous)?")


@dataclass(frozen=True)
class Attempt:
    """One start of a job.

    Attributes:
        job: id, in an array ``ARRAY_TASK``.
        restart: how often Slurm had requeued the job before.
        code: exit code of srun; 128 and the number of a signal where a rank was killed.
        step: outer iterations in the newest checkpoint afterwards, 0 without one.
    """

    job: str
    restart: int
    code: int
    step: int


def main(argv: Sequence[str] | None = None) -> int:
    """Records the attempt and requeues the job, or says why not; returns the exit code of the job."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--")
    parser = Parser(prog="mlomae.slurm.requeue", allow_abbrev=False)
    parser.add_argument("--code", type=int, required=True, help="exit code of srun")
    parser.add_argument("--ended", action="store_true", help="Slurm has ended the whole job")
    known = parser.parse_args(words[:split])
    try:
        _settle(known, words[split + 1 :])
    except UserError as error:
        print(f"mlomae: error: {error}", file=sys.stderr)
        return known.code or EXIT_USER_ERROR
    return int(known.code)


def newest_step(run_dir: Path) -> int:
    """Outer iterations in the newest finished checkpoint of a run; 0 without one."""
    found = [
        int(match[1])
        for path in run_dir.glob("checkpoints/*/manifest.json")
        if (match := _CHECKPOINT.fullmatch(path.parent.name))
    ]
    return max(found, default=0)


def without_progress(attempts: Sequence[Attempt], job: str) -> int:
    """How many of the last attempts in a row, all of this job, ended without a new checkpoint."""
    count = 0
    before = [0, *(attempt.step for attempt in attempts)]
    for attempt, step in zip(reversed(attempts), reversed(before[:-1]), strict=True):
        if attempt.job != job or attempt.step > step:
            break
        count += 1
    return count


def why_not(code: int, stale: int, ended: bool) -> str | None:
    """Why a job is not requeued, or None if it is.

    Args:
        code: exit code of srun, not 0.
        stale: attempts in a row without a new checkpoint.
        ended: Slurm has ended the job as a whole.
    """
    if ended:
        return "Slurm has ended it (cancelled, at its time limit, or requeued already)"
    # A signal that killed a rank is 128 and its number, the one of Ctrl-C is not.
    if code not in (EXIT_PREEMPTED, EXIT_LOST) and (code < 128 or code == EXIT_INTERRUPTED):
        return f"exit code {code} would come again"
    if stale >= PATIENCE:
        return (
            f"{stale} attempts in a row ended without a new checkpoint, the last with exit code {code}; "
            "find the cause above, then submit it again to go on"
        )
    return None


def read_attempts(path: Path) -> list[Attempt]:
    """The attempts so far; a line that a crash cut short is left out.

    Raises:
        UserError: the file is there and cannot be read.
    """
    attempts = []
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot be read; delete it") from None
    for line in lines:
        try:
            attempts.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return attempts


def _settle(known: argparse.Namespace, train: Sequence[str]) -> None:
    from mlomae.train_command import parse

    run_dir = parse(train)[0].run_dir
    attempt = Attempt(
        _job_id(), int(os.environ.get("SLURM_RESTART_COUNT", 0)), known.code, newest_step(run_dir)
    )
    stale = _record(run_dir, attempt)
    if attempt.code == EXIT_OK:
        return
    reason = why_not(attempt.code, stale, known.ended)
    if reason is not None:
        raise UserError(f"job {attempt.job}: not requeued: {reason}")
    where = f"goes on from step {attempt.step}" if attempt.step else "starts anew"
    # Before the request: Slurm ends this process as it requeues.
    print(f"mlomae: job {attempt.job}: requeued after exit code {attempt.code}; {where}", flush=True)
    asked = subprocess.run(["scontrol", "requeue", attempt.job], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"job {attempt.job}: not requeued: {' '.join(asked.stderr.split())}")


def _record(run_dir: Path, attempt: Attempt) -> int:
    """Adds the attempt to the run's file; returns how many in a row ended without a new checkpoint."""
    # A folder without a configuration is nobody's yet, and a file in it would make it somebody else's.
    if not (run_dir / "config.yaml").exists():
        return attempt.restart + 1
    path = run_dir / ATTEMPTS
    attempts = [*read_attempts(path), attempt]
    text = "".join(json.dumps(asdict(entry)) + "\n" for entry in attempts)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return without_progress(attempts, attempt.job)


def _job_id() -> str:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    # The last task of an array has the array's id as its own, which would requeue all of them.
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


if __name__ == "__main__":
    sys.exit(main())
