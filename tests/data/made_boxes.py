"""Images of coloured rectangles in COCO's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = {"red": (220, 40, 40), "blue": (40, 40, 220)}
SIZES = ((64, 64), (48, 64), (64, 48))  # height, width


def make_boxes(root: Path, counts: Mapping[str, int], seed: int = 0) -> Path:
    """Writes splits of images with one or two rectangles on grey noise; every eighth image shows none.

    The categories have the ids 3 (blue) and 7 (red).
    """
    generator = np.random.default_rng(seed)
    for split, count in counts.items():
        (root / split).mkdir(parents=True)
        document: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}],
        }
        for number in range(count):
            height, width = SIZES[number % len(SIZES)]
            pixels = generator.normal(128, 12, (height, width, 3))
            for _ in range(0 if number % 8 == 7 else 1 + number % 2):
                box_width, box_height = generator.integers(14, 30, 2)
                left = generator.integers(0, width - box_width)
                top = generator.integers(0, height - box_height)
                name = ("red", "blue")[generator.integers(2)]
                pixels[top : top + box_height, left : left + box_width] = CLASSES[name]
                document["annotations"].append(
                    {
                        "id": len(document["annotations"]) + 1,
                        "image_id": 100 + number,
                        "category_id": {"red": 7, "blue": 3}[name],
                        "bbox": [float(value) for value in (left, top, box_width, box_height)],
                        "area": float(box_width * box_height),
                        "iscrowd": 0,
                    }
                )
            name = f"{number:03d}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name)
            document["images"].append(
                {"id": 100 + number, "file_name": name, "width": width, "height": height}
            )
        annotations = root / "annotations"
        annotations.mkdir(exist_ok=True)
        (annotations / f"instances_{split}.json").write_text(json.dumps(document))
    return root
