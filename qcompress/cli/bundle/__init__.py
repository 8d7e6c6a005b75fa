"""Triton model repositories: writing one from a run, and checking whether one loads on this host.
No torch.
"""
