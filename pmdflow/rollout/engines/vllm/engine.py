"""Generation with vLLM, in a process of its own, on a GPU or a CPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from pmdflow.config.installed import inexact_speculation
from pmdflow.data.tokenizer import end_ids
from pmdflow.errors import PmdflowError
from pmdflow.rollout.checks import check_extends, check_joins, check_logprobs, check_request
from pmdflow.rollout.engine import OnNewWeights, Output, Request
from pmdflow.rollout.engines.vllm.adapters import REQUEST
from pmdflow.rollout.engines.vllm.process import VllmProcess
from pmdflow.rollout.engines.vllm.self_check import check_served
from pmdflow.rollout.engines.vllm.settings import VllmSettings
from pmdflow.weights.file import NamedTensors, WeightsFile
from pmdflow.weights.lora import has_adapters


@dataclass(slots=True)
class _Sequence:
    """A held sequence, and the vLLM request that extends it."""

    request: Request
    tokens: list[int]
    """Prompt and everything generated and given out."""
    limit: int
    remaining: int
    request_id: str | None = None
    """The one that is running; None while it is paused or waits for the next step."""


class VllmEngine:
    """A `RolloutEngine` on vLLM's asynchronous engine.

    A vLLM request may run to the end of its trajectory: a limit that is raised in time interrupts nothing. One that is
    reached ends the request, and what vLLM has generated beyond is thrown away and counted; raised afterwards, the
    sequence goes on as a new request, whose prefix is in the cache. Where the cache is full, vLLM preempts the sequence
    with the highest id, the youngest, and begins with the lowest. It generates on between the calls of this class;
    `step` gives out what has arrived.

    Of the folder's generation settings only the end-of-sequence ids reach a vLLM request.

    Example:
        >>> engine = VllmEngine(VllmSettings(model_path=path, max_length=64), seed=0)  # doctest: +SKIP
        >>> engine.add(Request(id=0, tokens=np.array([5, 6], np.int32), limit=9, remaining=9, temperature=1.0))
        >>> engine.step()  # doctest: +SKIP
        [Output(id=0, tokens=[17], logprobs=[-5.9], stop=None)]
    """

    def __init__(self, settings: VllmSettings, *, seed: int) -> None:
        """Start vLLM and wait until it has loaded the model.

        Raises:
            ValueError: the model or the settings do not fit the machine, there is no end-of-sequence token, or vLLM
                gives other log-probs than the plain model.
        """
        ends = end_ids(settings.model_path)
        self._process = VllmProcess(settings, seed=seed)
        self._ends = sorted(id for id in ends if id < self._process.vocab_size)
        self._inexact = inexact_speculation(settings.speculation)
        """Why nothing may be sampled above temperature 0."""
        self._adapter = None if settings.lora is None else REQUEST
        self._sequences: dict[int, _Sequence] = {}
        self._running: dict[str, int] = {}
        """Sequence of each running vLLM request."""
        self._waiting: list[int] = []
        """Sequences to look at in the next step: new, or without a running request."""
        self._request_ids = itertools.count()
        self._early: list[EngineCoreOutputs] = []
        """What came while a probe was scored."""
        self._aborted: list[str] = []
        """vLLM requests to abort in the next step."""
        self.version = 0
        self.num_slots = settings.slots or self._process.capacity
        self._forget_counts()
        try:
            self._check(settings)
        except ValueError:
            self.close()
            raise
        self._forget_counts()

    def add(self, request: Request) -> None:
        """Hold a sequence; vLLM begins it in the next step.

        Raises:
            ValueError: No free slot, the id is held already, or the request cannot be generated.
        """
        check_joins(request, self._sequences, self.num_slots)
        check_request(request, vocab_size=self._process.vocab_size, max_length=self._process.max_length)
        if request.temperature > 0 and self._inexact is not None:
            raise ValueError(f"sequence {request.id} has temperature {request.temperature}: {self._inexact}; make it 0")
        self._sequences[request.id] = _Sequence(
            request=request, tokens=request.tokens.tolist(), limit=request.limit, remaining=request.remaining
        )
        self._waiting.append(request.id)

    def extend(self, id: int, limit: int) -> None:
        """Let sequence `id` generate `limit` tokens from where it stands; 0 pauses it.

        Raises:
            ValueError: The sequence is not held, or the limit is negative.
        """
        check_extends(id, limit, self._sequences)
        sequence = self._sequences[id]
        sequence.limit = limit
        if limit == 0:
            self._end_request(sequence)
        elif sequence.request_id is None and id not in self._waiting:
            self._waiting.append(id)

    def abort(self, id: int) -> None:
        """Forget sequence `id`, of which no `Output` comes any more; unknown ids are ignored."""
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            self._end_request(sequence)

    def active(self) -> int:
        """Sequences that have a limit left."""
        return sum(sequence.limit > 0 for sequence in self._sequences.values())

    def step(self) -> list[Output]:
        """Give out the tokens that have arrived; waits a little for them.

        Raises:
            EngineDied: vLLM's process is gone, or silent although it should generate.
            PmdflowError: The model gave a log-prob that is not finite, or vLLM refused a request.
        """
        aborted, requests = self._unsent()
        early, self._early = self._early, []
        return self._give([*early, *self._process.exchange(aborted, requests, running=len(self._running))])

    def pause(self) -> list[Output]:
        """Stop generating; gives out everything that was generated until now. Held sequences stay."""
        early, self._early = self._early, []
        return self._give([*early, *self._process.pause()])

    def stage(self, weights: Mapping[str, Tensor]) -> WeightsFile:
        """A file that vLLM's workers map, the node's own where there is one; from any thread.

        Raises:
            ValueError: vLLM was started for adapters, and these are whole weights; or the other way round.
        """
        if has_adapters(weights) != (self._adapter is not None):
            given, made = ("adapters", "whole weights") if has_adapters(weights) else ("whole weights", "adapters")
            raise ValueError(f"{given} are published to a vLLM engine that takes {made}: learner.lora says which")
        return weights if isinstance(weights, WeightsFile) else WeightsFile.write(NamedTensors.of(weights))

    def load_weights(self, version: int, staged: WeightsFile, *, on_new_weights: OnNewWeights) -> None:
        """Load staged weights while paused; the cache of older ones is kept apart by salt, or cleared (`reprefill`)."""
        self._process.load(staged.path, version=version, clear=on_new_weights == "reprefill")
        self.version = version

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs of the tokens after the first, as a request of its own; what others generate meanwhile is kept.

        Raises:
            EngineDied: vLLM's process is gone or silent.
        """
        id, prompt = f"probe-{next(self._request_ids)}", list(tokens[: self._process.max_length - 1])
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        requests = [self._core_request(id, prompt, params, priority=-1)]  # before every sequence
        while True:
            batches = self._process.exchange([], requests, running=1)
            requests = []
            self._early += batches
            for batch in batches:
                found = [output for output in batch.outputs if output.request_id == id]
                if found and found[0].finished:
                    batch.outputs = [output for output in batch.outputs if output.request_id != id]
                    scored = found[0].new_prompt_logprobs_tensors
                    assert scored is not None, "they were asked for"
                    return [float(logprob) for logprob in scored.logprobs[:, 0]]

    def resume(self) -> None:
        """Generate on."""
        self._process.send(*self._unsent())
        self._process.resume()

    def sleep(self) -> None:
        """vLLM's sleep of level 1 while paused: weights to the host, cache discarded, running requests preempted."""
        self._process.sleep()

    def wake(self) -> None:
        """Weights and an empty cache into the GPU again; preempted requests are prefilled anew."""
        self._process.wake()

    def close(self) -> None:
        """End vLLM's processes."""
        self._process.close()

    def _forget_counts(self) -> None:
        self.prefill_tokens = self.drafted_tokens = self.accepted_tokens = 0
        self.overrun_tokens = self.preemptions = 0

    def _check(self, settings: VllmSettings) -> None:
        check_served(
            self,
            model_path=settings.model_path,
            dtype=settings.dtype,
            max_length=self._process.max_length,
            temperature=1.0 if self._inexact is None else 0.0,
            lora=settings.lora,
        )

    def _unsent(self) -> tuple[list[str], list[EngineCoreRequest]]:
        """vLLM requests to abort, and those to add, since the last call."""
        aborted, self._aborted = self._aborted, []
        waiting, self._waiting = self._waiting, []
        held = [(id, self._sequences[id]) for id in waiting if id in self._sequences]
        requests = [self._make_request(id, one) for id, one in held if one.request_id is None and one.limit > 0]
        return aborted, requests

    def _make_request(self, id: int, sequence: _Sequence) -> EngineCoreRequest:
        request = sequence.request
        # Never used again: outputs of an aborted request may still come.
        sequence.request_id = str(next(self._request_ids))
        self._running[sequence.request_id] = id
        return self._core_request(
            sequence.request_id,
            list(sequence.tokens),
            SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=sequence.remaining,
                min_tokens=min(max(request.min_tokens - request.remaining + sequence.remaining, 0), sequence.remaining),
                stop_token_ids=[*self._ends, *request.stop_token_ids],
                logprobs=0,
                detokenize=False,
            ),
            priority=id,
        )

    def _core_request(self, id: str, tokens: list[int], params: SamplingParams, *, priority: int) -> EngineCoreRequest:
        return EngineCoreRequest(
            request_id=id,
            prompt_token_ids=tokens,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=self._adapter,
            cache_salt=str(self.version),
            data_parallel_rank=None,
            priority=priority,
        )

    def _give(self, batches: Sequence[EngineCoreOutputs]) -> list[Output]:
        """One output for each sequence that has new tokens, so that none comes after the caller's `abort`."""
        given: dict[int, Output] = {}
        for output in itertools.chain.from_iterable(self._take(batch) for batch in batches):
            before = given.get(output.id)
            if before is not None:
                tokens, logprobs = [*before.tokens, *output.tokens], [*before.logprobs, *output.logprobs]
                output = Output(id=output.id, tokens=tokens, logprobs=logprobs, stop=output.stop)
            given[output.id] = output
        return list(given.values())

    def _take(self, batch: EngineCoreOutputs) -> list[Output]:
        assert batch.weight_version == str(self.version), "a batch of another version after its swap"
        taken = [self._take_output(output) for output in batch.outputs]
        outputs = [output for output in taken if output is not None]
        check_logprobs(itertools.chain.from_iterable(output.logprobs for output in outputs), self.version)
        return outputs

    def _take_output(self, output: EngineCoreOutput) -> Output | None:
        """Account for the new tokens of one request; None if it was aborted."""
        id = self._running.get(output.request_id)
        if id is None:
            self.overrun_tokens += len(output.new_token_ids)
            return None
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise PmdflowError(f"vLLM refused sequence {id}: {output.finish_reason}; its log says why")
        sequence = self._sequences[id]
        self._count(output, sequence)
        tokens = output.new_token_ids[: sequence.limit]
        self.overrun_tokens += len(output.new_token_ids) - len(tokens)
        logprobs = output.new_logprobs.logprobs[: len(tokens), 0] if output.new_logprobs is not None else np.empty(0)
        sequence.tokens.extend(tokens)
        sequence.limit -= len(tokens)
        sequence.remaining -= len(tokens)
        stop: Literal["stop", "length"] | None = None
        if output.finish_reason == FinishReason.STOP and len(tokens) == len(output.new_token_ids):
            stop = "stop"
        elif sequence.remaining == 0:
            stop = "length"
        if output.finished:
            del self._running[output.request_id]
            sequence.request_id = None
            self._waiting.append(id)
        if stop is not None:
            self.abort(id)
        elif sequence.limit == 0:
            self._end_request(sequence)
        return Output(id=id, tokens=tokens, logprobs=logprobs.tolist(), stop=stop)

    def _count(self, output: EngineCoreOutput, sequence: _Sequence) -> None:
        for event in output.events or ():
            if event.type == EngineCoreEventType.PREEMPTED:
                self.preemptions += 1
                self.prefill_tokens += len(sequence.tokens)  # at most: blocks of it may still be cached
        if output.prefill_stats is not None:
            self.prefill_tokens += output.prefill_stats.num_computed_tokens
        if output.spec_decode_metrics is not None:
            self.drafted_tokens += output.spec_decode_metrics.num_draft_tokens
            self.accepted_tokens += sum(n * times for n, times in enumerate(output.spec_decode_metrics.histogram))

    def _end_request(self, sequence: _Sequence) -> None:
        if sequence.request_id is not None:
            del self._running[sequence.request_id]
            self._aborted.append(sequence.request_id)
            sequence.request_id = None
