"""Published results: tables 2 and 3 of Transferring Knowledge Across Learning Processes (ICLR 2019 submission)."""

from __future__ import annotations

from typing import NamedTuple

PRETRAINING = tuple(map(str, (1, *range(2, 31, 2))))
"""Numbers of pretraining alphabets: the columns of table 2."""

OMNIGLOT: dict[str, dict[str, float]] = {
    arm: dict(zip(PRETRAINING, errors, strict=True))
    for arm, errors in {
        "leap": (8.7, 6.6, 4.0, 3.0, 3.1, 2.8, 2.7, 2.7, 2.3, 2.8, 2.6, 2.4, 2.4, 2.2, 2.7, 2.1),
        "finetune-multi": (7.5, 6.3, 4.7, 4.4, 4.2, 4.0, 3.6, 3.8, 3.9, 3.7, 3.9, 3.7, 3.5, 3.3, 3.8, 3.6),
        "reptile": (8.4, 8.0, 7.2, 6.3, 6.1, 5.7, 5.4, 5.2, 5.1, 5.1, 4.7, 4.9, 5.0, 4.5, 4.8, 4.6),
        "fomaml": (8.8, 8.8, 8.6, 8.4, 8.7, 9.2, 8.6, 8.6, 9.1, 8.7, 9.4, 8.6, 8.7, 9.2, 9.3, 8.7),
        "finetune-single": (
            *(15.4, 11.7, 10.9, 11.6, 12.3, 13.7, 15.5, 15.1),
            *(16.1, 17.3, 21.6, 26.0, 30.7, 37.7, 40.3, 43.6),
        ),
        "none": (17.0, 16.8, 17.9, 16.1, 15.9, 16.1, 16.2, 16.6, 16.7, 15.9, 16.6, 16.2, 15.9, 16.9, 17.0, 16.1),
    }.items()
}
"""Table 2: mean test error in % on held-out alphabets, by arm and number of pretraining alphabets."""

OMNIGLOT["multitask"] = OMNIGLOT["finetune-multi"]  # in the authors' code, multi-headed finetuning is joint training


class Errors(NamedTuple):
    """Results of one arm on one held-out data set, in %; the area under the training-error curve is scaled to 0–100."""

    test_error: float
    train_error: float
    auc: float


MULTI_CV: dict[str, dict[str, Errors]] = {
    held_out: dict(
        zip(
            ("leap", "finetune-multi", "none", "multitask"),
            (Errors(*of_arm) for of_arm in (*of_arms, of_arms[1])),  # appendix D: "multitask finetuning"
            strict=True,
        )
    )
    for held_out, of_arms in {
        "facescrub": ((19.9, 0.0, 11.6), (32.7, 0.0, 13.2), (18.2, 0.0, 10.5)),
        "notmnist": ((5.3, 0.6, 2.9), (5.4, 2.0, 4.4), (5.4, 2.6, 5.1)),
        "mnist": ((0.7, 0.1, 0.6), (0.9, 0.1, 0.8), (0.9, 0.2, 1.0)),
        "fashion_mnist": ((8.0, 4.2, 6.8), (8.9, 3.8, 7.0), (8.4, 4.7, 7.8)),
        "cifar10": ((21.2, 10.8, 17.5), (27.4, 13.3, 20.7), (26.2, 13.1, 23.0)),
        "svhn": ((8.4, 5.6, 7.5), (10.9, 6.1, 9.3), (10.3, 6.9, 11.5)),
        "cifar100": ((52.0, 30.5, 43.4), (59.2, 31.5, 44.1), (54.8, 33.1, 50.1)),
        "gtsrb": ((2.9, 0.0, 1.2), (5.7, 0.0, 1.7), (3.6, 0.0, 2.4)),
    }.items()
}
"""Table 3, by held-out data set and arm. Its Traffic Signs are called gtsrb here."""
