"""Memory-efficient optimizers for large models in JAX, as composable Optax chains."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from memopt import diagnostics as diagnostics
from memopt import integrations as integrations
from memopt import renamed
from memopt import schedules as schedules
from memopt import transforms as transforms
from memopt.errors import IncompatiblePairingError as IncompatiblePairingError
from memopt.matrices import Layout as Layout
from memopt.matrices import Matrix as Matrix
from memopt.matrices import every_matrix as every_matrix
from memopt.matrices import hidden_matrices as hidden_matrices
from memopt.matrices import out_in as out_in
from memopt.optimizers import *  # noqa: F403 (methods by their names)
from memopt.parameters import Parameter as Parameter
from memopt.state import codecs as codecs
from memopt.state.bytes import StateBytes as StateBytes
from memopt.state.bytes import state_bytes as state_bytes
from memopt.state.describe import Description as Description
from memopt.state.describe import describe as describe
from memopt.state.growth import grow_depth as grow_depth
from memopt.state.quantized_params import Quantized as Quantized
from memopt.state.quantized_params import apply_rounded_updates as apply_rounded_updates
from memopt.state.quantized_params import dequantize_params as dequantize_params
from memopt.state.quantized_params import quantize_params as quantize_params
from memopt.state.quantized_state import QuantizedState as QuantizedState
from memopt.state.quantized_state import quantize_state as quantize_state
from memopt.state.sharding import init_sharded as init_sharded
from memopt.state.sharding import state_sharding as state_sharding
from memopt.transforms import AccumulateByScheduleState as AccumulateByScheduleState
from memopt.transforms import AccumulateState as AccumulateState
from memopt.transforms import CarryOver as CarryOver
from memopt.transforms import CautiousDecayState as CautiousDecayState
from memopt.transforms import CautiousState as CautiousState
from memopt.transforms import ClipByGradientNormState as ClipByGradientNormState
from memopt.transforms import ClipByStepState as ClipByStepState
from memopt.transforms import ClipFirstMomentState as ClipFirstMomentState
from memopt.transforms import CycleBlocksState as CycleBlocksState
from memopt.transforms import GrowthLimiter as GrowthLimiter
from memopt.transforms import HyperballState as HyperballState
from memopt.transforms import InEigenbasisState as InEigenbasisState
from memopt.transforms import InSubspaceState as InSubspaceState
from memopt.transforms import KeepLargestChangeState as KeepLargestChangeState
from memopt.transforms import KeepUpdateState as KeepUpdateState
from memopt.transforms import LayerStatistics as LayerStatistics
from memopt.transforms import LimitNormGrowthState as LimitNormGrowthState
from memopt.transforms import ScaleByAdamAtan2State as ScaleByAdamAtan2State
from memopt.transforms import ScaleByConfidenceState as ScaleByConfidenceState
from memopt.transforms import ScaleByFactoredMatrixRmsState as ScaleByFactoredMatrixRmsState
from memopt.transforms import ScaleByGroupedRmsState as ScaleByGroupedRmsState
from memopt.transforms import ScaleByHutchinsonState as ScaleByHutchinsonState
from memopt.transforms import ScaleByKroneckerInversesState as ScaleByKroneckerInversesState
from memopt.transforms import ScaleByMatrixSm3State as ScaleByMatrixSm3State
from memopt.transforms import ScaleByNeuronRmsState as ScaleByNeuronRmsState
from memopt.transforms import ScaleByOasisState as ScaleByOasisState
from memopt.transforms import ScaleByPastNormsState as ScaleByPastNormsState
from memopt.transforms import ScaleByPastRmsState as ScaleByPastRmsState
from memopt.transforms import ScaleByPolyakState as ScaleByPolyakState
from memopt.transforms import ScaleByRawAmsgradState as ScaleByRawAmsgradState
from memopt.transforms import ScaleByRowsAndColumnsState as ScaleByRowsAndColumnsState
from memopt.transforms import ScaleBySignMomentumState as ScaleBySignMomentumState
from memopt.transforms import ScaleByTaskMomentsState as ScaleByTaskMomentsState
from memopt.transforms import ScaleByUncorrectedAdamState as ScaleByUncorrectedAdamState
from memopt.transforms import SkipNonfiniteMatricesState as SkipNonfiniteMatricesState
from memopt.transforms import SkipNonfiniteState as SkipNonfiniteState
from memopt.transforms import WhileLossFallsState as WhileLossFallsState
from memopt.transforms import WidthRole as WidthRole
from memopt.transforms import accumulate as accumulate
from memopt.transforms import accumulate_in_subspace as accumulate_in_subspace
from memopt.transforms import adam_bias_correction as adam_bias_correction
from memopt.transforms import cached_value_and_grad as cached_value_and_grad
from memopt.transforms import cautious as cautious
from memopt.transforms import cautious_decay as cautious_decay
from memopt.transforms import choose_groups as choose_groups
from memopt.transforms import clip_by_fraction as clip_by_fraction
from memopt.transforms import clip_by_gradient_norm as clip_by_gradient_norm
from memopt.transforms import clip_by_matrix_rms as clip_by_matrix_rms
from memopt.transforms import clip_by_step as clip_by_step
from memopt.transforms import clip_first_moment as clip_first_moment
from memopt.transforms import cycle_blocks as cycle_blocks
from memopt.transforms import hyperball as hyperball
from memopt.transforms import in_eigenbasis as in_eigenbasis
from memopt.transforms import in_subspace as in_subspace
from memopt.transforms import keep_largest_change as keep_largest_change
from memopt.transforms import keep_update as keep_update
from memopt.transforms import limit_norm_growth as limit_norm_growth
from memopt.transforms import newton_schulz as newton_schulz
from memopt.transforms import normalize_by_group as normalize_by_group
from memopt.transforms import normalize_neurons as normalize_neurons
from memopt.transforms import observe as observe
from memopt.transforms import orthogonalize as orthogonalize
from memopt.transforms import per_matrix as per_matrix
from memopt.transforms import predict_parameters as predict_parameters
from memopt.transforms import projectors as projectors
from memopt.transforms import recombine as recombine
from memopt.transforms import reshard_update as reshard_update
from memopt.transforms import scale_by_adam_atan2 as scale_by_adam_atan2
from memopt.transforms import scale_by_confidence as scale_by_confidence
from memopt.transforms import scale_by_factored_matrix_rms as scale_by_factored_matrix_rms
from memopt.transforms import scale_by_grouped_rms as scale_by_grouped_rms
from memopt.transforms import scale_by_hutchinson as scale_by_hutchinson
from memopt.transforms import scale_by_kronecker_inverses as scale_by_kronecker_inverses
from memopt.transforms import scale_by_matrix_shape as scale_by_matrix_shape
from memopt.transforms import scale_by_matrix_sm3 as scale_by_matrix_sm3
from memopt.transforms import scale_by_matrix_trust_ratio as scale_by_matrix_trust_ratio
from memopt.transforms import scale_by_neuron_rms as scale_by_neuron_rms
from memopt.transforms import scale_by_oasis as scale_by_oasis
from memopt.transforms import scale_by_parameter_rms as scale_by_parameter_rms
from memopt.transforms import scale_by_past_norms as scale_by_past_norms
from memopt.transforms import scale_by_past_rms as scale_by_past_rms
from memopt.transforms import scale_by_polyak as scale_by_polyak
from memopt.transforms import scale_by_raw_amsgrad as scale_by_raw_amsgrad
from memopt.transforms import scale_by_released_adam as scale_by_released_adam
from memopt.transforms import scale_by_rows_and_columns as scale_by_rows_and_columns
from memopt.transforms import scale_by_sign_momentum as scale_by_sign_momentum
from memopt.transforms import scale_by_task_moments as scale_by_task_moments
from memopt.transforms import scale_by_uncorrected_adam as scale_by_uncorrected_adam
from memopt.transforms import scale_by_width as scale_by_width
from memopt.transforms import scale_initial_by_width as scale_initial_by_width
from memopt.transforms import sinkhorn as sinkhorn
from memopt.transforms import skip_nonfinite as skip_nonfinite
from memopt.transforms import unshard_short_side as unshard_short_side
from memopt.transforms import while_loss_falls as while_loss_falls
from memopt.transforms import width_exponents as width_exponents
from memopt.transforms import width_roles as width_roles
from memopt.transforms import zero_statistics as zero_statistics

if _TYPE_CHECKING:
    from memopt.planning.plan import plan as plan
    from memopt.planning.plan import plan_step as plan_step

try:
    __version__ = _version("memopt")
except _PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "unknown"

_find_renamed = renamed.finder(
    "memopt",
    globals(),
    {
        "NoSuchPairing": "IncompatiblePairingError",
        "apply_updates": "apply_rounded_updates",
        "scale_by_factored_rms": "scale_by_factored_matrix_rms",
        "scale_by_shape": "scale_by_matrix_shape",
        "update_at": "reshard_update",
        "whole_shorter_sides": "unshard_short_side",
    },
)


def __getattr__(name: str) -> _Any:
    if name in ("plan", "plan_step"):  # which need more than JAX and Optax
        from memopt.planning import plan as planning

        return getattr(planning, name)
    return _find_renamed(name)
