"""Projectors: rules that give each matrix the subspace in which `in_subspace` works.

A matrix G (m×n) is projected on one side by a basis P of rank r:

======== ============ ================ =================
side     P            down: R =        up: G ≈
======== ============ ================ =================
"left"   m×r          PᵀG   (r×n)      P R
"right"  n×r          G P   (m×r)      R Pᵀ
======== ============ ================ =================

``side="short"`` projects the shorter side (the left side of a square matrix), so that R keeps the
longer one; ``side="long"`` projects the longer side. G, P and R may have leading stack axes; a P
without them is shared by the whole stack. `columns`, `coordinates` and `blocks` select entries of
G instead, and `haar` sums adjacent lines.
"""

from memopt import renamed
from memopt.transforms.projectors.base import MatrixSpec as MatrixSpec
from memopt.transforms.projectors.base import Projector as Projector
from memopt.transforms.projectors.base import RefreshClock as RefreshClock
from memopt.transforms.projectors.fixed import dct as dct
from memopt.transforms.projectors.fixed import haar as haar
from memopt.transforms.projectors.named import by_name as by_name
from memopt.transforms.projectors.random import gaussian as gaussian
from memopt.transforms.projectors.random import orthogonal as orthogonal
from memopt.transforms.projectors.random import rademacher as rademacher
from memopt.transforms.projectors.random import sparse as sparse
from memopt.transforms.projectors.replay import replay as replay
from memopt.transforms.projectors.selected import blocks as blocks
from memopt.transforms.projectors.selected import columns as columns
from memopt.transforms.projectors.selected import coordinates as coordinates
from memopt.transforms.projectors.singular import randomized_svd as randomized_svd
from memopt.transforms.projectors.singular import svd as svd
from memopt.transforms.projectors.tracked import coap as coap
from memopt.transforms.projectors.tracked import grassmann as grassmann
from memopt.transforms.projectors.tracked import lazy_svd as lazy_svd
from memopt.transforms.projectors.tracked import online_pca as online_pca
from memopt.transforms.projectors.tracked import power_iteration as power_iteration

__getattr__ = renamed.finder(
    "memopt.projectors", globals(), {"Leaf": "MatrixSpec", "When": "RefreshClock"}
)
