"""A comparison of meta-learners on supervised tasks, as in the paper: trained, tested on what they never saw, told."""
