"""Faster R-CNN on a ViT's feature pyramid, for images that were brought to size by their loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from mlomae.downstream.pyramid import STRIDES, PyramidBackbone

ANCHOR = 8  # side of a level's anchors, in its cells
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
POOLED = 7  # cells of a box's features, per side
MOST = 100  # detections in an image, as many as COCO counts


def build_detector(
    encoder: VisionTransformer,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    out_channels: int,
    hidden: int,
    samples: int,
    proposals: int,
) -> FasterRCNN:
    """A detector: in training mode it maps images and targets to losses, else images to detections.

    Images are float32 [C, h, w] in [0, 1], not larger than the encoder's, targets ``boxes`` (float32 [n, 4])
    and ``labels`` (int64 [n], from 1). Detections have ``scores``, too.

    Args:
        encoder: for images whose sides are multiples of four patches.
        num_classes: without the background.
        mean, std: per channel, of values in [0, 1].
        out_channels: of the pyramid.
        hidden: width of the layers that tell the class of a box.
        samples: boxes per image that these are trained on.
        proposals: boxes per image that they are asked about.
    """
    patch = encoder.patch_embed.patch_size[0]
    rpn_head = RPNHead(out_channels, len(RATIOS))
    predictor = FastRCNNPredictor(hidden, num_classes + 1)
    for part in (rpn_head, predictor):
        part.register_forward_hook(_give_float32)
    model = FasterRCNN(
        PyramidBackbone(encoder, out_channels),
        rpn_anchor_generator=AnchorGenerator(
            sizes=tuple((int(ANCHOR * stride * patch),) for stride in STRIDES.values()),
            aspect_ratios=(RATIOS,) * len(STRIDES),
        ),
        rpn_head=rpn_head,
        rpn_pre_nms_top_n_train=2 * proposals,
        rpn_post_nms_top_n_train=2 * proposals,
        rpn_pre_nms_top_n_test=proposals,
        rpn_post_nms_top_n_test=proposals,
        box_roi_pool=_FramedRoIAlign([*STRIDES][:-1], POOLED, sampling_ratio=2),
        box_head=TwoMLPHead(out_channels * POOLED**2, hidden),
        box_predictor=predictor,
        box_detections_per_img=MOST,
        box_batch_size_per_image=samples,
    )
    frame = encoder.patch_embed.img_size
    model.transform = _Framing(frame, mean, std)
    model.roi_heads.box_roi_pool.frame = frame
    return model


class _FramedRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc] # torchvision has no types
    """The maps' scales relative to the frame; torchvision infers them from the images of the first batch."""

    frame: tuple[int, int]

    def forward(self, x: Any, boxes: Any, image_shapes: Any) -> Tensor:
        pooled: Tensor = super().forward(x, boxes, [self.frame])
        return pooled


class _Framing(GeneralizedRCNNTransform):  # type: ignore[misc] # torchvision has no types
    """Normalises images and lays each into the upper left corner of a frame of one size.

    With one size for all, what is found in an image depends on no other image of its batch.
    """

    def __init__(self, frame: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(min(frame), max(frame), list(mean), list(std))
        self.frame = frame

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 1) -> Tensor:
        framed = images[0].new_zeros(len(images), images[0].shape[0], *self.frame)
        for place, image in zip(framed, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return framed


def _give_float32(module: nn.Module, arguments: Any, output: Any) -> Any:
    """Forward hook: what follows computes boxes in pixels, for which bf16 has too few digits."""
    if isinstance(output, Tensor):
        return output.to(torch.float32)
    return type(output)(_give_float32(module, arguments, part) for part in output)
