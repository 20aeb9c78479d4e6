"""Schedules of the learning rate and of the batch size."""

from memopt.schedules.batch_size import BATCH_SHAPES as BATCH_SHAPES
from memopt.schedules.batch_size import BatchShape as BatchShape
from memopt.schedules.batch_size import batch_names as batch_names
from memopt.schedules.batch_size import batch_schedule as batch_schedule
from memopt.schedules.warmup import available as available
from memopt.schedules.warmup import schedule as schedule
