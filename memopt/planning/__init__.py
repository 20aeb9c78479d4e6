"""The memory that a run will need."""

from memopt.planning.fit import fit_batch_size as fit_batch_size
from memopt.planning.fit import fit_mesh as fit_mesh
from memopt.planning.fit import fit_optimizer as fit_optimizer
