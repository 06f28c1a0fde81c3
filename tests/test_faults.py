"""The faults of docs/reliability.md, each injected once; and the page that tells of them.

`python -m tests.faults` injects them as often as the page says.
"""

from __future__ import annotations

import pytest
from faults import Row, clients, network, server, suite
from faults import __main__ as page


def test_a_module_measured_again_replaces_its_rows_alone(tmp_path):
    first = page.table([Row("fault", "how | where", 3, "nothing", "a line")])
    other = page.table([Row("other", "so", 1, "nothing", "nothing")])
    file = tmp_path / "page.md"
    file.write_text(page.page({"Disks are full or cannot be written": first}))
    sections = page.written(file)
    assert "| fault | how \\| where | 3 | nothing | a line |" in file.read_text()
    file.write_text(page.page({**sections, "The server dies": other}))
    again = page.written(file)
    assert list(again) == ["The server dies", "Disks are full or cannot be written"]
    assert again["Disks are full or cannot be written"].strip() == first.strip()
    file.write_text(page.page(again))
    assert page.written(file) == again and file.read_text().startswith(page.TOP)


def test_every_fault_on_the_page_has_cost_nothing():
    written = page.written(page.PAGE)
    assert {page.SECTIONS[name] for name in ("server", "clients", "kills")} <= set(written)
    rows = [line.split(" | ") for text in written.values() for line in text.splitlines()]
    lost = [cells[3] for cells in rows if len(cells) == 5 and cells[2].isdigit()]
    assert len(lost) >= 9 and all(cell.startswith("nothing") for cell in lost)


def test_the_tests_that_rows_name_are_there():
    for files, which in suite.SHOWN:
        for file in files.split():
            text = (suite.ROOT / file).read_text()
            words = [word for word in which.split() if word not in ("or", "and", "not")]
            assert not words or any(word in text for word in words), (file, which)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_server_that_is_started_again_is_not_noticed(tmp_path):
    server.in_training(tmp_path, 1)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_server_that_is_gone_costs_nothing_but_time(tmp_path):
    server.for_good(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_training_that_is_stopped_goes_on(tmp_path):
    clients.stopped(tmp_path, 1)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_training_that_is_killed_as_it_logs_leaves_nothing_half_made(tmp_path):
    clients.killed_at_the_end(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.full
@pytest.mark.parametrize("times", [1, 2])
def test_requests_that_fail_cost_nothing(tmp_path, times):
    network.at_one_request(tmp_path / "one", times * len(network.FAULTS))


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_study_of_whose_requests_every_fifth_fails_loses_nothing(tmp_path):
    network.at_every(tmp_path, ((5, "lose"),))


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_clients_at_once_lose_nothing(tmp_path):
    clients.crowd(tmp_path, 4, served=True)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_clocks_that_differ_change_no_number(tmp_path):
    clients.wrong_clock(tmp_path)
