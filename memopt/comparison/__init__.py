"""Optimizers compared, each tuned with the same budget."""

from memopt.comparison.analysis import Summary as Summary
from memopt.comparison.analysis import summarize as summarize
from memopt.comparison.protocol import PRESETS as PRESETS
from memopt.comparison.protocol import Protocol as Protocol
from memopt.comparison.protocol import make_protocol as make_protocol
from memopt.comparison.records import Run as Run
from memopt.comparison.report import write_report as write_report
from memopt.comparison.rows import Row as Row
from memopt.comparison.runner import compare as compare
from memopt.comparison.worker import IncompleteError as IncompleteError
from memopt.comparison.worker import OutOfTimeError as OutOfTimeError
