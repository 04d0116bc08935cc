"""Rewards: the rubric's outcomes, the reasoning-gym verifier, and subprocesses that hang, crash and lie."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import ray

from pmdflow.config.schema import RewardConfig
from pmdflow.data import GymPrompts
from pmdflow.data import gym as gym_data
from pmdflow.errors import PmdflowError
from pmdflow.reward import reasoning_gym
from pmdflow.reward.item import ScoreItem
from pmdflow.reward.rubric import InvalidCompletion, load_rubric
from pmdflow.reward.runner import RewardRunner
from pmdflow.types import Stop, Unscored
from tests.data.test_data import make_config as make_run_config
from tests.data.test_data import save_tokenizer

FUNCTIONS = '''
import os, signal, subprocess, sys, time
from pmdflow.reward.rubric import InvalidCompletion

print("printing at import is harmless")

def length(*, completion, prompt, metadata):
    return len(completion)

def obey(*, completion, prompt, metadata):
    """Does what the completion says."""
    print("printing is harmless")
    if completion == "sleep":
        time.sleep(3600)
    if completion == "spin":
        for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    if completion == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if completion == "exit":
        os._exit(3)
    if completion == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], close_fds=False)
        with open(metadata["pid_file"], "w") as file:
            file.write(str(child.pid))
        time.sleep(3600)
    if completion == "invalid":
        raise InvalidCompletion("no answer")
    if completion == "raise":
        raise KeyError("oops")
    if completion == "text":
        return "1.0"
    if completion == "none":
        return None
    return float(completion)
'''


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of user modules on the import path."""
    (tmp_path / "graders.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("graders", None)


def make_config(*names: str, **settings: Any) -> RewardConfig:
    entries = [{"function": name, "weight": 1.0} for name in names or ("graders:obey",)]
    return RewardConfig.model_validate({"functions": entries, "timeout_s": 1.0, **settings})


def items(*completions: str, **metadata: Any) -> list[ScoreItem]:
    return [ScoreItem(completion=completion, prompt="?", metadata=metadata) for completion in completions]


def score(config: RewardConfig, completion: str) -> Any:
    return load_rubric(config)(completion=completion, prompt="?", metadata={})


# --- rubric ---


@pytest.mark.usefixtures("functions")
def test_reward_is_the_weighted_sum_and_components_are_unweighted() -> None:
    config = RewardConfig.model_validate(
        {"functions": [{"function": "graders:length", "weight": 0.5}, {"function": "graders:obey", "weight": -2.0}]}
    )
    scored = score(config, "3.0")
    assert (scored.outcome, scored.reward) == ("scored", -4.5)
    assert scored.components == {"graders.length": 3.0, "graders.obey": 3.0}


@pytest.mark.usefixtures("functions")
def test_an_invalid_completion_gets_the_configured_reward() -> None:
    scored = score(make_config("graders:length", "graders:obey", invalid=-0.25), "invalid")
    assert (scored.outcome, scored.reward) == ("invalid", -0.25)
    assert scored.components == {"graders.length": 0.0, "graders.obey": 0.0}
    assert "no answer" in scored.message


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("completion", "message"),
    [("nan", "nan"), ("-inf", "-inf"), ("raise", "KeyError: 'oops'"), ("text", "'1.0'"), ("none", "None")],
)
def test_whatever_is_not_a_finite_number_is_an_infra_failure(completion: str, message: str) -> None:
    scored = score(make_config(), completion)
    assert scored.outcome == "infra_failure"
    assert "graders.obey" in scored.message
    assert message in scored.message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.graders:obey", "nowhere.graders.*No module named 'nowhere'"),
        ("graders:obay", "did you mean 'obey'"),
        ("graders:os", "a module, not a function"),
        ("broken:f", "cannot import broken: ZeroDivisionError"),
    ],
)
def test_an_unusable_path_is_named_with_its_cause(functions: Path, path: str, message: str) -> None:
    (functions / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=rf"reward\.functions\[1\].*{path}.*{message}"):
        load_rubric(make_config("graders:length", path))


@pytest.mark.usefixtures("functions")
def test_a_function_listed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        load_rubric(make_config("graders:obey", "graders:obey"))


# --- reasoning-gym ---


def gym(name: str, **args: Any) -> GymPrompts:
    return GymPrompts(
        name=name, args=args, seed=0, num_held_out=0, tokenize=lambda text: np.zeros(len(text), dtype=np.int32)
    )


def judge(completion: str, metadata: Any) -> float:
    stored = msgpack.unpackb(msgpack.packb(dict(metadata)))
    return reasoning_gym.score(completion=completion, prompt="", metadata=stored)


def test_only_exactly_right_answers_count() -> None:
    metadata = gym("chain_sum").prompt(0).metadata
    right = metadata["answer"]
    assert judge(f"1. a step\nanswer: {right}", metadata) == 1.0
    assert judge(f"answer: 7\nno, ANSWER:\n  {right}  \n", metadata) == 1.0
    assert judge(f"answer: {right}\nno, answer: {int(right) + 1}", metadata) == 0.0
    assert judge(f"answer: I think {right}", metadata) == 0.0  # partial credit in reasoning-gym
    assert judge("\u0130\u0130 answer: " + right, metadata) == 1.0  # its lower case is longer


@pytest.mark.parametrize("completion", ["", "42", "the answer is 42", "answer:", "answer: 4\nanswer: \n"])
def test_no_answer_is_invalid(completion: str) -> None:
    with pytest.raises(InvalidCompletion):
        judge(completion, gym("chain_sum").prompt(0).metadata)


def test_an_answer_on_which_the_verifier_trips_is_invalid() -> None:
    with pytest.raises(InvalidCompletion, match="ValueError"):
        judge("answer: none", gym("prime_factorization").prompt(0).metadata)


def test_composite_is_judged_by_the_data_set_of_the_entry() -> None:
    source = gym("composite", datasets=[{"name": "chain_sum"}, {"name": "spell_backward"}])
    prompts = [source.prompt(cursor) for cursor in range(12)]
    assert {prompt.metadata["dataset"] for prompt in prompts} == {"chain_sum", "spell_backward"}
    for prompt in prompts:
        assert judge(f"answer: {prompt.metadata['answer']}", prompt.metadata) == 1.0
        assert judge("answer: -0.5", prompt.metadata) == 0.0


@pytest.mark.parametrize("name", ["rearc", "graph_color", "countdown", "knights_knaves", "letter_counting"])
def test_entries_survive_the_store(name: str) -> None:
    """Their verifiers compare tuples, look up integer keys or hold NumPy scalars."""
    prompt = gym(name).prompt(0)
    entry = gym_data.make_dataset(name=name, args={}, seed=gym(name)._base)[0]
    assert gym_data.unpack(msgpack.unpackb(msgpack.packb(prompt.metadata["metadata"]))) == entry["metadata"]
    if entry["answer"] is not None:
        assert judge(f"answer: {entry['answer']}", prompt.metadata) == 1.0


@pytest.mark.parametrize("value", [2**80, -(2**63), (1, (2,)), {1: "a", (2, 3): [None]}, {}, [True, 0.5], {"a": {}}])
def test_pack_is_lossless(value: Any) -> None:
    assert gym_data.unpack(msgpack.unpackb(msgpack.packb(gym_data.pack(value)))) == value


def test_metadata_of_another_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"lacks .*'dataset'"):
        reasoning_gym.score(completion="answer: 1", prompt="", metadata={"answer": "1"})


# --- subprocesses ---


@pytest.mark.usefixtures("functions")
def test_results_come_in_order() -> None:
    with RewardRunner(make_config(workers=2)) as runner:
        scored = runner.map(items(*(str(number) for number in range(500))))
        assert [result.reward for result in scored] == [float(number) for number in range(500)]
        assert runner.map([]) == []
        kinds = runner.map(items("1", "invalid", "nan", "raise", "\ud800"))
        assert [result.outcome for result in kinds] == ["scored", "invalid", *["infra_failure"] * 3]


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("sleep", "timed out after 1 s"),
        ("spin", "timed out after 1 s"),
        ("freeze", "timed out after 1 s"),
        ("exit", "exit code 3"),
        ("kill", "signal 9"),
    ],
)
def test_a_lost_item_is_an_infra_failure_and_its_batch_goes_on(completion: str, message: str) -> None:
    with RewardRunner(make_config()) as runner:
        scored = runner.map(items("1", "2", completion, "3", "4"))
        assert [result.outcome for result in scored] == ["scored", "scored", "infra_failure", "scored", "scored"]
        assert [result.reward for result in scored] == [1.0, 2.0, 0.0, 3.0, 4.0]
        assert message in scored[2].message


@pytest.mark.usefixtures("functions")
def test_the_limit_is_for_one_item_not_for_its_batch(functions: Path) -> None:
    (functions / "slow.py").write_text(
        "import time\ndef f(*, completion, prompt, metadata):\n    time.sleep(0.4)\n    return 1\n"
    )
    with RewardRunner(make_config("slow:f")) as runner:
        assert [result.outcome for result in runner.map(items(*"abcdef"))] == ["scored"] * 6


def test_what_a_killed_function_started_dies_with_it(functions: Path) -> None:
    pid_file = functions / "pid"
    with RewardRunner(make_config()) as runner:
        (scored,) = runner.map(items("child", pid_file=str(pid_file)))
    assert "timed out" in scored.message
    assert not is_alive(int(pid_file.read_text()))


@pytest.mark.usefixtures("functions")
def test_a_rubric_that_cannot_be_imported_is_a_start_error() -> None:
    with pytest.raises(ValueError, match="did you mean 'obey'"):
        RewardRunner(make_config("graders:obay", workers=2))


def test_a_crash_or_a_hang_of_the_import_is_a_start_error(functions: Path) -> None:
    (functions / "crash.py").write_text("import os\nos._exit(7)\n")
    (functions / "hang.py").write_text("import time\ntime.sleep(3600)\n")
    with pytest.raises(PmdflowError, match=r"exit code 7.*crash:f"):
        RewardRunner(make_config("crash:f"))
    with pytest.raises(PmdflowError, match=r"timed out.*hang:f"):
        RewardRunner(make_config("hang:f"), start_timeout_s=2.0)


def test_restarts_that_keep_failing_end_the_runner(functions: Path) -> None:
    (functions / "once.py").write_text(
        "import os, pathlib\n"
        "flag = pathlib.Path(__file__).with_name('started')\n"
        "if flag.exists():\n    os._exit(5)\n"
        "flag.touch()\n"
        "def f(*, completion, prompt, metadata):\n    os._exit(4)\n"
    )
    with RewardRunner(make_config("once:f")) as runner:
        first, second = (runner.submit(item) for item in items("a", "b"))
        assert "exit code 4" in first.result(timeout=30).message
        with pytest.raises(PmdflowError, match=r"exit code 5.*once:f"):
            second.result(timeout=60)
        with pytest.raises(PmdflowError):
            runner.submit(items("c")[0])


@pytest.mark.usefixtures("functions")
def test_close_fails_what_is_not_scored_and_leaves_no_process() -> None:
    runner = RewardRunner(make_config(timeout_s=600.0))
    futures = [runner.submit(item) for item in items("sleep", "1")]
    runner.close()
    runner.close()
    for future in futures:
        with pytest.raises(PmdflowError, match="closed"):
            future.result(timeout=5)
    with pytest.raises(PmdflowError, match="closed"):
        runner.submit(items("1")[0])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the children of a killed process on Linux only")
def test_subprocesses_die_with_a_killed_parent(functions: Path) -> None:
    """Even one that never looks at its input again."""
    script = (
        "import sys\n"
        "from pmdflow.config.schema import RewardConfig\n"
        "from pmdflow.reward.item import ScoreItem\n"
        "from pmdflow.reward.runner import RewardRunner\n"
        "config = RewardConfig(functions=[{'function': 'graders:obey'}], timeout_s=600)\n"
        "runner = RewardRunner(config)\n"
        "future = runner.submit(ScoreItem(completion='spin', prompt=''))\n"
        "print(runner._workers[0].pid, flush=True)\n"
        "future.result(timeout=600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(functions), *filter(None, sys.path)])}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(next(line for line in parent.stdout if line.strip().isdigit()))
        os.kill(pid, 0)
        parent.kill()
    assert not is_alive(pid)


def is_alive(pid: int, *, within_s: float = 10.0) -> bool:
    """Whether process `pid` outlives the time it takes to be seen dead (zombies are dead)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state in "ZX":
            return False
        time.sleep(0.02)
    return True


# --- actor ---


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "graders.py").write_text(FUNCTIONS)
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


def make_store(unscored: list[Unscored]) -> Any:
    """An actor with the store's two methods: it hands out again whatever has no score yet, and keeps the scores."""

    @ray.remote(num_cpus=0, max_concurrency=4)
    class Store:
        def __init__(self) -> None:
            self.answers: list[Any] = []
            self.enough = threading.Event()

        def unscored(self, max_items: int, ttl_s: float, timeout_s: float) -> list[Unscored]:
            known = {(trajectory, attempt) for trajectory, attempt, *_ in self.answers}
            items = [item for item in unscored if (item.trajectory, item.attempt) not in known][:max_items]
            if not items:
                time.sleep(timeout_s)
            return items

        def score(self, scores: list[Any]) -> None:
            self.answers += scores
            if len(self.answers) >= len(unscored):
                self.enough.set()

        def scores(self) -> list[Any]:
            assert self.enough.wait(timeout=60)
            return self.answers

    return Store.remote()


@pytest.mark.usefixtures("ray_cluster")
def test_actor_scores_each_attempt_once_and_stops_within_seconds(tmp_path: Path) -> None:
    from pmdflow.reward.actor import RewardActor

    model = save_tokenizer(tmp_path / "model")
    config = make_run_config(model, "reasoning_gym/gcd").model_copy(update={"reward": make_config(timeout_s=1.0)})
    completions = ["1.5", "invalid", "sleep", "2"]
    store = make_store([unscored(number, text) for number, text in enumerate(completions)])
    actor = ray.remote(RewardActor).options(num_cpus=0, max_concurrency=4).remote(config=config, store=store)
    run = actor.run.remote()
    answer = store.scores.remote()
    ray.get(ray.wait([answer, run], timeout=90)[0][0])  # raises what ended `run`, if it did
    scores = ray.get(answer, timeout=90)
    assert sorted(scores)[:2] == [
        (0, 5, "scored", 1.5, {"graders.obey": 1.5}),
        (1, 5, "invalid", 0.0, {"graders.obey": 0.0}),
    ]
    assert sorted(scores)[2:] == [(2, 5, "infra_failure", 0.0, {}), (3, 5, "scored", 2.0, {"graders.obey": 2.0})]
    ray.get(actor.stop.remote(), timeout=10)
    ray.get(run, timeout=10)
    spans = ray.get(actor.drain.remote(), timeout=10).spans
    assert {span["name"] for span in spans} == {"start", "wait_unscored", "score"}
    total = {kind: sum(span["attrs"].get(kind, 0) for span in spans) for kind in ("scored", "invalid", "infra_failure")}
    assert total == {"scored": 2, "invalid": 1, "infra_failure": 1}
    (message,) = [text for span in spans for text in span["attrs"].get("messages", [])]
    assert "timed out after 1 s" in message
    assert ray.get(actor.drain.remote(), timeout=10).spans == []


@pytest.mark.usefixtures("ray_cluster")
def test_actor_says_why_its_rubric_cannot_be_loaded(tmp_path: Path) -> None:
    from pmdflow.reward.actor import RewardActor

    config = make_run_config(save_tokenizer(tmp_path / "model"), "reasoning_gym/gcd")
    config = config.model_copy(update={"reward": make_config("graders:obay")})
    actor = ray.remote(RewardActor).options(num_cpus=0).remote(config=config, store=None)
    with pytest.raises(ValueError, match="did you mean 'obey'"):
        ray.get(actor.run.remote(), timeout=90)


def unscored(trajectory: int, completion: str) -> Unscored:
    """A trajectory whose tokens, with an end-of-sequence token, are the bytes of `completion`."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = [2 + alphabet.index(character) for character in completion]
    return Unscored(
        trajectory=trajectory,
        group=0,
        kind="train",
        attempt=5,
        prompt_id="p",
        metadata={},
        prompt=np.asarray([2], dtype=np.int32),
        tokens=np.asarray([*ids, 1], dtype=np.int32),
        observed=np.zeros(len(ids) + 1, dtype=np.uint8),
        stop=Stop.STOP,
    )
