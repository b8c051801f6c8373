"""``mlomae submit``: checks a run as far as it can be checked here, then hands it to Slurm's sbatch."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlomae.arguments import EXIT_OK, Parser, positive
from mlomae.config_arguments import refuse_typos
from mlomae.errors import UserError
from mlomae.slurm import scripts_folder
from mlomae.train_command import parse

# Options that sbatch has under the same name.
PASSED_ON = ("time", "partition", "account", "qos", "job-name", "cpus-per-task")


@dataclass(frozen=True)
class Job:
    """One call of sbatch.

    Attributes:
        script: the job script.
        options: of sbatch; what they leave out stands in the script.
        arguments: of the script.
        ranks: processes of a run.
    """

    script: Path
    options: list[str]
    arguments: list[str]
    ranks: int

    @property
    def command(self) -> list[str]:
        return ["sbatch", "--parsable", *self.options, str(self.script), *self.arguments]


def main(argv: Sequence[str]) -> int:
    """Submits a run or a sweep and prints the job's id.

    Raises:
        UserError: the recipe or an override is wrong or does not go with the number of ranks or the run
            directory, or Slurm is absent or refuses the job.
    """
    positional = argv[:1] if argv and not argv[0].startswith("-") else []
    parser = _parser()
    known, rest = parser.parse_known_args(argv[len(positional) :])
    refuse_typos(parser, rest)
    if bool(positional) == (known.config is not None):
        raise UserError("submit: give a recipe, as the first word or with --config FILE; see submit --help")
    shared = ["--config", positional[0] if positional else known.config]
    if known.deepspeed_config is not None:
        shared += ["--deepspeed_config", known.deepspeed_config]
    shared += rest
    runs = _runs(known.sweep, shared)
    job = _job(known, shared)
    folders: set[Path] = set()
    left: list[int] = []
    for number, (where, arguments) in enumerate(runs.items(), start=1):
        try:
            folder, complete = _check(arguments, job.ranks, known.gpus_per_node)
            if folder in folders:
                raise UserError(f"run_dir {folder}: another line has it too; give each run its own")
            folders.add(folder)
            if not complete:
                left.append(number)
            elif number == len(runs) and not left:
                raise UserError(f"run_dir {folder}: is complete already; see its result.json")
        except UserError as error:
            raise UserError(f"{where}{error}") from None
    if known.sweep is not None:
        # What is finished keeps its number: those of the other lines name their folders.
        job = replace(job, options=[*job.options, "--array", ranges(left)])
    if known.dry_run:
        print(f"MLOMAE_PYTHON={shlex.quote(sys.executable)} {shlex.join(job.command)}")
        for path in (job.script, job.script.with_name("run.sh")):
            print(f"\n# {path}\n{path.read_text()}", end="")
        return EXIT_OK
    print(f"job: {_sbatch(job.command)}")
    return EXIT_OK


def header(script: Path, option: str) -> str:
    """The value of an option in the ``#SBATCH`` lines of a job script.

    Raises:
        UserError: the script, which users may edit, does not set it.
    """
    found = re.search(rf"^#SBATCH +--{option}[= ](\S+)", script.read_text(), re.MULTILINE)
    if found is None:
        raise UserError(f"{script}: no line #SBATCH --{option}=…; add it, or give --{option}")
    return found[1]


def read_sweep(path: Path) -> list[list[str]]:
    """The arguments of each run of a sweep, as ``slurm/sweep.sbatch`` reads them.

    Raises:
        UserError: the file cannot be read, holds no run, or a line has an open quote.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"--sweep {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--sweep {path}: is no text; write the overrides of one run on each line") from None
    sweep = []
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UserError(f"--sweep {path}: {line!r}: {str(error).lower()}") from None
        sweep.append(words)
    if not sweep:
        raise UserError(f"--sweep {path}: holds no run; write the overrides of one run on each line")
    return sweep


def _runs(sweep: Path | None, shared: Sequence[str]) -> dict[str, list[str]]:
    """The arguments of train of each run, by what stands before an error in them."""
    if sweep is None:
        return {"": list(shared)}
    parent = parse(shared)[0].run_dir
    # As in the job script: the folder that a line names itself wins over the one of its number.
    return {
        f"--sweep {sweep}, run {number}: ": [*shared, "--run-dir", str(parent / str(number)), *words]
        for number, words in enumerate(read_sweep(sweep), start=1)
    }


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as sbatch takes them: [1, 2, 3, 5] → "1-3,5"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1] = [found[-1][0], number]
        else:
            found.append([number])
    return ",".join("-".join(map(str, part)) for part in found)


def _job(known: argparse.Namespace, shared: Sequence[str]) -> Job:
    name = "many_nodes" if known.nodes > 1 else "one_node"
    script = scripts_folder() / f"{name if known.sweep is None else 'sweep'}.sbatch"
    options = ["--nodes", str(known.nodes)]
    arguments = list(shared)
    if known.sweep is not None:
        arguments = [str(known.sweep), str(parse(shared)[0].run_dir), *shared]
    tasks = known.gpus_per_node
    if known.gpus_per_node == 0:
        tasks = known.tasks_per_node or 1
    elif known.tasks_per_node is not None:
        raise UserError("--tasks-per-node: goes with --gpus-per-node 0 only; there is one task per GPU")
    if tasks is None:
        tasks = int(header(script, "ntasks-per-node"))
    else:
        options += ["--gpus-per-node", str(known.gpus_per_node), "--ntasks-per-node", str(tasks)]
    for option in PASSED_ON:
        value = getattr(known, option.replace("-", "_"))
        options += [] if value is None else [f"--{option}", str(value)]
    return Job(script, options, arguments, known.nodes * tasks)


def _check(arguments: Sequence[str], ranks: int, gpus: int | None) -> tuple[Path, bool]:
    """Whatever would end the run in its first minute and can be seen from here.

    Returns:
        Its folder, and whether that holds its result already.
    """
    from mlomae.run_dir import RunDir, Status

    config, ds_path = parse(arguments)
    if ds_path is not None:
        from mlomae.distributed.ds_config import check_combination, load_ds_config

        check_combination(config, load_ds_config(ds_path))
    if gpus == 0 and config.device == "cuda":
        raise UserError("device: found cuda with --gpus-per-node 0; use cpu or ask for GPUs")
    for level in ("pretrain", "head", "mask") if config.masking.learns else ("pretrain",):
        batch = getattr(config, level).batch_size
        if batch % ranks:
            found = f"{batch} is not divisible by the {ranks} ranks of the job"
            raise UserError(f"{level}.batch_size: {found}; use a multiple")
    share, parts = config.pretrain.batch_size // ranks, config.pretrain.micro_batches
    if share % parts:
        raise UserError(f"pretrain.micro_batches: {parts} does not divide a rank's batch of {share} images")
    complete = RunDir(config.run_dir, config).claim(primary=False) is Status.COMPLETE
    return config.run_dir, complete


def _sbatch(command: Sequence[str]) -> str:
    """Runs sbatch; returns the job's id."""
    environment = {**os.environ, "MLOMAE_PYTHON": sys.executable}
    try:
        asked = subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "submit: sbatch is not there; run this where Slurm is installed, or use --dry-run"
        ) from None
    if asked.returncode:
        raise UserError(
            f"submit: {' '.join(asked.stderr.split()) or f'sbatch ended with {asked.returncode}'}"
        )
    # Warnings of the site, such as about an account.
    sys.stderr.write(asked.stderr)
    return asked.stdout.strip().partition(";")[0]


def _parser() -> Parser:
    parser = Parser(
        prog="mlomae submit",
        usage="mlomae submit RECIPE [options] [--section.field value …]",
        description="Checks a run and submits it to Slurm: one task per GPU, requeued from its last "
        "checkpoint at its time limit or when a node is lost. Every field of the configuration is a flag, as "
        "in train. What is not given stands in the job script; sbatch's other options are its SBATCH_… "
        "variables.",
        examples=(
            "mlomae submit recipes/imagenet_vit_h14.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00",
            "mlomae submit digits --sweep rates.txt --gpus-per-node 1 --dry-run",
        ),
    )
    parser.add_argument("--config", metavar="FILE", help="recipe in YAML, instead of the first word")
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        metavar="FILE",
        help="as in train; without it, plain torch",
    )
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="of a run (default: 1)")
    parser.add_argument("--gpus-per-node", type=_count, metavar="N", help="and tasks; 0 trains on CPUs")
    parser.add_argument("--tasks-per-node", type=positive, metavar="N", help="with --gpus-per-node 0")
    parser.add_argument("--cpus-per-task", type=positive, metavar="N", help="for a rank and its loaders")
    parser.add_argument("--time", metavar="TIME", help="limit of an attempt, such as 8:00:00 or 2-0")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--qos", metavar="NAME")
    parser.add_argument("--job-name", metavar="NAME", help="also begins the name of the log")
    parser.add_argument(
        "--sweep", type=Path, metavar="FILE",
        help="one run for each line of overrides, in folders 1, 2, … below run_dir, or in the line's own",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the command and the script only")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 0 for none")
    return int(text)
