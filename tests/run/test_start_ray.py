"""A Ray that does not start, or does not answer, is one line with the remedy, and soon."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.config.settle import settle
from pmdflow.errors import LaunchError
from pmdflow.run import actors, cluster
from tests.support.paths import CONFIGS


def config_of(address: str) -> Config:
    return settle(load(CONFIGS / "quickstart.yaml", [f"cluster.address={address}"]).config, gpus=None)


def test_an_address_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "RAY_ANSWER_S", 4.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(
            LaunchError, match=rf"cluster\.address is '{address}': no Ray has answered within 4 s"
        ) as no:
            actors.start_ray(config_of(address))
    assert time.monotonic() - began < 20
    assert no.value.hint is not None and "ray start --head" in no.value.hint


def test_auto_without_a_ray_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with pytest.raises(LaunchError, match=r"cluster\.address is 'nowhere': .+") as no:
        actors.start_ray(config_of("nowhere"))
    assert "\n" not in str(no.value).split("\n\nhint: ")[0]


def test_a_folder_that_is_too_long_for_rays_sockets_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("long-" * 20)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(LaunchError, match=r"Ray does not start: .*(AF_UNIX|path length)") as no:
        actors.start_ray(config_of("local"))
    assert no.value.hint is not None and "RAY_TMPDIR" in no.value.hint
