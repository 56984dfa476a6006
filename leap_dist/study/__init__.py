"""A comparison of meta-learners on supervised tasks, as in the paper: training, tests on held-out tasks, report."""
