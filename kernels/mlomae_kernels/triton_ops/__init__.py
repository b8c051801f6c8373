"""The operators in Triton, one module each; imported only where a kernel is to be launched."""
