from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from lsa.landscape import Landscape, flatten, passes
from lsa.landscape.derivatives import budget, modes
from lsa.runtime.errors import InputError


@pytest.mark.parametrize(
    ("usual", "most", "seconds", "expected", "asked"),
    [
        (32, 512, lambda size: 1 / size, 512, [32, 64, 128, 256, 512]),
        (32, 100, lambda size: 1 / size, 64, [32, 64]),
        (32, 512, lambda size: float(size), 1, [32, 64, 16, 8, 4, 2, 1]),
        (32, 512, lambda size: abs(size - 128) + 1.0, 128, [32, 64, 128, 256]),
        (32, 512, lambda size: 1.0 - size * 1e-5, 32, [32, 64, 16]),  # too little to be a gain
        (32, 512, lambda size: torch.inf if size > 32 else 1.0, 32, [32, 64, 16]),
        (1, 1, lambda size: 1.0, 1, [1]),
    ],
)
def test_the_fastest_size_is_found_by_doubling_or_halving(usual, most, seconds, expected, asked):
    sizes: list[int] = []

    def timed(size: int) -> float:
        sizes.append(size)
        return seconds(size)

    assert passes.fastest(timed, usual, most) == expected
    assert sizes == asked


@pytest.fixture(autouse=True)
def worth_it(monkeypatch, tmp_path) -> None:
    """Whatever the work, measured, into a folder of its own; PyTorch says it has four threads."""
    monkeypatch.setenv("LSA_CACHE", str(tmp_path / "cache"))
    for name in (budget.CHUNK, budget.LAYOUT, budget.MODE, budget.THREADS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(passes, "WORTH", 0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # or four would stay


@pytest.fixture
def landscape() -> Landscape:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    return Landscape(model.double(), torch.randn(40, 3).double(), torch.arange(40) % 2)


@pytest.fixture
def images() -> Landscape:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )
    return Landscape(model, torch.randn(8, 2, 4, 4), torch.arange(8) % 2)


def clock(
    monkeypatch, per_sample: dict[int, float], threads: dict[int, float] | None = None
) -> list[passes.Choice]:
    """Seconds per sample as given instead of measured ones; what they were asked for."""
    asked: list[passes.Choice] = []

    def seconds(_: Landscape, choice: passes.Choice) -> float:
        asked.append(choice)
        return per_sample.get(choice.chunk, 1.0) * (threads or {}).get(choice.threads, 1.0)

    monkeypatch.setattr(passes, "_seconds", seconds)
    return asked


def test_it_is_measured_once_for_a_network_and_shape(landscape, monkeypatch, tmp_path):
    asked = clock(monkeypatch, {40: 1.0, 20: 0.5, 10: 0.2, 5: 0.3}, {4: 1.0, 2: 0.8, 1: 1.0})
    choice = passes.chosen(landscape)
    assert choice == (10, "channels_last", 2, "double_backward")
    assert [(c.chunk, c.threads) for c in asked] == [  # each after the usual one
        *((size, 4) for size in (40, 20, 40, 10, 40, 5)),
        *((10, 4) for _ in range(2) for _ in ("usual", "other mode")),
        *((10, threads) for threads in (4, 2, 4, 1)),
    ]
    found, theta = choice.applied(landscape), flatten(landscape.model)
    assert found.chunk == 10
    assert torch.allclose(
        found.hessian(theta)(theta), landscape.hessian(theta)(theta), rtol=1e-12, atol=1e-15
    )
    before = len(asked)
    assert passes.chosen(landscape) == choice and len(asked) == before  # kept
    (file,) = (tmp_path / "cache" / "passes").iterdir()
    assert json.loads(file.read_text())["shapes"] == [[4, 3], [4], [2, 4], [2]]
    passes.chosen(landscape.with_data(landscape.x[:20], landscape.y[:20]))
    assert len(asked) > before  # another shape


def test_short_work_and_a_user_who_wants_the_rules_are_not_measured(
    landscape, monkeypatch, tmp_path
):
    asked = clock(monkeypatch, {40: 1.0, 20: 0.5, 10: 0.6})
    usual = (512, "channels_last", 4, "double_backward")
    monkeypatch.setattr(passes, "WORTH", 60.0)
    assert passes.chosen(landscape) == usual
    monkeypatch.setattr(passes, "WORTH", 0.0)
    monkeypatch.setenv(budget.CHUNK, budget.RULES)
    assert passes.chosen(landscape) == usual and not asked
    assert passes.Choice(*usual).applied(landscape) is landscape
    assert not (tmp_path / "cache").exists()


def test_what_is_fixed_is_not_measured(images, monkeypatch):
    asked = clock(monkeypatch, {8: 1.0, 4: 0.5, 2: 0.6}, {4: 1.0, 2: 0.5, 1: 0.6})
    monkeypatch.setenv(budget.THREADS, "4")
    monkeypatch.setenv(budget.LAYOUT, "channels_last")
    monkeypatch.setenv(budget.MODE, "reverse_over_forward")
    assert passes.chosen(images) == (4, "channels_last", 4, "reverse_over_forward")
    monkeypatch.setenv(budget.CHUNK, "2")
    fixed = images.with_model(images.model)
    fixed = Landscape(fixed.model, fixed.x, fixed.y)
    asked.clear()
    assert passes.chosen(fixed) == (2, "channels_last", 4, "reverse_over_forward")
    assert not asked
    monkeypatch.delenv(budget.THREADS)
    assert passes.chosen(fixed).threads == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"chunk": 0, "layout": "contiguous", "threads": 1, "mode": "double_backward"}',
        '{"chunk": 40, "layout": "contiguous", "mode": "double_backward"}',
        '{"chunk": "10", "layout": "contiguous", "threads": 1, "mode": "double_backward"}',
        '{"chunk": 40, "layout": "b", "threads": 1, "mode": "double_backward"}',
        '{"chunk": 40, "layout": "contiguous", "threads": 0, "mode": "double_backward"}',
        '{"chunk": 40, "layout": "contiguous", "threads": 1, "mode": "hessian"}',
    ],
)
def test_what_was_kept_and_is_damaged_is_measured_anew(landscape, monkeypatch, tmp_path, text):
    monkeypatch.setenv(budget.THREADS, "4")
    monkeypatch.setenv(budget.MODE, "double_backward")
    asked = clock(monkeypatch, {40: 1.0, 20: 2.0})
    passes.chosen(landscape)
    (file,) = (tmp_path / "cache" / "passes").iterdir()
    file.write_text(text)
    assert passes.chosen(landscape).chunk == 512
    assert [choice.chunk for choice in asked] == [40, 20] * 2


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_memory(
    landscape, monkeypatch, tmp_path, caplog
):
    clock(monkeypatch, {40: 1.0, 20: 2.0})
    (tmp_path / "cache").write_text("a file")
    assert passes.chosen(landscape).chunk == 512
    assert "set LSA_CACHE to a writable folder" in caplog.text


@pytest.mark.parametrize(("contiguous", "expected"), [(0.5, "contiguous"), (0.97, "channels_last")])
def test_images_lie_as_is_faster_at_that_size(images, monkeypatch, contiguous, expected):
    asked: list[passes.Choice] = []

    def seconds(_: Landscape, choice: passes.Choice) -> float:
        asked.append(choice)
        return (1 + abs(choice.chunk - 4)) * (contiguous if choice.layout == "contiguous" else 1.0)

    monkeypatch.setattr(passes, "_seconds", seconds)
    choice = passes.chosen(images)
    assert choice[:2] == (4, expected)
    found = choice.applied(images)
    last = found.x.is_contiguous(memory_format=torch.channels_last)
    assert last == (expected == "channels_last") and found.x.is_contiguous() != last
    before = len(asked)
    assert passes.chosen(images) == choice and len(asked) == before  # kept
    monkeypatch.setenv(budget.LAYOUT, "contiguous")
    assert passes.chosen(images.with_model(images.model)).chunk == 4 and len(asked) > before


@pytest.mark.parametrize(
    ("seconds", "mode"),
    [
        ({"reverse_over_forward": 0.5, "forward_over_reverse": 0.8}, "reverse_over_forward"),
        ({"forward_over_reverse": 0.8, "reverse_over_forward": torch.inf}, "forward_over_reverse"),
        ({"forward_over_reverse": 0.95}, "double_backward"),  # too little to be a gain
        ({"double_backward": torch.inf}, "double_backward"),  # for a probe to say
    ],
)
def test_the_fastest_mode_is_taken(landscape, monkeypatch, seconds, mode):
    monkeypatch.setattr(passes, "_seconds", lambda at, choice: seconds.get(choice.mode, 1.0))
    choice = passes.chosen(landscape)
    assert choice.mode == mode and choice.applied(landscape).mode == mode


def test_a_mode_that_gives_another_product_is_not_taken(landscape, monkeypatch):
    wrong = modes.MODES | {"forward_over_reverse": lambda loss, theta: lambda v: 1.01 * v}
    monkeypatch.setattr("lsa.landscape.derivatives.products.MODES", wrong)
    seconds = {"forward_over_reverse": 0.1}
    monkeypatch.setattr(passes, "_seconds", lambda at, choice: seconds.get(choice.mode, 1.0))
    assert passes.chosen(landscape).mode == "double_backward"


def test_a_fixed_mode_without_derivatives_gives_way_with_one_line(landscape, monkeypatch, caplog):
    """As PyTorch fails on tanh with a squared error in torch 2.14."""
    at = Landscape(landscape.model, landscape.x, torch.zeros(40, 2).double(), F.mse_loss)
    monkeypatch.setattr(passes, "WORTH", 60.0)
    monkeypatch.setenv(budget.MODE, "reverse_over_forward")
    assert passes.chosen(at).mode == "reverse_over_forward" and not caplog.messages
    monkeypatch.setenv(budget.MODE, "forward_over_reverse")
    assert passes.chosen(at).mode == "double_backward"
    (line,) = caplog.messages
    assert line.startswith("forward_over_reverse is not possible for this network: ")
    assert line.endswith("; products are by double_backward")


def test_a_machine_that_grows_faster_favours_nothing(images, monkeypatch):
    """Each measurement takes 0.95 of the one before it, whatever is chosen."""
    now = iter(0.95**i for i in range(100))
    monkeypatch.setattr(passes, "_seconds", lambda at, choice: next(now))
    assert passes.chosen(images) == (512, "channels_last", 4, "double_backward")


def test_what_is_timed_are_whole_passes_and_enough_samples(landscape, monkeypatch):
    sizes, threads = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def hessian(self, theta):
        sizes.append((self.chunk, self.n_samples, self.graph_memory))
        return lambda v: v

    monkeypatch.setattr(Landscape, "hessian", hessian)
    many = landscape.with_data(landscape.x.repeat(10, 1), landscape.y.repeat(10))
    assert all(
        passes._seconds(many, passes.Choice(size, "contiguous", 3, modes.DEFAULT)) > 0
        for size in (1, 24, 100)
    )
    assert sizes == [(1, 64, 0), (24, 48, 0), (100, 100, 0)]
    assert threads == [3, 4] * 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, InputError, RuntimeError])
def test_what_has_no_product_is_no_choice_and_no_failure(landscape, monkeypatch, error):
    def hessian(self, theta):
        def product(v):
            raise error("none")

        return product

    monkeypatch.setattr(Landscape, "hessian", hessian)
    assert passes._seconds(landscape, passes.Choice(8, "contiguous", 4, modes.DEFAULT)) == torch.inf
    assert passes.chosen(landscape) == (512, "channels_last", 4, "double_backward")


def test_a_network_without_a_gradient_is_left_to_the_probe(landscape, monkeypatch):
    def gradient(self, theta):
        raise RuntimeError("none")

    monkeypatch.setattr(Landscape, "gradient", gradient)
    assert passes.chosen(landscape) == (512, "channels_last", 4, "double_backward")


def test_the_process_keeps_its_threads(monkeypatch, landscape):
    monkeypatch.undo()
    before = torch.get_num_threads()
    assert passes._seconds(landscape, passes.Choice(8, "contiguous", before + 1, modes.DEFAULT)) > 0
    assert torch.get_num_threads() == before
