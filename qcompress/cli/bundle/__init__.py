"""A run as a Triton model repository, and why one would not load on this host. No torch."""
