"""``python -m mlomae.slurm``: prints where the job scripts lie; Slurm runs a copy of one alone."""

from mlomae.slurm import scripts_folder

if __name__ == "__main__":
    print(scripts_folder())
