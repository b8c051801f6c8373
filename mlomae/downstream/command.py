"""``mlomae eval TASK ENCODER``: from the command line to a folder of results."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlomae.arguments import EXIT_OK, Parser
from mlomae.config import load_tree
from mlomae.config_arguments import add_display_flags, describe, parse_known, show_result
from mlomae.downstream.sections import DATA_PATHS, FAILURE, RESUMABLE_CHANGES, TaskConfig
from mlomae.errors import UserError

if TYPE_CHECKING:
    from mlomae.run_dir import RunDir

# Each task is a module with a class ``Config`` and a function ``run(config, pretrained, run_dir, world,
# preemption)`` that returns figures.
TASKS = {
    "knn": "k-nearest neighbours on frozen features",
    "linear": "a linear classifier on frozen features, at several learning rates in one pass",
    "finetune": "a classifier, trained with the encoder",
    "segment": "a label for every pixel: UPerNet on the encoder (ADE20K layout)",
    "detect": "boxes: Faster R-CNN on a simple feature pyramid of the encoder (COCO layout)",
}
EXAMPLES = (
    "mlomae eval knn runs/digits",
    "mlomae eval linear runs/cifar10 --lrs '[0.01, 0.1, 1.0]'",
    "mlomae eval finetune runs/cifar10 --config finetune/cifar10 --data.path data/cifar10",
    "mlomae eval finetune runs/cifar10 --config finetune/cifar10 --scratch true",
    "torchrun --nproc_per_node 8 -m mlomae eval segment runs/x --config segment/ade20k_vit_b16",
)


def main(argv: Sequence[str]) -> int:
    """Runs ``mlomae eval``; returns its exit code."""
    name = next((word for word in argv[:1] if word in TASKS), None)
    # By its place: later words may be values of fields, which the parser does not know.
    encoder = next((word for word in argv[1:2] if not word.startswith("-")), None)
    root = TaskConfig if name is None else _module(name).Config
    known, fields = parse_known(_parser(name), argv if encoder is None else [argv[0], *argv[2:]], root)
    if encoder is not None:
        fields["encoder"] = json.dumps(encoder)
    config = load_tree(known.config, fields, root)
    show_result(_evaluate(known.task, config), config.display)
    return EXIT_OK


def _parser(task: str | None) -> Parser:
    fields = (
        "" if task is None else "fields, with their defaults:\n" + "\n".join(describe(_module(task).Config))
    )
    parser = Parser(
        prog="mlomae eval",
        usage="mlomae eval TASK ENCODER [--config FILE] [--field value …]",
        description="Scores an encoder on a downstream task. tasks:\n"
        + "\n".join(f"  {name:<10} {text}" for name, text in TASKS.items())
        + "\n\n"
        "ENCODER is a run directory, or weights of another library: see docs/downstream.md. Running the\n"
        "same command again resumes an unfinished evaluation. Every field of the recipe is also a flag.",
        epilog=fields or "`mlomae eval TASK --help` lists the fields of a task.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        examples=EXAMPLES,
    )
    parser.add_argument("task", choices=list(TASKS), metavar="TASK")
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe in YAML; defaults where absent")
    add_display_flags(parser)
    return parser


def _module(task: str) -> Any:
    return import_module(f"mlomae.downstream.{task}")


def _evaluate(task: str, config: TaskConfig) -> dict[str, Any]:
    # Imported late: --help and configuration errors answer at once.
    from mlomae.distributed import collectives
    from mlomae.distributed.env import join_world, leave_world
    from mlomae.distributed.watchdog import Watchdog
    from mlomae.interop.reading import read_pretrained
    from mlomae.preemption import Preemption
    from mlomae.run_dir import RunDir, Status
    from mlomae.run_faults import told_in_one_line

    if not config.encoder:
        raise UserError("eval: no encoder given; name a run directory or a file with weights")
    pretrained = read_pretrained(Path(config.encoder))
    fingerprint = _fingerprint(pretrained.encoder)
    if config.fingerprint not in ("", fingerprint):
        raise UserError(
            f"fingerprint: {config.fingerprint} in the configuration, but {config.encoder} has "
            f"{fingerprint}; give the encoder that was evaluated, or leave the field out"
        )
    out = config.out or _default_out(task, config, pretrained.run)
    config = config.model_copy(update={"fingerprint": fingerprint, "out": out})
    world = join_world(config.device, patience=FAILURE.stuck_after)
    run_dir = RunDir(out, config, RESUMABLE_CHANGES, "out")
    try:
        if (first := collectives.broadcast_object(fingerprint)) != fingerprint:
            raise UserError(
                f"encoder: rank {world.rank} reads other weights ({fingerprint}) in {config.encoder} than "
                f"rank 0 ({first}); of a run that is still training, name one of its checkpoints"
            )
        with (
            Preemption() as preemption,
            Watchdog(world, FAILURE.lost_after, FAILURE.stuck_after),
            told_in_one_line(out, lambda: (f"in {task}", _less_memory(config))),
        ):
            status = collectives.broadcast_object(run_dir.claim(primary=False))
            if status is Status.COMPLETE:
                # Resuming may find the images elsewhere; a result is one of the images that it names.
                RunDir(out, config, RESUMABLE_CHANGES - DATA_PATHS, "out").claim(primary=False)
                result = run_dir.read_result()
                if world.primary and pretrained.run is not None:
                    _append(pretrained.run, out, result, unless_there=True)
                return result if world.primary else {}
            collectives.on_primary(lambda: run_dir.claim(primary=True))
            try:
                figures = _module(task).run(config, pretrained, run_dir, world, preemption)
            except UserError:
                if world.primary:
                    _withdraw(run_dir)
                raise
            result = {"task": task, "encoder": config.encoder, "scratch": config.scratch, **figures}

            def leave() -> None:
                run_dir.write_result(result)
                if pretrained.run is not None:
                    _append(pretrained.run, out, result)

            collectives.on_primary(leave)
            return result if world.primary else {}
    finally:
        run_dir.release()
        leave_world()


def _less_memory(config: TaskConfig) -> str:
    batches = ("encoder_batch", "batch_size", "optim.batch_size")
    return "lower " + " or ".join(name for name in batches if name.split(".")[0] in type(config).model_fields)


def _default_out(task: str, config: TaskConfig, run: Path | None) -> Path:
    if run is None:
        raise UserError(
            f"out: {config.encoder} is no run directory that could hold the results; give --out FOLDER"
        )
    return run / "eval" / (f"{task}-scratch" if config.scratch else task)


def _withdraw(run_dir: RunDir) -> None:
    """Gives back a folder in which nothing was begun: the command may be repeated with other values."""
    if {entry.name for entry in run_dir.path.iterdir()} <= {run_dir.config.name, ".lock"}:
        run_dir.config.unlink(missing_ok=True)


def _append(run: Path, out: Path, result: dict[str, Any], unless_there: bool = False) -> None:
    """One more line in the run's own list of evaluations, from which its report is made.

    Args:
        unless_there: only if an earlier command, which left the result, did not come to it.
    """
    from mlomae.run_dir import to_json

    file = run / "evaluations.jsonl"
    # Within the run relative to it: runs are moved.
    where = str(out.relative_to(run) if out.is_relative_to(run) else out)
    if unless_there and file.exists() and json.dumps({"out": where})[1:-1] in file.read_text():
        return
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "out": where, **result}
    with file.open("a") as lines:
        lines.write(to_json(line) + "\n")


def _fingerprint(tensors: Any) -> str:
    """Of names, shapes and values of an encoder's weights: 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()[:16]
