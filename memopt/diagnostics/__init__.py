"""Diagnostics: what an optimizer does to each matrix, recorded while it trains."""

from memopt.diagnostics.functions import codec_error as codec_error
from memopt.diagnostics.functions import directional_sharpness as directional_sharpness
from memopt.diagnostics.functions import singular_values as singular_values
from memopt.diagnostics.functions import stable_rank as stable_rank
from memopt.diagnostics.measures import Measure as Measure
from memopt.diagnostics.measures import measure as measure
from memopt.diagnostics.measures import of_matrices as of_matrices
from memopt.diagnostics.measures import projected_energy as projected_energy
from memopt.diagnostics.measures import rms as rms
from memopt.diagnostics.measures import update_to_weight as update_to_weight
from memopt.diagnostics.recording import DEFAULT as DEFAULT
from memopt.diagnostics.recording import WithDiagnosticsState as WithDiagnosticsState
from memopt.diagnostics.recording import recorded as recorded
from memopt.diagnostics.recording import with_diagnostics as with_diagnostics
