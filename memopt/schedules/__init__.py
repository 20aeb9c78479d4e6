"""Learning-rate schedules."""

from memopt.schedules.warmup import available as available
from memopt.schedules.warmup import schedule as schedule
