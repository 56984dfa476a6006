"""Supervised data: Omniglot and the data sets of Multi-CV, read from their owners' files and checked.

    from leap_dist.datasets import multicv, omniglot

    task = omniglot.find(data_dir).task("Greek", seed=0)
    task = multicv.find(data_dir, "mnist")

Both are a `Supervised`: uint8 images and int64 labels, decoded once. Everything is NumPy; docs/data.md has the layouts.
"""
