"""Bad input of every kind gets one line; a fault of the machine leaves the store whole.

The rows of `docs/reliability.md` come of the same functions.
"""

from __future__ import annotations

import copy

import pytest
import yaml
from faults import checkpoints, disk, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
documents = st.recursive(
    scalars,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(scalars, inside, max_size=4),
    max_leaves=12,
)
places = st.sampled_from(list(inputs.places(inputs.BASE)))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=places, value=documents)
def test_anything_at_any_place_of_a_project_is_taken_or_refused_in_one_line(
    tmp_path_factory, place, value
):
    content = copy.deepcopy(inputs.replaced(place, value))
    file = tmp_path_factory.mktemp("project") / "p.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    inputs.refusal(file)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_in_place_of_a_project_is_refused_in_one_line(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("project") / "p.yaml"
    file.write_text(text, encoding="utf-8")
    assert inputs.refusal(file)


def test_malformed_projects_and_options_are_refused(tmp_path):
    refused, _ = inputs.projects(tmp_path, every=4)
    assert refused > 200
    assert inputs.options() > 200


def test_malformed_command_lines_get_one_line_and_exit_code_2(workplace):
    assert inputs.commands() > 30


@pytest.mark.full
def test_every_malformed_project_and_checkpoint(tmp_path):
    rows = [*inputs.rows(tmp_path), *checkpoints.rows(tmp_path / "checkpoints")]
    assert {row.lost for row in rows} == {"nothing"}


@pytest.mark.full
def test_where_no_file_may_grow_the_store_stays_whole(tmp_path):
    assert len(disk.too_large(tmp_path)) == len(disk.LIMITS)


@pytest.mark.full
@pytest.mark.skipif(not disk.mountable(), reason="only root can mount a small disk")
@pytest.mark.parametrize("left", disk.FREE[::4])
def test_a_full_disk_leaves_the_store_whole(tmp_path, left):
    assert len(disk.full(tmp_path, [left])) == 2


@pytest.mark.full
@pytest.mark.skipif(not disk.mountable(), reason="only root can mount a small disk")
def test_a_read_only_disk_leaves_the_store_whole(tmp_path):
    assert len(disk.read_only(tmp_path)) == 2
