"""The table of schedules in docs/learning_rates.md."""

import re
from pathlib import Path

from memopt.schedules import SHAPES

DOCS = (Path(__file__).parents[2] / "docs/learning_rates.md").read_text()


def test_it_has_each_schedule_with_its_options_and_when_to_choose_it():
    rows = re.findall(r"^\| `(\w+)` \|.*?\|(.*?)\| (.*?) \|$", DOCS, re.MULTILINE)
    assert [name for name, *_ in rows] == list(SHAPES)
    for name, options, when in rows:
        assert re.findall(r"`(\w+)`", options) == list(SHAPES[name].defaults)
        assert when.split()[:3] == SHAPES[name].when.split()[:3]
