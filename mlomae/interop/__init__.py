"""Weights from and for other libraries: timm, facebookresearch/mae, Hugging Face, ONNX, torch.export."""
