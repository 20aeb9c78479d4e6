"""Schedules of the learning rate and of the batch size."""

from memopt import renamed
from memopt.schedules.batch_size import BATCH_SHAPES as BATCH_SHAPES
from memopt.schedules.batch_size import batch_names as batch_names
from memopt.schedules.batch_size import batch_schedule as batch_schedule
from memopt.schedules.learning_rate import in_steps as in_steps
from memopt.schedules.learning_rate import names as names
from memopt.schedules.learning_rate import schedule as schedule
from memopt.schedules.shapes import SHAPES as SHAPES
from memopt.schedules.shapes import Shape as Shape
from memopt.schedules.shapes import Span as Span
from memopt.schedules.shapes import register as register

__getattr__ = renamed.finder("memopt.schedules", globals(), {"available": "names"})
