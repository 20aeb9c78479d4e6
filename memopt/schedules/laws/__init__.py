"""Laws of learning rate, batch and loss, each with its source and its range of validity."""

from memopt.schedules.laws.annealing import AnnealingLaw as AnnealingLaw
from memopt.schedules.laws.annealing import Curve as Curve
from memopt.schedules.laws.annealing import fit_annealing as fit_annealing
from memopt.schedules.laws.batch_rules import AdamSettings as AdamSettings
from memopt.schedules.laws.batch_rules import adam_rule as adam_rule
from memopt.schedules.laws.batch_rules import sqrt_rule as sqrt_rule
from memopt.schedules.laws.critical_batch import critical_batch as critical_batch
from memopt.schedules.laws.fitting import LossFit as LossFit
from memopt.schedules.laws.fitting import Prediction as Prediction
from memopt.schedules.laws.loss_by_steps import StepsLaw as StepsLaw
from memopt.schedules.laws.loss_by_steps import fit_steps_law as fit_steps_law
from memopt.schedules.laws.loss_by_tokens import TokenLaw as TokenLaw
from memopt.schedules.laws.loss_by_tokens import fit_token_law as fit_token_law
from memopt.schedules.laws.noise_scale import NoiseScale as NoiseScale
from memopt.schedules.laws.noise_scale import noise_scale as noise_scale
from memopt.schedules.laws.noise_scale import noise_scale_by_sizes as noise_scale_by_sizes
from memopt.schedules.laws.power_law import power as power
from memopt.schedules.laws.ranges import OutsideRangeWarning as OutsideRangeWarning
from memopt.schedules.laws.step_law import StepLaw as StepLaw
from memopt.schedules.laws.step_law import step_law as step_law
from memopt.schedules.laws.surge import NoiseBatchFit as NoiseBatchFit
from memopt.schedules.laws.surge import fit_noise_batch as fit_noise_batch
from memopt.schedules.laws.surge import surge as surge
from memopt.schedules.laws.surge import surge_limit as surge_limit
from memopt.schedules.laws.surge import surge_peak as surge_peak
from memopt.schedules.laws.time_transfer import time_transfer as time_transfer
