"""The pieces chains are made of."""

from memopt.transforms import projectors as projectors
from memopt.transforms import recombine as recombine
from memopt.transforms.adam import adam_bias_correction as adam_bias_correction
from memopt.transforms.adam import scale_by_released_adam as scale_by_released_adam
from memopt.transforms.adam import scale_by_uncorrected_adam as scale_by_uncorrected_adam
from memopt.transforms.clipping import GrowthLimiter as GrowthLimiter
from memopt.transforms.clipping import clip_by_matrix_rms as clip_by_matrix_rms
from memopt.transforms.clipping import limit_norm_growth as limit_norm_growth
from memopt.transforms.clipping import normalize_by_group as normalize_by_group
from memopt.transforms.clipping import scale_by_parameter_rms as scale_by_parameter_rms
from memopt.transforms.factored import scale_by_factored_rms as scale_by_factored_rms
from memopt.transforms.moments import CarryOver as CarryOver
from memopt.transforms.sign_momentum import scale_by_sign_momentum as scale_by_sign_momentum
from memopt.transforms.subspace import in_subspace as in_subspace
