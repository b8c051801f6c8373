"""``mlomae doctor``: whether this installation, this machine and a folder are fit for runs."""
