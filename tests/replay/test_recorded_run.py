"""A run recorded before the modules moved to their rooms (1fa6726): whatever changes since, it replays as it was.

On other hardware floating point adds in another order, so there the losses are close instead of equal: float32 sums of
some 1,000 log-probs agree to about 1e-5 of their terms, and three Adam steps of 1e-4 move them by less than 1e-3.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from pmdflow.config.load import load_run
from pmdflow.errors import PmdflowError
from pmdflow.replay.claims import replay_claims
from pmdflow.store.archive import parts, read_part
from tests.support.paths import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "run-1fa6726.tar.xz"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "recorded"


def test_the_losses_are_those_of_the_recording(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_run(recorded).config
    refusal = ""
    try:
        results = list(replay_claims(recorded, config, start=0, verify=True))
    except PmdflowError as error:
        refusal, results = str(error), list(replay_claims(recorded, config, start=0))
    if refusal:
        assert "equality bit for bit is not to be expected" in refusal
        for result in results:
            assert list(result.losses) == pytest.approx(list(result.recorded), rel=1e-3, abs=1e-5)
    else:
        assert [result.first_difference for result in results] == [None, None, None]


def test_its_archive_is_readable(recorded: Path) -> None:
    batches = [read_part(path) for path in parts(recorded)]
    assert [batch.iteration for batch in batches] == [1, 2, 3]
    assert [len(batch.rewards) for batch in batches] == [24, 24, 24]
