"""Laws of learning rate, batch and loss, each with its source and its range of validity."""

from memopt.schedules.laws.annealing import AnnealingLaw as AnnealingLaw
from memopt.schedules.laws.annealing import Curve as Curve
from memopt.schedules.laws.annealing import fit_annealing as fit_annealing
from memopt.schedules.laws.noise_scale import NoiseScale as NoiseScale
from memopt.schedules.laws.noise_scale import noise_scale as noise_scale
from memopt.schedules.laws.noise_scale import noise_scale_by_sizes as noise_scale_by_sizes
