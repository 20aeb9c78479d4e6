"""The transformations that the optimizers' chains are made of."""

from memopt import renamed
from memopt.transforms import projectors as projectors
from memopt.transforms import recombine as recombine
from memopt.transforms.accumulation import AccumulateByScheduleState as AccumulateByScheduleState
from memopt.transforms.accumulation import AccumulateState as AccumulateState
from memopt.transforms.accumulation import accumulate as accumulate
from memopt.transforms.accumulation import accumulate_in_subspace as accumulate_in_subspace
from memopt.transforms.adam import ScaleByUncorrectedAdamState as ScaleByUncorrectedAdamState
from memopt.transforms.adam import adam_bias_correction as adam_bias_correction
from memopt.transforms.adam import scale_by_released_adam as scale_by_released_adam
from memopt.transforms.adam import scale_by_uncorrected_adam as scale_by_uncorrected_adam
from memopt.transforms.cached_gradient import cached_value_and_grad as cached_value_and_grad
from memopt.transforms.factored import (
    ScaleByFactoredMatrixRmsState as ScaleByFactoredMatrixRmsState,
)
from memopt.transforms.factored import scale_by_factored_matrix_rms as scale_by_factored_matrix_rms
from memopt.transforms.gradient_norm import ClipByGradientNormState as ClipByGradientNormState
from memopt.transforms.gradient_norm import clip_by_gradient_norm as clip_by_gradient_norm
from memopt.transforms.kept_change import KeepLargestChangeState as KeepLargestChangeState
from memopt.transforms.kept_change import keep_largest_change as keep_largest_change
from memopt.transforms.matrix_rms import clip_by_matrix_rms as clip_by_matrix_rms
from memopt.transforms.matrix_rms import normalize_by_group as normalize_by_group
from memopt.transforms.matrix_rms import scale_by_parameter_rms as scale_by_parameter_rms
from memopt.transforms.moments import CarryOver as CarryOver
from memopt.transforms.norm_growth import GrowthLimiter as GrowthLimiter
from memopt.transforms.norm_growth import LimitNormGrowthState as LimitNormGrowthState
from memopt.transforms.norm_growth import limit_norm_growth as limit_norm_growth
from memopt.transforms.orthogonalization import newton_schulz as newton_schulz
from memopt.transforms.orthogonalization import orthogonalize as orthogonalize
from memopt.transforms.orthogonalization import scale_by_matrix_shape as scale_by_matrix_shape
from memopt.transforms.per_matrix import per_matrix as per_matrix
from memopt.transforms.placed_update import reshard_update as reshard_update
from memopt.transforms.placed_update import unshard_short_side as unshard_short_side
from memopt.transforms.sign_momentum import ScaleBySignMomentumState as ScaleBySignMomentumState
from memopt.transforms.sign_momentum import scale_by_sign_momentum as scale_by_sign_momentum
from memopt.transforms.skip_nonfinite import (
    SkipNonfiniteMatricesState as SkipNonfiniteMatricesState,
)
from memopt.transforms.skip_nonfinite import SkipNonfiniteState as SkipNonfiniteState
from memopt.transforms.skip_nonfinite import skip_nonfinite as skip_nonfinite
from memopt.transforms.subspace import InSubspaceState as InSubspaceState
from memopt.transforms.subspace import in_subspace as in_subspace

__getattr__ = renamed.finder(
    "memopt.transforms",
    globals(),
    {
        "scale_by_factored_rms": "scale_by_factored_matrix_rms",
        "scale_by_shape": "scale_by_matrix_shape",
        "update_at": "reshard_update",
        "whole_shorter_sides": "unshard_short_side",
    },
)
