"""Slurm: submitting runs, and deciding after each attempt whether a job goes on."""

from __future__ import annotations

from pathlib import Path


def scripts_folder() -> Path:
    """The folder of the job scripts: part of an installed package, or ``slurm/`` of a clone."""
    installed = Path(__file__).with_name("scripts")
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "slurm"
