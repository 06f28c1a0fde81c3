"""The forecast of a study against what its steps then do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import images

from lsa import probe, project
from lsa.landscape import Landscape
from lsa.landscape.derivatives import budget
from lsa.maths.spectra import counts
from lsa.probe import Sizes, Work, between
from lsa.runtime.errors import InputError
from lsa.studies import cost, plan, study

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
AT = Sizes(dimension=1000, samples=100, training=800, validation=200)


@pytest.mark.parametrize("name", list(probe.modules()))
def test_every_probe_says_what_it_will_compute(name):
    declared = probe.find(name)
    assert declared.work is not None
    options = {option.name: option.default for option in declared.options.values()}
    work = declared.work(AT, **options)
    assert work.vectors > 0 and work.losses + work.gradients + work.products > 0


def test_for_sgd_the_hessian_that_it_feels_costs_nothing_more():
    declared = probe.find("preconditioned")
    of = {
        name: declared.work(dataclasses.replace(AT, optimizer=name), k=3, tol=1e-3)
        for name in ("SGD", "Adam")
    }
    felt = counts.upper(3, 1e-3, AT.dimension).usual
    assert of["Adam"].products - of["SGD"].products == felt * AT.samples


def test_the_work_of_a_line_is_what_it_evaluates(workplace, monkeypatch):
    """Interpolation is deterministic, so its count can be held against the calls themselves."""
    declared = probe.find("interpolation")
    seen = 0
    per_sample = Landscape.per_sample

    def counted(self, theta):
        nonlocal seen
        seen += self.n_samples
        return per_sample(self, theta)

    with study.study("tiny"):
        ends = [study.step("train", optimizer=name) for name in ("sgd", "adamw")]
        assert all(end.result.metrics for end in ends)  # trained before anything is counted
        monkeypatch.setattr(Landscape, "per_sample", counted)
        study.step("interpolation", *ends, points=9, align="none")
    at = Sizes(dimension=1, samples=64, training=200, validation=100)
    assert declared.work(at, points=9, align="none").losses == seen == 7 * 64 + 9 * 100


def test_the_losses_of_sharpness_are_those_that_it_evaluates(monkeypatch):
    landscape, seen = Landscape(*images()), 0

    def count(name: str) -> None:
        own = getattr(Landscape, name)

        def counted(self: Landscape, theta: torch.Tensor) -> object:
            nonlocal seen
            seen += self.n_samples
            return own(self, theta)

        monkeypatch.setattr(Landscape, name, counted)

    count("loss")
    count("losses")
    monkeypatch.setattr(budget, "_configured", budget.Settings(check=False))
    declared = probe.find("sharpness")
    declared(landscape=landscape, theta=landscape.theta, probes=3, starts=1)
    options = {option.name: option.default for option in declared.options.values()}
    at = dataclasses.replace(AT, samples=landscape.n_samples)
    assert declared.work(at, **{**options, "probes": 3, "starts": 1}).losses == seen


def test_costs_are_work_times_rates():
    rates = cost.Rates(1.0, 3.0, 10.0, 5.0, 2.0, 6.0, memory=500, sizes=AT, row=3.0, check=7.0)
    declared = probe.Probe(
        "p",
        lambda: None,
        (),
        {},
        (),
        lambda at, k: between(
            lambda n: Work(1, 2, n * at.samples, 4, 8, 9, 70, 4, rows=5), (1, k, 3 * k)
        ),
    )
    found = cost.probing(declared, {"k": 2}, rates)
    assert (
        found.seconds == cost.STEP + 1 + 6 + 2000 + 20 + 16 + 54 + 15 + 7
        and found.memory == 500 + 70 * 1000 * 4
    )
    assert (found.seconds - found.least, found.most - found.seconds) == (1000, 4000)
    grown = cost.probing(declared, {"k": 2}, dataclasses.replace(rates, before=100, new=0.5))
    assert grown.least - found.least == grown.most - found.most == (found.memory - 100) / 2
    for spare, kept in ((10**6, 2 * 50 * 100), (4000, 6000)):  # the second finds half as much
        graphs = dataclasses.replace(rates, graphs=50.0, spare=spare)
        assert cost.probing(declared, {"k": 2}, graphs).memory == found.memory + kept
        passing = dataclasses.replace(graphs, chunk=8)
        assert cost.probing(declared, {"k": 2}, passing).memory == found.memory + kept + 400
    double = probe.Probe(
        "p", lambda: None, (), {}, (), lambda at: Work(gauss_newton=1, vectors=7, width=8)
    )
    graphs = dataclasses.replace(rates, graphs=50.0, spare=10**6, chunk=8)
    kept = 2 * (7 * 1000 * 4 + 2 * 50 * 100 + 50 * 8)
    assert cost.probing(double, {}, graphs).memory == 500 + kept
    silent = probe.Probe("p", lambda: None, (), {}, ())
    assert cost.probing(silent, {}, rates) is None


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


def test_a_rate_is_a_median_so_that_neither_a_slow_nor_a_fast_spell_decides():
    clock = Clock()
    seconds = iter([0.3, 0.0, 0.02, 0.04, 0.06, 0.2])  # the first is a call that warms up
    (found,) = cost._seconds([lambda: clock.sleep(next(seconds))], clock.perf_counter)
    assert found == pytest.approx(0.04)


def test_a_long_task_is_called_once_and_a_short_one_beside_it_again():
    clock, called = Clock(), []
    seconds = {"long": iter([90.0]), "short": iter([0.4, 0.05, 0.06, 0.05, 0.05, 0.05])}

    def task(name: str) -> None:
        called.append(name)
        clock.sleep(next(seconds[name]))

    works = [lambda: task("long"), lambda: task("short")]
    assert cost._seconds(works, clock.perf_counter) == pytest.approx([90.0, 0.05])
    assert called.count("long") == 1 and called.count("short") == 1 + cost.ROUNDS


def test_the_rate_of_products_by_differences_is_that_of_two_gradients(monkeypatch):
    """The first looks for its step, with five times as many. The clock counts gradients."""
    landscape = Landscape(*images(), products="gradients")
    evaluations = 0
    own = Landscape._trained

    def counted(self: Landscape, theta: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        return own(self, theta)

    monkeypatch.setattr(Landscape, "_trained", counted)
    n = landscape.n_samples
    rates = cost.measured(landscape, landscape.theta, n, n, clock=lambda: float(evaluations))
    assert rates.product * n == 2


def test_where_there_is_no_gauss_newton_part_a_hessian_product_is_its_price(monkeypatch):
    def refused(*_):
        raise InputError("there is no Gauss–Newton part")

    monkeypatch.setattr(Landscape, "gauss_newton", lambda *_: refused)
    landscape = Landscape(*images())
    rates = cost.measured(landscape, landscape.theta, landscape.n_samples, 1)
    assert rates.gauss_newton == pytest.approx(rates.product, rel=1.0)


def test_a_forecast_prices_what_would_run_and_nothing_else(workplace):
    setting = project.load("tiny")
    outlook = plan.outlook(setting)
    before = plan.forecast(setting, outlook)
    assert before.seconds.keys() == {"train", "lanczos"} and before.unknown == []
    assert before.total == pytest.approx(2 * sum(before.seconds.values()))
    with study.study(setting) as running:
        plan.run(setting, running)
    assert plan.forecast(setting, plan.outlook(setting)) == plan.Forecast({}, 0.0, {}, [])
    again = setting.model_copy(update={"seeds": [1]})
    assert plan.forecast(again, plan.outlook(again)).seconds.keys() == {"train", "lanczos"}


def test_rates_are_positive_and_a_product_costs_more_than_a_loss():
    setting = project.load("digits")
    rates = cost.rates(setting, setting.recipe("sgd"), "cpu")
    assert 0 < rates.loss < rates.product and 0 < rates.gradient
    assert rates.sizes.samples == 512 and rates.sizes.dimension > 1000
    assert rates.sizes.parameters[:2] == ("0.weight", "0.bias")
    assert torch.get_num_threads() >= 1
