"""``mlomae shards``: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlomae.cli import main
from mlomae.sharding.encoding import Encoding
from mlomae.sharding.view import MOST_PROBLEMS, show_bytes
from mlomae.sharding.writer import Layout

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``mlomae shards``: exit code, standard output, standard error."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["shards", *map(str, words)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def images(tmp_path: Path, fill_folder: Callable[..., None]) -> Path:
    fill_folder(tmp_path / "images" / "cat", 9)
    fill_folder(tmp_path / "images" / "dog", 3, first_seed=50)
    return tmp_path / "images"


def test_create_says_what_it_has_written(tmp_path: Path, images: Path, run: Run) -> None:
    (images / "dog" / "bad.png").write_bytes(b"")
    out = tmp_path / "out"
    words = ("create", images, out, "--samples-per-shard", "5", "--workers", "1", "--max-bad-share", "0.1")
    code, printed, errors = run(*words)
    lines = printed.splitlines()
    assert (code, errors) == (0, "")
    assert lines[0].startswith("train: 12 samples in 3 shards, ")
    assert lines[1] == f"left out: 1 bad images (1 empty), see {out}/bad_samples.jsonl"
    assert lines[2].startswith(f"{out}: complete; 13 images in ") and lines[2].endswith(" a second")
    assert len(lines) == 3
    code, printed, errors = run(*words)
    assert (code, errors, printed.splitlines()) == (0, "", [*lines[:2], f"{out}: was complete already"])


def test_every_option_arrives(
    tmp_path: Path, images: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def take(inputs: object, out: Path, encoding: Encoding, layout: Layout, *rest: object) -> None:
        seen.update(out=out, encoding=encoding, layout=layout, workers=rest[0], share=rest[1])
        raise KeyboardInterrupt

    monkeypatch.setattr("mlomae.sharding.writer.create_shards", take)
    options = "--samples-per-shard 7 --resize 64 --format webp --quality 80 --seed 3 --no-check --workers 5"
    code, _, errors = run(
        "create", images, tmp_path / "out", *options.split(), "--max-bad-share=0.5", "--parts=train"
    )
    assert (code, errors) == (
        130,
        "mlomae: interrupted; the same command writes the shards that are missing\n",
    )
    expected = {
        "encoding": Encoding("webp", 64, 80, False),
        "layout": Layout(7, 3),
        "workers": 5,
        "share": 0.5,
    }
    assert seen == {"out": tmp_path / "out", **expected}
    run("create", images, tmp_path / "out", "--no-shuffle")
    assert (seen["layout"], seen["encoding"], seen["share"]) == (Layout(1000, None), Encoding(), 0.01)


def test_a_terminal_gets_a_bar(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["shards", "create", str(images), str(tmp_path / "out"), "--samples-per-shard", "4"]) == 0
    assert main(["shards", "verify", str(tmp_path / "out")]) == 0
    printed = terminal.getvalue()
    assert "12/12 images" in printed and "images/s  3/3 shards" in printed
    assert "3/3 shards" in printed and "all well: 3 shards, 12 samples" in printed


def test_verify_prints_a_line_per_problem(tmp_path: Path, images: Path, run: Run) -> None:
    out = tmp_path / "out"
    run("create", images, out, "--samples-per-shard", "4")
    code, printed, errors = run("verify", out)
    assert (code, errors) == (0, "") and printed.startswith("all well: 3 shards, 12 samples, ")
    (out / "train-000000.tar").unlink()
    with (out / "train-000001.tar").open("ab") as file:
        file.write(bytes(512))
    code, printed, errors = run("verify", out, "--quick")
    lines = printed.splitlines()
    assert (code, errors) == (1, "")
    assert lines[0].split() == ["shard", "found", "expected"]
    assert lines[1].split("  ")[0] == "train-000000.tar" and "no such file" in lines[1]
    assert lines[2].startswith("train-000001.tar  ") and "bytes by the index" in lines[2]
    assert lines[3].startswith("2 problems: 3 shards, 8 samples, ") and len(lines) == 4
    code, printed, _ = run("verify", out, "--quick", "--json")
    result = json.loads(printed)
    assert (code, result["shards"], result["samples"], result["unindexed"]) == (1, 3, 8, [])
    assert result["problems"][0] == {
        "shard": "train-000000.tar", "found": "no such file", "expected": "the shard, which the index names",
    }  # fmt: skip


def test_endless_problems_are_cut(tmp_path: Path, write_tar: Callable[..., None], run: Run) -> None:
    write_tar(tmp_path / "train-0.tar", {f"{number}.png": b"" for number in range(MOST_PROBLEMS + 2)})
    code, printed, _ = run("verify", tmp_path, "--decode")
    lines = printed.splitlines()
    assert code == 1 and len(lines) == MOST_PROBLEMS + 3
    assert lines[-2:] == [
        "and 2 more; --json lists them all",
        "102 problems: 1 shards, 102 samples, 61.4 kB; no index of train",
    ]
    assert len(json.loads(run("verify", tmp_path, "--decode", "--json")[1])["problems"]) == 102


def test_stats(tmp_path: Path, images: Path, run: Run) -> None:
    out = tmp_path / "out"
    run("create", images, out)
    code, printed, errors = run("stats", out)
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert (code, errors) == (0, "")
    assert {"train", "samples 12", "labelled 12", "unlabelled 0", "classes 2", "shards 1"} <= set(lines)
    assert {"images looked into 12", "width 8 / 8 / 8", "formats 12 png"} <= set(lines)
    assert "train by class — cat: 9, dog: 3" in lines
    assert lines[-1].startswith(("split by default: ", "no split by default: data."))
    result = json.loads(run("stats", out, "--json")[1])
    assert result["parts"][0]["classes"] == {"cat": 9, "dog": 3}
    assert result["parts"][0]["height"] == {"least": 8, "median": 8, "most": 8}
    assert (result["split"] is None) != (result["no_split"] is None)


def test_stats_of_many_classes(tmp_path: Path, write_tar: Callable[..., None], run: Run) -> None:
    members = {f"{number}.png": b"x" for number in range(40)}
    write_tar(tmp_path / "train-0.tar", members | {f"{n}.cls": str(min(n, 19)).encode() for n in range(40)})
    lines = run("stats", tmp_path)[1].splitlines()
    assert "train, largest classes — 19: 21, 0: 1, 1: 1, 2: 1, 3: 1" in lines
    assert "train, smallest classes — 14: 1, 15: 1, 16: 1, 17: 1, 18: 1" in lines


def test_index_says_what_it_has_found(
    tmp_path: Path, fill_shard: Callable[..., None], write_tar: Callable[..., None], run: Run
) -> None:
    fill_shard(tmp_path / "train-0.tar", 3)
    write_tar(tmp_path / "train-1.tar", {"a.cls": b"0"})
    code, printed, errors = run("index", tmp_path / "train-*.tar", tmp_path)
    lines = printed.splitlines()
    assert (code, errors, len(lines)) == (0, "", 2)
    assert lines[0].startswith(f"{tmp_path}/train-index.json: 3 samples in 2 shards, ")
    assert lines[1] == "left out: 1 bad samples (1 no-image)"
    assert run("verify", tmp_path)[:1] == (0,)
    code, printed, _ = run("index", f"pipe:cat {tmp_path}/train-0.tar", tmp_path / "out", "--part", "test")
    assert code == 0 and printed.splitlines()[1].startswith("An index holds no commands")
    assert (tmp_path / "out" / "test-index.json").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "the following arguments are required: create | index | verify | stats; see --help"),
        (("make",), "argument create | index | verify | stats: invalid choice: 'make'"),
        (("create", "x"), "the following arguments are required: OUT; see --help"),
        (
            ("create", "x", "y", "--quality", "0"),
            "argument --quality: found '0', expected a whole number from 1",
        ),
        (("create", "x", "y", "--format", "gif"), "argument --format: invalid choice: 'gif'"),
        (("create", "x", "y", "--resize", "-1"), "argument --resize: "),
        (
            ("create", "x", "y", "--seed", "a"),
            "argument --seed: found 'a', expected a whole number, 0 or above",
        ),
        (
            ("create", "x", "y", "--max-bad-share", "2"),
            "argument --max-bad-share: found '2', expected a number",
        ),
        (
            ("create", "x", "y", "--max-bad-share", "nan"),
            "argument --max-bad-share: found 'nan', expected a number",
        ),
        (
            ("create", "x", "y", "--parts", "a"),
            "argument --parts: found 'a', expected names out of train,test,val",
        ),
        (("create", "x", "y", "--works", "2"), "unrecognized arguments: --works"),
        (("create", "no/such/folder", "y"), "no/such/folder: not there; expected an image folder"),
        (("verify", "no/such/*.tar"), "no/such/*.tar: no file matches"),
        (("index", "x", "y", "--part", "a"), "argument --part: invalid choice: 'a'"),
    ],
)
def test_misuse_costs_one_line(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, errors = run(*words)
    assert (code, printed) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"mlomae: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["--help"], "mlomae shards --help"),
        (["shards", "--help"], "verify compare shards with their index"),
        (["shards", "create", "--help"], "--samples-per-shard N"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
        assert expected in " ".join(capsys.readouterr().out.split())


def test_sizes_are_read_easily() -> None:
    shown = [show_bytes(count) for count in (0, 999, 1000, 123456, 2.5e9, 4e15)]
    assert shown == ["0 bytes", "999 bytes", "1.0 kB", "123 kB", "2.5 GB", "4,000.0 TB"]
