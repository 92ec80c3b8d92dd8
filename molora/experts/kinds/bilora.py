"""BiLoRA: singular values learn on one half of the data, singular vectors on the other, in turn.

    ΔW = s · P Λ Q,  Λ diagonal and 0 at first, P and Q from N(0, 0.02²)

Two levels: the vectors are fitted to half of each task's training records, the values to the other half, so that no value
grows on what its vectors have merely learnt by heart. Each step of the optimiser is of one half; the first one is of the values,
since vectors have no gradient where values are 0. Gates and heads learn on both. `aux_losses: {orthonormal: 0.1}` keeps P and
Q close to orthonormal. Not taken over: the paper differentiates through one step of the vectors (DARTS); here each half is a
first-order step, as in its approximation. The halves are made by `molora train` and what else trains recipes; under another
loop, values and vectors learn together.

Reference: BiLoRA, arXiv:2403.13037.
"""

from __future__ import annotations

from typing import ClassVar

from molora.experts.kinds.kind import About
from molora.experts.kinds.singular import Singular


class BiLora(Singular):
    """A is Q, B is Pᵀ, E is Λ, as of `adalora`, without a budget."""

    about = About(
        "BiLoRA, arXiv:2403.13037",
        "singular values of each expert on one half of the data, singular vectors on the other, in turn",
        "small data, where experts learn records by heart; half of the steps go to each, so give it twice as many",
    )
    upper: ClassVar[frozenset[str]] = frozenset({"E"})
