"""One file for each kind of expert: how its own parameters become the two factors that the kernel multiplies."""
