"""``mlomae plan``: memory, communication and time of a run on given GPUs, from its configuration alone."""
