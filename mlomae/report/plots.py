"""Which plots a report draws, in which order, and what each of them means."""

from __future__ import annotations

from dataclasses import dataclass

from mlomae.report.figures import Kind


@dataclass(frozen=True)
class Plot:
    """A small plot.

    Attributes:
        scalars: names in ``metrics.jsonl``; the second one is drawn dashed.
        title: what it shows.
        note: what that means, in a sentence or two.
        chance: whether the agreement of random masks is marked.
        linear: never starts on a logarithmic axis, however far its values span.
    """

    scalars: tuple[str, ...]
    title: str
    note: str = ""
    kind: Kind = Kind.NUMBER
    chance: bool = False
    linear: bool = False


GROUPS: tuple[tuple[str, tuple[Plot, ...]], ...] = (
    (
        "Pretraining",
        (
            Plot(("loss/pretrain",), "Pretraining loss", "Mean error of the removed patches, each weighted "
                 "by its removal probability where the mask is learned."),
            Plot(("loss/reconstruction",), "Reconstruction error", "Mean error of the removed patches, "
                 "unweighted. It does not compare masks: one may choose easy patches."),
            Plot(("loss/label",), "Label loss", "Of the classifier on the kept patches, part of the "
                 "pretraining loss."),
            Plot(("accuracy/label",), "Label accuracy", "Of the same classifier, on training batches.",
                 Kind.SHARE),
            Plot(("gradient_norm/pretrain",), "Gradient norm, pretraining", "Before clipping."),
        ),
    ),
    (
        "Head and held-out images",
        (
            Plot(("loss/head",), "Head loss", "On training batches."),
            Plot(("accuracy/head",), "Head accuracy", "On training batches.", Kind.SHARE),
            Plot(("loss/mask",), "Mask loss", "Loss of the head on held-out images: what "
                 "the mask minimises."),
            Plot(("gradient_norm/head",), "Gradient norm, head", "Before clipping."),
        ),
    ),
    (
        "Hypergradient",
        (
            Plot(("hypergradient/norm",), "Hypergradient norm", "Of the masking network's gradient."),
            Plot(("hypergradient/estimated_error",), "Estimated error", "Of the influence, relative; from "
                 "those at other radii."),
            Plot(("hypergradient/direction_norm",), "Direction norm", "How much the held-out loss changes "
                 "with the encoder's weights."),
            Plot(("hypergradient/radius",), "Radius", "Of the finite difference, relative to the weights."),
        ),
    ),
    (
        "Mask",
        (
            Plot(("loss/hardness",), "Hardness loss", "How well the scores rank removed patches by their "
                 "error; 0.69 knows nothing."),
            Plot(("mask/entropy",), "Entropy", "Of the removal probabilities, in bits: 1 at 50 %, 0 where "
                 "the mask is certain."),
            Plot(("mask/saturation",), "Saturation", "Share of scores that hardly move any more.",
                 Kind.SHARE),
            Plot(("mask/agreement", "mask/agreement_noiseless"), "Agreement", "Share of positions on which "
                 "two images of a batch agree. 100 %: one mask for all images. Dashed: without noise.",
                 Kind.SHARE, chance=True),
            Plot(("mask/spread",), "Spread", "Standard deviation of the scores within an image; 0: the mask "
                 "prefers no patch."),
        ),
    ),
    (
        "Learning rates",
        (
            Plot(("lr/pretrain",), "Learning rate, pretraining", linear=True),
            Plot(("lr/head",), "Learning rate, head", linear=True),
            Plot(("lr/mask",), "Learning rate, mask", linear=True),
            Plot(("lr/hardness",), "Learning rate, hardness", linear=True),
        ),
    ),
    (
        "Machine",
        (
            Plot(("images_per_second",), "Images per second", "Of pretraining, all ranks."),
            Plot(("mfu",), "MFU", "Share of the device's measured peak that the model's arithmetic reaches.",
                 Kind.SHARE),
            Plot(("mfu_data_sheet",), "MFU by the data sheet", "", Kind.SHARE),
            Plot(("data_wait",), "Waiting for data", "Share of the time.", Kind.SHARE),
            Plot(("memory/peak_bytes",), "Peak memory", "On a CPU of the whole process.", Kind.BYTES),
            Plot(("gpu/utilisation",), "GPU utilisation", "", Kind.SHARE),
            Plot(("gpu/power_watts",), "GPU power", "In watts."),
            Plot(("gpu/energy_joules_per_image",), "Energy per image", "In joules."),
        ),
    ),
)  # fmt: skip
