"""A run recorded before the modules moved to their rooms (1fa6726): whatever changes since, it replays as it was.

On other hardware floating point adds in another order, so there the losses are close instead of equal: a log-prob of
the quick start's model comes through 26 sums of up to 320 terms, and logits go up to 10.
"""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from pmdflow.config.load import load_run
from pmdflow.errors import PmdflowError
from pmdflow.replay.claims import check_same, claim_to_train, replay_claims
from pmdflow.run.directory import hardware
from pmdflow.store.archive import parts, read_part, write_part
from pmdflow.store.plan import in_claim_order
from tests.support.fixture_run import make_batch
from tests.support.numeric import assert_close
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
        check_same(recorded, "hardware", hardware())  # as the command does
        results = list(replay_claims(recorded, config, start=0, verify=True))
    except PmdflowError as error:
        refusal, results = str(error), list(replay_claims(recorded, config, start=0))
    if refusal:
        assert "equality bit for bit is not to be expected" in refusal
        for result in results:
            assert_close(result.losses, result.recorded, roundings=26 * 320, size=10.0)
    else:
        assert [result.first_difference for result in results] == [None, None, None]


def test_its_archive_is_readable(recorded: Path) -> None:
    batches = [read_part(path) for path in parts(recorded)]
    assert [batch.plan for batch in batches] == [None, None, None], "older than plans"
    assert [batch.iteration for batch in batches] == [1, 2, 3]
    assert [len(batch.rewards) for batch in batches] == [24, 24, 24]


def test_the_recorded_plan_is_kept_unless_the_number_of_steps_is_another(recorded: Path, tmp_path: Path) -> None:
    path = write_part(tmp_path, replace(make_batch(1), plan=in_claim_order(4, 2)), attrs={})
    kept = claim_to_train(path, anew=None).plan
    assert kept is not None and kept.steps.tolist() == [0, 0, 1, 1]
    dealt = claim_to_train(path, anew=load_run(recorded, ["learner.steps_per_iteration=4"]).config).plan
    assert dealt is not None and sorted(dealt.steps) == [0, 1, 2, 3] and dealt.rule == "length_strata"
