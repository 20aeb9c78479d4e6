"""The transformations that the optimizers' chains are made of."""

from memopt import renamed
from memopt.transforms import projectors as projectors
from memopt.transforms import recombine as recombine
from memopt.transforms.accumulation import AccumulateByScheduleState as AccumulateByScheduleState
from memopt.transforms.accumulation import AccumulateState as AccumulateState
from memopt.transforms.accumulation import accumulate as accumulate
from memopt.transforms.accumulation import accumulate_in_subspace as accumulate_in_subspace
from memopt.transforms.adam import ScaleByAdamAtan2State as ScaleByAdamAtan2State
from memopt.transforms.adam import ScaleByRawAmsgradState as ScaleByRawAmsgradState
from memopt.transforms.adam import ScaleByUncorrectedAdamState as ScaleByUncorrectedAdamState
from memopt.transforms.adam import adam_bias_correction as adam_bias_correction
from memopt.transforms.adam import scale_by_adam_atan2 as scale_by_adam_atan2
from memopt.transforms.adam import scale_by_raw_amsgrad as scale_by_raw_amsgrad
from memopt.transforms.adam import scale_by_released_adam as scale_by_released_adam
from memopt.transforms.adam import scale_by_uncorrected_adam as scale_by_uncorrected_adam
from memopt.transforms.block_cycle import CycleBlocksState as CycleBlocksState
from memopt.transforms.block_cycle import cycle_blocks as cycle_blocks
from memopt.transforms.cached_gradient import cached_value_and_grad as cached_value_and_grad
from memopt.transforms.cover import ScaleByMatrixSm3State as ScaleByMatrixSm3State
from memopt.transforms.cover import scale_by_matrix_sm3 as scale_by_matrix_sm3
from memopt.transforms.eigenbasis import InEigenbasisState as InEigenbasisState
from memopt.transforms.eigenbasis import in_eigenbasis as in_eigenbasis
from memopt.transforms.factored import ScaleByConfidenceState as ScaleByConfidenceState
from memopt.transforms.factored import (
    ScaleByFactoredMatrixRmsState as ScaleByFactoredMatrixRmsState,
)
from memopt.transforms.factored import scale_by_confidence as scale_by_confidence
from memopt.transforms.factored import scale_by_factored_matrix_rms as scale_by_factored_matrix_rms
from memopt.transforms.fraction import ClipFirstMomentState as ClipFirstMomentState
from memopt.transforms.fraction import clip_by_fraction as clip_by_fraction
from memopt.transforms.fraction import clip_first_moment as clip_first_moment
from memopt.transforms.gradient_norm import ClipByGradientNormState as ClipByGradientNormState
from memopt.transforms.gradient_norm import clip_by_gradient_norm as clip_by_gradient_norm
from memopt.transforms.grouped import ScaleByGroupedRmsState as ScaleByGroupedRmsState
from memopt.transforms.grouped import choose_groups as choose_groups
from memopt.transforms.grouped import scale_by_grouped_rms as scale_by_grouped_rms
from memopt.transforms.hutchinson import ScaleByHutchinsonState as ScaleByHutchinsonState
from memopt.transforms.hutchinson import scale_by_hutchinson as scale_by_hutchinson
from memopt.transforms.kept_change import KeepLargestChangeState as KeepLargestChangeState
from memopt.transforms.kept_change import keep_largest_change as keep_largest_change
from memopt.transforms.kronecker import (
    ScaleByKroneckerInversesState as ScaleByKroneckerInversesState,
)
from memopt.transforms.kronecker import scale_by_kronecker_inverses as scale_by_kronecker_inverses
from memopt.transforms.layer_statistics import LayerStatistics as LayerStatistics
from memopt.transforms.layer_statistics import observe as observe
from memopt.transforms.layer_statistics import zero_statistics as zero_statistics
from memopt.transforms.matrix_rms import clip_by_matrix_rms as clip_by_matrix_rms
from memopt.transforms.matrix_rms import normalize_by_group as normalize_by_group
from memopt.transforms.matrix_rms import scale_by_parameter_rms as scale_by_parameter_rms
from memopt.transforms.moments import CarryOver as CarryOver
from memopt.transforms.norm_growth import GrowthLimiter as GrowthLimiter
from memopt.transforms.norm_growth import LimitNormGrowthState as LimitNormGrowthState
from memopt.transforms.norm_growth import limit_norm_growth as limit_norm_growth
from memopt.transforms.normalization import ScaleByNeuronRmsState as ScaleByNeuronRmsState
from memopt.transforms.normalization import (
    ScaleByRowsAndColumnsState as ScaleByRowsAndColumnsState,
)
from memopt.transforms.normalization import normalize_neurons as normalize_neurons
from memopt.transforms.normalization import scale_by_neuron_rms as scale_by_neuron_rms
from memopt.transforms.normalization import scale_by_rows_and_columns as scale_by_rows_and_columns
from memopt.transforms.normalization import sinkhorn as sinkhorn
from memopt.transforms.oasis import ScaleByOasisState as ScaleByOasisState
from memopt.transforms.oasis import scale_by_oasis as scale_by_oasis
from memopt.transforms.orthogonalization import newton_schulz as newton_schulz
from memopt.transforms.orthogonalization import orthogonalize as orthogonalize
from memopt.transforms.orthogonalization import scale_by_matrix_shape as scale_by_matrix_shape
from memopt.transforms.past_norms import ScaleByPastNormsState as ScaleByPastNormsState
from memopt.transforms.past_norms import scale_by_past_norms as scale_by_past_norms
from memopt.transforms.past_rms import ClipByStepState as ClipByStepState
from memopt.transforms.past_rms import ScaleByPastRmsState as ScaleByPastRmsState
from memopt.transforms.past_rms import clip_by_step as clip_by_step
from memopt.transforms.past_rms import scale_by_past_rms as scale_by_past_rms
from memopt.transforms.per_matrix import per_matrix as per_matrix
from memopt.transforms.placed_update import reshard_update as reshard_update
from memopt.transforms.placed_update import unshard_short_side as unshard_short_side
from memopt.transforms.polyak import ScaleByPolyakState as ScaleByPolyakState
from memopt.transforms.polyak import scale_by_polyak as scale_by_polyak
from memopt.transforms.sign_momentum import ScaleBySignMomentumState as ScaleBySignMomentumState
from memopt.transforms.sign_momentum import scale_by_sign_momentum as scale_by_sign_momentum
from memopt.transforms.skip_nonfinite import (
    SkipNonfiniteMatricesState as SkipNonfiniteMatricesState,
)
from memopt.transforms.skip_nonfinite import SkipNonfiniteState as SkipNonfiniteState
from memopt.transforms.skip_nonfinite import skip_nonfinite as skip_nonfinite
from memopt.transforms.stored_update import KeepUpdateState as KeepUpdateState
from memopt.transforms.stored_update import keep_update as keep_update
from memopt.transforms.stored_update import predict_parameters as predict_parameters
from memopt.transforms.subspace import InSubspaceState as InSubspaceState
from memopt.transforms.subspace import in_subspace as in_subspace
from memopt.transforms.task_moments import ScaleByTaskMomentsState as ScaleByTaskMomentsState
from memopt.transforms.task_moments import scale_by_task_moments as scale_by_task_moments
from memopt.transforms.trust_ratio import (
    scale_by_matrix_trust_ratio as scale_by_matrix_trust_ratio,
)
from memopt.transforms.while_loss_falls import WhileLossFallsState as WhileLossFallsState
from memopt.transforms.while_loss_falls import while_loss_falls as while_loss_falls
from memopt.transforms.width import WidthRole as WidthRole
from memopt.transforms.width import scale_by_width as scale_by_width
from memopt.transforms.width import scale_initial_by_width as scale_initial_by_width
from memopt.transforms.width import width_exponents as width_exponents
from memopt.transforms.width import width_roles as width_roles
from memopt.transforms.wrappers import CautiousDecayState as CautiousDecayState
from memopt.transforms.wrappers import CautiousState as CautiousState
from memopt.transforms.wrappers import HyperballState as HyperballState
from memopt.transforms.wrappers import cautious as cautious
from memopt.transforms.wrappers import cautious_decay as cautious_decay
from memopt.transforms.wrappers import hyperball as hyperball

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
