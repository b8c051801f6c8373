"""``mlomae hypergrad-check`` on recipes and runs: what it prints, draws, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlomae.cli import main
from mlomae.mlo.estimators import ESTIMATORS
from tests.integration.tiny import tiny_config, train, without_pictures, write_recipe

# Of the cosine, by estimator and precision; measured far above.
MIN_COSINE = {False: 0.9999, True: 0.99}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    # A recipe does not touch the run directory that it names.
    return write_recipe(tmp_path / "tiny.yaml", {"run_dir": str(tmp_path / "untouched")})


def check(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["hypergrad-check", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("bf16", [False, True])
def test_json_of_a_recipe(
    bf16: bool,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, err = check(capsys, "--config", recipe, "--json", *(["--bf16"] if bf16 else []))
    assert (code, err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(out)
    assert [row["estimator"] for row in rows] == list(ESTIMATORS)
    assert {tuple(row) for row in rows} == {
        ("estimator", "cosine", "relative_error", "seconds", "peak_bytes")
    }
    for row in rows:
        assert row["seconds"] > 0 and row["peak_bytes"] > 0
        assert row["relative_error"] > 0 or row["estimator"] == "exact"
        if row["estimator"] != "fd-forward":
            assert row["cosine"] > MIN_COSINE[bf16], row
    by_name = {row["estimator"]: row for row in rows}
    assert by_name["exact"]["peak_bytes"] > by_name["fd"]["peak_bytes"]
    assert sorted(tmp_path.iterdir()) == before  # no run directory, no picture


def test_table_and_picture_of_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    run_dir = tmp_path / "run"
    train(tiny_config({"run_dir": run_dir}))
    kept = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}

    code, out, _ = check(capsys, run_dir)

    assert code == 0
    assert "iteration 4" in out and "fd *" in out
    assert all(name in out for name in ESTIMATORS)
    assert out.splitlines()[-1] == f"plot: {run_dir / 'hypergradient.png'}"
    with Image.open(run_dir / "hypergradient.png") as picture:
        assert picture.width > 800
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_picture_where_it_is_asked_for_and_own_estimator(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "other.png"
    words = ["--config", recipe, "--plot", plot, "--images", "4", "--hypergradient.estimator", "jvp"]
    code, out, _ = check(capsys, *words)
    assert code == 0 and plot.exists()
    assert "jvp *" in out and "4 images" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "hypergrad-check: give a run directory or --config FILE"),
        (["nowhere"], "--config nowhere/config.yaml: cannot be read"),
        (["--config", "absent.yaml"], "--config absent.yaml: cannot be read"),
        (["--config", "RECIPE", "--images", "0"], "found '0', expected a whole number above 0"),
        (["--config", "RECIPE", "--masking.policy", "random"], "masking.policy: random has no hypergradient"),
        (["--config", "RECIPE", "--hypergradient.radius", "2"], "hypergradient.radius: "),
        (["--config", "RECIPE", "--plot", "/nowhere/x.png"], "--plot /nowhere/x.png: cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = check(capsys, *(str(recipe) if word == "RECIPE" else word for word in words))
    assert code == 2
    assert len(err.splitlines()) == 1 and message in err
