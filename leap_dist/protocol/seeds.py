"""Seeds that are derived from others."""

from __future__ import annotations

import numpy as np


def derived_seed(*parts: int | str) -> int:
    """Return a seed of 32 bits that depends on all parts and their order, and is the same on every machine.

    Seeds of different parts are independent for all practical purposes; see NumPy's SeedSequence. A text counts as
    its bytes in UTF-8.
    """
    numbers = [number for part in parts for number in ([part] if isinstance(part, int) else part.encode())]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
