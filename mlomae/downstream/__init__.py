"""What an encoder is worth: k-NN, linear probe, fine-tuning, segmentation, detection (``mlomae eval``)."""
