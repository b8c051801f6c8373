"""``mlomae shards create | index | verify | stats``: makes WebDataset shards, and looks at them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlomae.arguments import EXIT_INTERRUPTED, EXIT_OK, EXIT_PROBLEMS, Parser, positive

PARTS = ("train", "test", "val")
FORMATS = ("keep", "jpg", "png", "webp")
_CREATE_EXAMPLES = (
    "mlomae shards create photos data/photos --resize 256 --format jpg",
    "mlomae shards create torchvision:CIFAR10 data/cifar10 --root downloads --download",
)


def main(argv: Sequence[str]) -> int:
    """Runs a command; returns its exit code (0 done, 1 problems found, 130 interrupted).

    Raises:
        mlomae.errors.UserError: bad input.
    """
    known = _parser().parse_args(argv)
    command = {"create": _create, "index": _index, "verify": _verify, "stats": _stats}[known.command]
    try:
        return command(known)
    except KeyboardInterrupt:
        more = "; the same command writes the shards that are missing" if known.command == "create" else ""
        print(f"mlomae: interrupted{more}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _create(known: argparse.Namespace) -> int:
    # Imported late: --help and misuse answer at once.
    from mlomae.data.faults import count_kinds
    from mlomae.sharding.encoding import Encoding
    from mlomae.sharding.inputs import open_inputs
    from mlomae.sharding.view import Bar, describe
    from mlomae.sharding.writer import BAD_SAMPLES, Layout, create_shards

    inputs = open_inputs(known.source, known.root, known.download, known.parts)
    encoding = Encoding(known.format, known.resize, known.quality, not known.no_check)
    layout = Layout(known.samples_per_shard, None if known.no_shuffle else known.seed)
    start = time.monotonic()
    with Bar("images") as bar:
        created = create_shards(
            inputs, known.out, encoding, layout, known.workers, known.max_bad_share, bar.update_images
        )
    seconds = time.monotonic() - start
    for name, index in created.parts.items():
        print(f"{name}: {describe(index)}")
    if created.faults:
        found = f"{len(created.faults):,} bad images ({count_kinds(created.faults)})"
        print(f"left out: {found}, see {known.out / BAD_SAMPLES}")
    if created.num_written:
        speed = f"{created.num_written / seconds:,.0f} a second"
        print(f"{known.out}: complete; {created.num_written:,} images in {seconds:.1f} s, {speed}")
    else:
        print(f"{known.out}: was complete already")
    return EXIT_OK


def _index(known: argparse.Namespace) -> int:
    from mlomae.data.faults import count_kinds
    from mlomae.sharding.indexing import index_shards
    from mlomae.sharding.view import describe

    written = index_shards(
        known.pattern, known.out, known.part, known.classes, known.checksums, known.workers
    )
    for path, index in written.items():
        print(f"{path}: {describe(index)}")
        if index.faults:
            print(f"left out: {len(index.faults):,} bad samples ({count_kinds(index.faults)})")
    if known.pattern.startswith("pipe:"):
        print("An index holds no commands: copy both files to where the shards lie.")
    return EXIT_OK


def _verify(known: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mlomae.sharding.report import verify
    from mlomae.sharding.view import Bar, show_verification

    with Bar("shards", shown=not known.json) as bar:
        result = verify(known.where, known.quick, known.decode, known.workers, bar.update)
    if known.json:
        _print_json(asdict(result))
    else:
        show_verification(result)
    return EXIT_PROBLEMS if result.problems else EXIT_OK


def _stats(known: argparse.Namespace) -> int:
    from mlomae.sharding.statistics import measure
    from mlomae.sharding.view import show_statistics, statistics_values

    parts, split = measure(known.where)
    if known.json:
        _print_json(statistics_values(parts, split))
    else:
        show_statistics(parts, split)
    return EXIT_OK


def _print_json(value: object) -> None:
    from mlomae.run_dir import to_json

    print(to_json(value, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlomae shards",
        description="Makes WebDataset shards, and looks at them. A set is a folder of train-*.tar and, where "
        "it has a test part, test-*.tar or val-*.tar, with an index of each part.",
        examples=(*_CREATE_EXAMPLES, "mlomae shards verify data/photos", "mlomae shards stats data/photos"),
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="create | index | verify | stats")
    _add_create(commands)
    _add_index(commands)
    where = "a folder of shards, an index (….json), or a pattern such as 'data/train-*.tar'"
    verify = commands.add_parser(
        "verify", help="compare shards with their index",
        description="Compares shards with their index and with timm's _info.json, where there are any: "
        "their names, sizes, samples and checksums. Prints a line per problem; the exit code is 1 if there "
        "is one.",
        examples=("mlomae shards verify data/photos", "mlomae shards verify data/photos --decode --json"),
    )  # fmt: skip
    verify.add_argument("where", metavar="WHERE", help=where)
    verify.add_argument(
        "--quick", action="store_true", help="leave out checksums: read headers and labels only"
    )
    verify.add_argument("--decode", action="store_true", help="decode every image")
    _add_workers(verify, "shards that are read at the same time")
    stats = commands.add_parser(
        "stats", help="what shards hold",
        description="Prints what shards hold: samples, labels, classes, formats and sizes, and how a run "
        "with default settings would split them.",
        examples=("mlomae shards stats data/photos", "mlomae shards stats 'data/photos/train-*.tar' --json"),
    )  # fmt: skip
    stats.add_argument("where", metavar="WHERE", help=where)
    for command in (verify, stats):
        command.add_argument("--json", action="store_true", help="print one object instead of the tables")
    return parser


def _add_create(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "create", help="make shards of a data set",
        description="Makes shards of a data set. Running the same command again writes what is missing.",
        examples=_CREATE_EXAMPLES,
    )  # fmt: skip
    parser.add_argument(
        "source", metavar="SRC",
        help="a folder of images (in class folders or not, in train/ and test/ or val/ or not), a .csv of "
        "image paths, a MedMNIST .npz, or torchvision:NAME",
    )  # fmt: skip
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder of the shards, new or of the same command"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="where torchvision's data set lies")
    parser.add_argument("--download", action="store_true", help="let torchvision download it there")
    parser.add_argument(
        "--parts", type=_parts, default=(), metavar="NAME,…", help="of the input (default: all that it has)"
    )
    parser.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="(default: 1000)"
    )
    parser.add_argument(
        "--resize", type=positive, metavar="S", help="shrink images so that the shorter side has S pixels"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="keep",
        help="of the images. keep: bytes as they are, and png of what is no jpg, png or webp (default: keep)",
    )  # fmt: skip
    parser.add_argument(
        "--quality",
        type=_quality,
        default=92,
        metavar="Q",
        help="of jpg and webp that are written (default: 92)",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the order (default: 0)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order of the input")
    parser.add_argument("--no-check", action="store_true", help="copy images without decoding them: faster")
    parser.add_argument(
        "--max-bad-share", type=_share, default=0.01, metavar="X",
        help="of the images that may be bad; they are left out (default: 0.01)",
    )  # fmt: skip
    _add_workers(parser, "processes")


def _add_index(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "index", help="write the index of shards that are there",
        description="Writes OUT/…-index.json and .npz, which tell where every sample lies. Shards that are "
        "no files of this machine need them.",
        examples=(
            "mlomae shards index data/photos data/photos",
            "mlomae shards index 'https://example.org/train-{0000..0099}.tar' index --classes classes.json",
        ),
    )  # fmt: skip
    parser.add_argument(
        "pattern", metavar="PATTERN",
        help="of the shards: a folder, 'data/train-*.tar', 'https://…/train-{0000..0099}.tar' or 'pipe:…'",
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the index; best that of the shards")
    parser.add_argument(
        "--part", choices=PARTS, help="which part they are (default: what their names begin with)"
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="JSON list of class names (default: classes.json beside the shards)"
    )
    parser.add_argument(
        "--checksums", action="store_true", help="read local shards whole, for SHA-256 in the index"
    )
    _add_workers(parser, "remote shards that are read at the same time")


def _add_workers(parser: argparse.ArgumentParser, what: str) -> None:
    # Those that this process may use, where the system tells.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=positive, default=count, metavar="N", help=f"{what} (default: one per processor)"
    )


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected names out of {','.join(PARTS)}")
    return names


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1 to 100")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 0 or above")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 0 to 1")
    return share
