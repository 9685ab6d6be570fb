"""How many workers machines hold, and what each asks for."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.job.job import Scale

pytest.importorskip("ray", reason="ray is not installed")

from pipeline.distributed.ray_pool import Machine, workers_by_machine

HEAD = {"CPU": 4.0}
MAC = {"CPU": 10.0, "mac": 1.0}
GPUS = {"CPU": 32.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("scale", "machines", "expected"),
    [
        ({}, [HEAD, MAC], [(1, 4, 0), (1, 10, 0)]),  # one each, with all of its CPUs
        ({}, [HEAD, GPUS], [(8, 4, 1)]),  # one a GPU, and none where there is none
        ({"num_gpus": 0}, [HEAD, GPUS], [(1, 4, 0), (1, 32, 0)]),
        ({"num_gpus": 0.5}, [GPUS], [(16, 2, 0.5)]),
        ({"num_cpus": 4}, [HEAD, MAC], [(1, 4, 0), (2, 4, 0)]),
        ({"num_cpus": 16}, [HEAD, GPUS], [(2, 16, 1)]),
        ({"resources": {"mac": 1}}, [HEAD, MAC], [(1, 10, 0)]),
        ({"resources": {"mac": 0.25}}, [MAC], [(4, 2, 0)]),
        ({}, [{"GPU": 1.0}, {}], []),  # a head that is not to work
    ],
)
def test_what_machines_hold(
    scale: dict[str, Any], machines: list[dict[str, float]], expected: list[tuple[int, float, float]]
) -> None:
    there = [Machine(str(number), "host", resources) for number, resources in enumerate(machines)]
    found = [options for _, options in workers_by_machine(Scale(**scale), there)]
    assert [(options["workers"], options["num_cpus"], options["num_gpus"]) for options in found] == expected
