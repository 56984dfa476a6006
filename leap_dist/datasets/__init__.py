"""Data sets for supervised tasks: Omniglot and Multi-CV, read from the published files and checked.

    from leap_dist.datasets import multicv, omniglot

    task = omniglot.find(data_dir).task("Greek", seed=0)
    task = multicv.find(data_dir, "mnist")

Both return a `ClassificationProblem`: NumPy arrays of uint8 images and int64 labels. docs/data.md has the layouts.
"""
