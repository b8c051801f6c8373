"""How figures are called and written: names for people, units, a sensible number of digits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

ABSENT = "\N{EN DASH}"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TIMES = " \N{MULTIPLICATION SIGN} 10"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Kind(StrEnum):
    """What a number counts, which decides how it is written; the page's script knows the same kinds."""

    NUMBER = "number"
    SHARE = "share"  # of 1, as a percentage
    COUNT = "count"
    BYTES = "bytes"
    SECONDS = "seconds"


@dataclass(frozen=True)
class Name:
    """A figure's name, kind, and whether more of it is better; None where that is no question."""

    text: str
    kind: Kind = Kind.NUMBER
    better: bool | None = None


_SHARES = {
    "knn_accuracy": "k-NN accuracy",
    "linear_accuracy": "Linear probe",
    "finetune_accuracy": "Fine-tuned",
    "segment_miou": "Segmentation, mIoU",
    "detect_ap": "Detection, AP",
    "head_miou": "mIoU of the head",
    "head_pixel_accuracy": "Pixel accuracy of the head",
    "pixel_knn_accuracy": "k-NN on raw pixels",
    "pixel_linear_accuracy": "Linear probe on raw pixels",
    "accuracy": "Accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "heldout_accuracy": "Held-out accuracy",
    "miou": "mIoU",
    "pixel_accuracy": "Pixel accuracy",
    "mean_class_accuracy": "Mean class accuracy",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}
NAMES = {
    **{name: Name(text, Kind.SHARE, better=True) for name, text in _SHARES.items()},
    "loss": Name("Loss", better=False),
    "k": Name("k", Kind.COUNT),
    "lr": Name("Learning rate"),
    "epochs": Name("Epochs", Kind.COUNT),
    "iterations": Name("Iterations", Kind.COUNT),
    "num_test": Name("Test images", Kind.COUNT),
    "num_parameters": Name("Parameters", Kind.COUNT),
    "bad_samples": Name("Bad samples", Kind.COUNT),
    "images_per_second": Name("Images/s"),
    "seconds": Name("Time", Kind.SECONDS),
}


def name_of(field: str) -> Name:
    """The name of a figure of ``result.json`` or of an evaluation."""
    if field in NAMES:
        return NAMES[field]
    words = field.replace("_", " ")
    share = "accuracy" in words or words.startswith(("ap", "iou", "miou"))
    return Name(words[:1].upper() + words[1:], Kind.SHARE if share else Kind.NUMBER, True if share else None)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that can be written."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write(value: float | None, kind: Kind = Kind.NUMBER, digits: int | None = None) -> str:
    """A number for people; a dash where there is none.

    Args:
        digits: of a number its significant ones (default: 4), of a share those after the point (1).
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    match kind:
        case Kind.SHARE:
            text = _percentage(100 * value, 1 if digits is None else digits)
        case Kind.COUNT:
            text = f"{value:,.0f}"
        case Kind.BYTES:
            text = _bytes(value)
        case Kind.SECONDS:
            text = _duration(value)
        case Kind.NUMBER:
            text = _number(value, 4 if digits is None else digits)
    # A line must not end between a number and its unit.
    return text.replace("-", "\N{MINUS SIGN}").replace(" ", "\N{NO-BREAK SPACE}")


def _percentage(value: float, decimals: int) -> str:
    # Two digits of what is small, or it would read 0.0 %.
    if 0 < abs(value) < 1:
        decimals = max(decimals, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f} %"


def _number(value: float, digits: int) -> str:
    size = abs(value)
    if value == 0:
        return "0"
    if 1e-3 <= size < 1e5:
        return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    mantissa, exponent = f"{value:.{min(digits - 1, 2)}e}".split("e")
    return f"{mantissa}{_TIMES}{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def _bytes(value: float) -> str:
    power = min(int(math.log2(abs(value)) // 10), len(_UNITS) - 1) if abs(value) >= 1 else 0
    amount = value / 1024**power
    return f"{amount:.0f} {_UNITS[power]}" if abs(amount) >= 100 else f"{amount:.3g} {_UNITS[power]}"


def _duration(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min"
