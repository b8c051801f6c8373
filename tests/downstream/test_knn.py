"""k-nearest neighbours on frozen features: the same classes as scikit-learn's, on any number of sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mlomae.cli import main
from mlomae.downstream import knn
from mlomae.downstream.feature_set import FeatureSet
from mlomae.downstream.knn import knn_accuracies, neighbours

CPU = torch.device("cpu")


def clouds(count: int, seed: int, spread: float = 1.0, classes: int = 5, width: int = 8) -> FeatureSet:
    """A cloud of features for each class, overlapping at a spread of 1."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return FeatureSet(centres[labels] + spread * torch.randn(count, width, generator=generator), labels)


def single(part: FeatureSet, index: int, label: int) -> FeatureSet:
    """One image of a set as if it had this label."""
    return FeatureSet(part.features[index : index + 1], torch.tensor([label]))


def by_sklearn(train: FeatureSet, test: FeatureSet, k: int) -> torch.Tensor:
    classifier = KNeighborsClassifier(k, weights="distance", metric="cosine")
    classifier.fit(train.features.double().numpy(), train.labels.numpy())
    return torch.from_numpy(classifier.predict(test.features.double().numpy()))


@pytest.mark.parametrize("chunk", [knn._CHUNK, 1000])
def test_classes_are_those_of_scikit_learn(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_CHUNK", chunk)
    train, test = clouds(300, 0), clouds(80, 1)
    known, ks = neighbours([train[:200], train[200:]], CPU), (1, 5, 20)
    together = knn_accuracies(known, test, ks)

    for k in ks:
        predicted = by_sklearn(train, test, k)
        # One by one: with the predicted label an image is right, with another one it is wrong.
        for index, label in enumerate(predicted.tolist()):
            assert knn_accuracies(known, single(test, index, label), [k]) == {k: 1.0}
            assert knn_accuracies(known, single(test, index, label + 1), [k]) == {k: 0.0}
        assert together[k] == pytest.approx(float((predicted == test.labels).float().mean()))
    assert len(set(together.values())) > 1


def test_an_exact_neighbour_decides_alone() -> None:
    copies = FeatureSet(
        torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.1, 2.0], [-0.1, 2.0]]), torch.tensor([0, 1, 1, 1])
    )
    near = FeatureSet(torch.tensor([[6.0, 8.0], [3.0, 4.1]]), torch.tensor([0, 0]))
    assert knn_accuracies(neighbours([copies], CPU), near[:1], [4]) == {4: 1.0}
    # Of two exact ones with different labels the first class wins.
    double = FeatureSet(torch.tensor([[3.0, 4.0], [6.0, 8.0]]), torch.tensor([1, 0]))
    assert knn_accuracies(neighbours([double], CPU), near[:1], [2]) == {2: 1.0}


def test_it_looks_at_the_angle_and_takes_no_more_neighbours_than_there_are() -> None:
    train = FeatureSet(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    test = FeatureSet(torch.tensor([[100.0, 1.0], [0.01, 1.0], [5.0, 4.0]]), torch.tensor([0, 1, 0]))
    assert knn_accuracies(neighbours([train], CPU), test, [50]) == {50: 1.0}


def test_the_heldout_images_choose_and_become_neighbours(digits_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(digits_run, tmp_path / "run")

    assert main(["eval", "knn", str(run), "--ks", "[1, 7, 300]"]) == 0

    result = json.loads((run / "eval" / "knn" / "result.json").read_text())
    heldout = {k: result[f"heldout_accuracy_k{k}"] for k in (1, 7, 300)}
    assert result["k"] == max(heldout, key=lambda k: heldout[k])
    assert result["accuracy"] == result[f"accuracy_k{result['k']}"]
    assert heldout[300] < heldout[1]
    parts = read_features(run / "eval")
    both = neighbours([parts["labelled"], parts["heldout"]], CPU)
    assert result["accuracy_k7"] == knn_accuracies(both, parts["test"], [7])[7]
    alone = neighbours([parts["labelled"]], CPU)
    assert heldout[7] == knn_accuracies(alone, parts["heldout"], [7])[7]


def read_features(folder: Path) -> dict[str, FeatureSet]:
    from safetensors.torch import load_file

    (cache,) = folder.glob("features-*")
    return {path.stem: FeatureSet(**load_file(path)) for path in cache.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ks", "[]"], "ks: "),
        (["--ks", "[0]"], "ks.0: "),
        (["--pool", "max"], "pool: "),
        (["--img_size", "7"], "img_size: [7, 7] is not divisible by the encoder's patch size 2"),
        (["--data.dataset", "cifar10", "--data.path", "x"], "data.dataset: cifar10 has 3 channels, but "),
        (["--data.dataset", "folder"], "data: path is missing"),
        (["--data.datset", "folder"], "data.datset: unknown key; did you mean 'dataset'?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: list[str],
    message: str,
    digits_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["eval", "knn", str(digits_run), "--out", str(tmp_path / "out"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlomae: error: {message}")


def test_weights_without_a_run_need_images(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = shutil.copy(digits_run / "encoder.safetensors", tmp_path / "weights.safetensors")
    for words in ([], ["--data.path", str(tmp_path)]):
        assert main(["eval", "knn", str(weights), "--out", str(tmp_path / "out"), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"mlomae: error: data.dataset: missing, and {weights} is ")
