"""What `scripts/cluster` is made of: processes, layout and ports, Slurm's and Berth's configuration, the parts."""
