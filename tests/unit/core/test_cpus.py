"""Tests of counting CPUs: both versions of cgroups, nested and inside a container."""

import os
from pathlib import Path

import pytest

from core import cpus
from core.cpus import cpu_quota, usable_cpus


def write(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """Write a simulated /proc/self/cgroup and /sys/fs/cgroup; return both paths."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "cgroup", root / "sys"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cgroup": "0::/\n"}, None),
        ({"cgroup": "0::/\n", "sys/cpu.max": "max 100000\n"}, None),
        ({"cgroup": "0::/\n", "sys/cpu.max": "150000 100000\n"}, 1.5),
        # The smallest of a cgroup and its ancestors counts.
        (
            {
                "cgroup": "0::/a/b\n",
                "sys/cpu.max": "max 100000\n",
                "sys/a/cpu.max": "50000 100000\n",
                "sys/a/b/cpu.max": "400000 100000\n",
            },
            0.5,
        ),
        # A container's mount is its own cgroup; the path is one of the host.
        ({"cgroup": "0::/docker/12ab\n", "sys/cpu.max": "200000 100000\n"}, 2.0),
        ({"cgroup": "0::/../x\n", "sys/x/cpu.max": "100000 100000\n"}, 1.0),
        (
            {
                "cgroup": "5:cpuset:/\n4:cpu,cpuacct:/docker/12ab\n",
                "sys/cpu,cpuacct/docker/12ab/cpu.cfs_quota_us": "300000\n",
                "sys/cpu,cpuacct/docker/12ab/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "cgroup": "4:cpu:/\n",
                "sys/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"cgroup": "0::/\n", "sys/cpu.max": "100000 0\n"}, None),
        ({"cgroup": "nonsense", "sys/cpu.max": "x"}, None),
    ],
)
def test_the_quota_is_the_smallest_of_all_cgroups(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(*write(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "count"), [(None, 4), (0.2, 1), (1.5, 2), (9.0, 4)])
def test_a_quota_bounds_the_cpus_and_leaves_at_least_one(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert usable_cpus() == count
