"""Examples of docs/kubernetes.md are values that the chart takes."""

import re

import pytest
import yaml

from deployment.rendering import CHART

PAGE = (CHART.parent / "docs" / "kubernetes.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(# values.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_is_accepted(example, chart):
    assert chart(yaml.safe_load(example)).deployment


def test_all_examples_were_found():
    assert len(EXAMPLES) == PAGE.count("# values") == 7
