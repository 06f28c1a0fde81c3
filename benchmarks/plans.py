"""`python -m benchmarks.plans`: what `--plan` says of each probe on a GPT, and what it then takes.

Each probe runs in a process of its own, after one that makes the plans. Seconds are of the CPU, so
that others on the machine do not count; memory is the peak of the process. What a plan says is
over the limit is not run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.func import grad, vmap

from benchmarks import gpt
from benchmarks.summary import table
from lsa import probe
from lsa.landscape import Landscape, objectives
from lsa.probe import Probe
from lsa.project import resolve
from lsa.runtime import heap
from lsa.runtime.errors import InputError
from lsa.studies import cost, fitting
from lsa.training import stability

OPTIONS: dict[str, dict[str, Any]] = {  # few of everything; the others are defaults
    "lanczos": {"k": 1, "density_probes": 1, "density_steps": 10, "split": "no", "bias": "no"},
    "sgd_noise": {"k": 1, "probes": 2},
    "perturbation": {"points": 5},
    "preconditioned": {"k": 1},
    "sharpness": {"probes": 2, "starts": 1},
    "layers": {"probes": 2, "k": 1, "lower": "no", "tol": 0.1},
    "surface": {"points": 5},
    "symmetry_audit": {"probes": 2},
    "interpolation": {"points": 9},
    "auto_neb": {"curve_steps": 10, "cycles": 1, "steps": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=gpt.SHAPES, default="10.7M")
    parser.add_argument("--steps", type=int, default=30, help="of AdamW before; 0: random weights")
    parser.add_argument("--sequences", type=int, default=2, help="of each split")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--products", choices=("exact", "gradients", "auto"), default="auto")
    parser.add_argument("--probes", help="comma-separated; default: all")
    parser.add_argument("--seconds", type=float, default=600, help="that a run may take by plan")
    parser.add_argument("--gigabytes", type=float, default=12, help="that it may hold by plan")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # what a process of its own does
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        heap.keep()
        print(json.dumps(_plans(options) if options.step == "plan" else _taken(options)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as options.folder:
        for seed in range(2):
            torch.save(_network(options, seed).state_dict(), Path(options.folder) / f"{seed}.pt")
        for name, plan in _own(options, "plan").items():
            row = {"probe": name, "plan, s": plan.get("seconds"), "GB": plan.get("gigabytes")}
            over = row["plan, s"] and (
                row["plan, s"] > options.seconds or row["GB"] > options.gigabytes
            )
            row |= {"not run": "the plan is over the limit"} if over else _own(options, name)
            print(json.dumps(row | {"plan": plan}), flush=True)
            rows.append(row)
    print(f"\n{table(rows)}")


def _network(options: argparse.Namespace, seed: int) -> gpt.GPT:
    shape = gpt.SHAPES[options.size]._replace(context=options.context)
    if not options.steps:
        return gpt.build(shape, seed)
    return gpt.trained(shape, options.steps, 4, seed, lr=3e-4)


def _own(options: argparse.Namespace, step: str) -> Any:
    """What a new process prints in its last line."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    arguments = [f"--{name}={value}" for name, value in (given | {"step": step}).items()]
    command = [sys.executable, "-m", "benchmarks.plans", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        return {"fails": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


# --- in a process of its own ---------------------------------------------------------------------


def _inputs(options: argparse.Namespace) -> dict[str, Any]:
    """All that probes ask for, by their reserved names."""
    shape = gpt.SHAPES[options.size]._replace(context=options.context)
    model = gpt.GPT(shape)

    def theta(seed: int) -> torch.Tensor:
        model.load_state_dict(torch.load(Path(options.folder) / f"{seed}.pt", mmap=True))
        return at.theta

    def landscape(seed: int) -> Landscape:
        ids = gpt.text(options.sequences, options.context + 1, shape.vocabulary, seed)
        return Landscape(
            model,
            [(row[:, :-1], row[:, 1:]) for row in ids.split(1)],
            objective=objectives.per_token(shift=False),
            products=options.products,
            copy=False,
        )

    at, held_out = landscape(7), landscape(8)
    return {
        "landscape": lambda: at,
        "training": lambda: at,
        "validation": lambda: held_out,
        "theta": lambda: theta(0),
        "theta_b": lambda: theta(1),
        "theta_init": lambda: theta(1),
        "optimizer": lambda: _stepped(at, theta(0)),
        "others": dict,
        "trajectory": lambda: dict,
        "memory": dict,
        "rng": lambda: torch.Generator().manual_seed(0),
        "report": lambda: lambda *_: None,
    }


def _stepped(at: Landscape, theta: torch.Tensor) -> stability.OptimizerState:
    """Adam after a step."""
    moved = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.Adam([moved], lr=1e-4)
    moved.grad = at.gradient(theta)
    optimizer.step()
    return stability.read(optimizer, [moved], at.n_samples)


def _plans(options: argparse.Namespace) -> dict[str, Any]:
    """Per probe the plan, without what a tracked step takes beside its arithmetic."""
    given = _inputs(options)
    at, n = given["landscape"](), options.sequences
    rates = cost.measured(at, given["theta"](), n, n, optimizer="Adam", clock=time.process_time)
    names = options.probes.split(",") if options.probes else sorted(probe.modules())
    found = {}
    for name in names:
        declared = probe.find(name)
        chosen = _options(declared, options)
        said = cost.probing(declared, chosen, rates)
        assert said
        found[name] = {
            "seconds": said.seconds - cost.STEP,
            "between": [said.least - cost.STEP, said.most - cost.STEP],
            "gigabytes": said.memory / 1e9,
            "short": fitting.shortfall(declared, chosen, rates, 1e9 * options.gigabytes),
        }
    return found


def _options(declared: Probe, options: argparse.Namespace) -> dict[str, Any]:
    chosen: Mapping[str, Any] = OPTIONS.get(declared.name, {})
    if declared.name == "auto_neb":
        chosen = {**chosen, "batch_size": options.sequences}
    return resolve(declared, chosen, "options")


def _taken(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the CPU and peak memory of one probe, or what it says in their place."""
    declared, given = probe.find(options.step), _inputs(options)
    inputs = {name: given[name]() for name in declared.inputs}
    vmap(grad(torch.sin))(torch.zeros(1))  # loads what the process of the plan has loaded as well
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began = time.process_time()
    try:
        result = declared(**inputs, **_options(declared, options))
    except InputError as error:
        return {"refused": str(error).splitlines()[0]}
    return {
        "took, s": time.process_time() - began,
        "peak, GB": _peak() / 1e9,
        "converged": result.converged,
    }


def _peak() -> int:
    """Bytes of this process's memory at their most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
