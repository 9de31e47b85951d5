"""Training on several machines, all of them on this one: a SLURM cluster, and hosts with a network between them."""
