"""Jobs for Slurm, LSF and this machine: site profiles, batch scripts, submission, their state."""
