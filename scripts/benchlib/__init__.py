"""What `scripts/bench` is made of: measuring and rows here, one module a benchmark."""
