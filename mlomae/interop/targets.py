"""The values of ``mlomae export --to``: what each is, and how it is loaded. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
        title: what is written.
        library: by the hub's name for it.
        suffix: of the file's name; empty for a folder.
        imports: what the following needs beside torch; empty for nothing.
        loading: Python lines that load ``{name}`` and compute something of a batch ``images``.
    """

    title: str
    library: str
    suffix: str
    imports: str
    loading: str

    @property
    def folder(self) -> bool:
        return not self.suffix


TARGETS = {
    "timm": Target(
        "folder for timm.create_model; its model.safetensors is a timm checkpoint",
        "timm",
        "",
        "import timm",
        """\
encoder = timm.create_model("local-dir:{name}", pretrained=True).eval()
features = encoder(images)""",
    ),
    "hf": Target(
        "folder of a Hugging Face ViTMAEForPreTraining, with the decoder",
        "transformers",
        "",
        "from transformers import ViTMAEForPreTraining",
        """\
autoencoder = ViTMAEForPreTraining.from_pretrained("{name}")
loss = autoencoder(images).loss""",
    ),
    "hf-vit": Target(
        "folder of a Hugging Face ViTModel",
        "transformers",
        "",
        "from transformers import ViTModel",
        """\
encoder = ViTModel.from_pretrained("{name}", add_pooling_layer=False)
tokens = encoder(images).last_hidden_state  # the class token, then the patches""",
    ),
    "mae": Target(
        ".pth file in the layout of facebookresearch/mae, with the decoder if there is one",
        "pytorch",
        ".pth",
        "import mlomae",
        """\
state_dict = torch.load("{name}", weights_only=True)["model"]  # for code that expects this layout
encoder = mlomae.load_encoder("{name}")
features = encoder(images)""",
    ),
    "onnx": Target(
        "ONNX file: images to features, any batch size",
        "onnx",
        ".onnx",
        "import onnxruntime",
        """\
session = onnxruntime.InferenceSession("{name}")
(features,) = session.run(None, {{"images": images.numpy()}})""",
    ),
    "pt2": Target(
        "torch.export program: images to features, any batch size",
        "pytorch",
        ".pt2",
        "",
        """\
encoder = torch.export.load("{name}").module()
features = encoder(images)""",
    ),
}
