"""Memory-efficient optimizers for large models in JAX, as composable Optax chains."""

from memopt import schedules as schedules
from memopt import transforms as transforms
from memopt.matrices import Matrix as Matrix
from memopt.matrices import every_matrix as every_matrix
from memopt.matrices import hidden_matrices as hidden_matrices
from memopt.optimizers import adafactor as adafactor
from memopt.optimizers import apollo as apollo
from memopt.optimizers import apollo_mini as apollo_mini
from memopt.optimizers import available as available
from memopt.optimizers import lion as lion
from memopt.optimizers import matrices_and_rest as matrices_and_rest
from memopt.optimizers import optimizer as optimizer
from memopt.state.bytes import StateBytes as StateBytes
from memopt.state.bytes import state_bytes as state_bytes
from memopt.transforms import GrowthLimiter as GrowthLimiter
from memopt.transforms import adam_bias_correction as adam_bias_correction
from memopt.transforms import clip_by_matrix_rms as clip_by_matrix_rms
from memopt.transforms import in_subspace as in_subspace
from memopt.transforms import limit_norm_growth as limit_norm_growth
from memopt.transforms import normalize_by_group as normalize_by_group
from memopt.transforms import projectors as projectors
from memopt.transforms import recombine as recombine
from memopt.transforms import scale_by_factored_rms as scale_by_factored_rms
from memopt.transforms import scale_by_parameter_rms as scale_by_parameter_rms
from memopt.transforms import scale_by_sign_momentum as scale_by_sign_momentum
from memopt.transforms import scale_by_uncorrected_adam as scale_by_uncorrected_adam
