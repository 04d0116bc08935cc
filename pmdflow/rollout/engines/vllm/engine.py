"""Generation with vLLM, in a process of its own, on a GPU or a CPU."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import signal
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
from torch import Tensor
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from pmdflow.errors import EngineDied, PmdflowError
from pmdflow.rollout.engine import OnNewWeights, Output, Request, check_extends, check_joins
from pmdflow.rollout.engines.vllm.settings import VllmSettings, eos_ids, make_engine_args
from pmdflow.rollout.engines.vllm.shared_memory import StagedWeights
from pmdflow.weights.lora import AdapterMerger, has_adapters, load_base

STEP_WAIT_S = 0.05
"""Longest that a step waits for tokens: leases, flushes and weights wait as long."""
SILENT_SHARE = 0.75
"""Share of `timeout_s` after which a silent engine is killed; the rest is for the actor to send what it has and give
its leases back, and for supervision to notice."""

T = TypeVar("T")


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


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    async with asyncio.timeout(seconds):
        return await work


class VllmEngine:
    """A `RolloutEngine` on vLLM's asynchronous engine.

    A limit is the `max_tokens` of a vLLM request, so none is overrun; a sequence whose limit was raised goes on as a
    new request, whose prefix is in the cache. vLLM generates on between the calls of this class; `step` gives out
    what has arrived.

    Requests and outputs go straight to and from vLLM's engine process, beside the per-request queues of `AsyncLLM`:
    only there does each batch of tokens carry the version of the weights that generated it, which is checked.

    Example:
        >>> engine = VllmEngine(VllmSettings(model_path=path, max_length=64), seed=0)  # doctest: +SKIP
        >>> engine.add(Request(id=0, tokens=np.array([5, 6], np.int32), limit=9, remaining=9, temperature=1.0))
        >>> engine.step()  # doctest: +SKIP
        [Output(id=0, tokens=[17], logprobs=[-5.9], stop=None)]
    """

    def __init__(self, settings: VllmSettings, *, seed: int) -> None:
        """Start vLLM and wait until it has loaded the model.

        Raises:
            ValueError: the model or the settings do not fit the machine, or there is no end-of-sequence token.
        """
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._llm = AsyncLLM.from_engine_args(make_engine_args(settings, seed=seed))
        self._core: Any = self._llm.engine_core
        self._eos = eos_ids(self._llm.model_config, settings.model_path)
        self._max_length = int(self._llm.model_config.max_model_len)
        self._adapters = AdapterMerger()
        self._base: Mapping[str, Tensor] | None = None
        self._sequences: dict[int, _Sequence] = {}
        self._running: dict[str, int] = {}
        """Sequence of each running vLLM request."""
        self._waiting: list[int] = []
        """Sequences to look at in the next step: new, or without a running request."""
        self._request_ids = itertools.count()
        self._aborted: list[str] = []
        """vLLM requests to abort in the next step."""
        self._silent_s = 0.0
        """How long calls have waited in vain since the engine's last answer."""
        self.version = 0
        self.num_slots = settings.slots or self._capacity()
        self.prefill_tokens = self.drafted_tokens = self.accepted_tokens = 0
        ranks = self._llm.collective_rpc("end_with", args=(os.getpid(),))
        self._ranks: list[int] = self._await(ranks, "the first call")
        """Process of each tensor-parallel rank; vLLM's engine process itself if there is one."""
        self._await(self._llm.update_weight_version("0"), "the first version")

    def add(self, request: Request) -> None:
        """Hold a sequence; vLLM begins it in the next step.

        Raises:
            ValueError: No free slot, the id is held already, or the request cannot be generated.
        """
        check_joins(request, self._sequences, self.num_slots)
        length = len(request.tokens) + request.remaining
        if length > self._max_length:
            raise ValueError(
                f"sequence {request.id} may reach {length} tokens, vLLM was started for {self._max_length}; "
                "lower data.max_tokens, raise data.max_prompt_tokens, or use a model with more positions"
            )
        if request.temperature > 0 and self._settings.speculation is not None and current_platform.is_cpu():
            raise ValueError(
                f"sequence {request.id} has temperature {request.temperature}: on a CPU vLLM 0.32 speculates exactly "
                "only at temperature 0; remove rollout.speculation"
            )
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
        """Give out the tokens that have arrived; waits for them, but not longer than `STEP_WAIT_S`.

        Raises:
            EngineDied: vLLM's process is gone, or silent although it should generate.
            PmdflowError: The model gave a log-prob that is not finite, or vLLM refused a request.
        """
        start, silent_s = time.monotonic(), self._silent_s
        batches = self._await(self._exchange(), "a step")
        if self._running and not batches:
            self._silent_s = silent_s + time.monotonic() - start
        return self._give(batches)

    def pause(self) -> list[Output]:
        """Stop generating; gives out everything that was generated until now. Held sequences stay."""
        self._await(self._core.pause_scheduler_async(mode="keep", clear_cache=False), "a pause")
        # The answer came behind all outputs in one stream, so they are all in the queue.
        return self._give([self._core.outputs_queue.get_nowait() for _ in range(self._core.outputs_queue.qsize())])

    def stage(self, weights: Mapping[str, Tensor]) -> StagedWeights:
        """Put weights where vLLM's workers can map them; may be called beside generation, from any thread."""
        if self._base is None and has_adapters(weights):
            self._base = load_base(self._settings.model_path)
        return StagedWeights(self._adapters.merge(weights, self._base or {}))

    def load_weights(self, version: int, staged: StagedWeights, *, on_new_weights: OnNewWeights) -> None:
        """Load staged weights while paused; the cache of older ones is kept apart by salt, or cleared (`reprefill`)."""
        self._await(self._update(version, staged, clear=on_new_weights == "reprefill"), f"loading version {version}")
        self.version = version
        staged.close()

    def resume(self) -> None:
        """Generate on."""
        self._await(self._send(), "new requests")
        self._await(self._core.resume_scheduler_async(), "a resumption")

    def close(self) -> None:
        """End vLLM's processes."""
        self._kill()
        self._llm.shutdown()
        task = self._core.resources.output_queue_task
        if task is not None:
            task.cancel()
            self._loop.run_until_complete(asyncio.wait([task]))
        self._loop.close()

    async def _update(self, version: int, staged: StagedWeights, *, clear: bool) -> None:
        llm = self._llm
        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update_info={"path": staged.path}))
        await llm.finish_weight_update(weight_version=str(version))
        if clear:
            await llm.reset_prefix_cache(reset_running_requests=True)

    async def _exchange(self) -> list[EngineCoreOutputs]:
        """Send what is to be sent, then wait for tokens."""
        await self._send()
        try:
            async with asyncio.timeout(STEP_WAIT_S):
                batches = [await self._core.get_output_async()]
        except TimeoutError:
            return []
        while not self._core.outputs_queue.empty():
            batches.append(await self._core.get_output_async())
        return batches

    async def _send(self) -> None:
        aborted, self._aborted = self._aborted, []
        await self._core.abort_requests_async(aborted)
        waiting, self._waiting = self._waiting, []
        for id in waiting:
            sequence = self._sequences.get(id)
            if sequence is not None and sequence.request_id is None and sequence.limit > 0:
                await self._core.add_request_async(self._make_request(id, sequence))

    def _make_request(self, id: int, sequence: _Sequence) -> EngineCoreRequest:
        request = sequence.request
        max_tokens = min(sequence.limit, sequence.remaining)
        # Never used again: outputs of an aborted request may still come.
        sequence.request_id = str(next(self._request_ids))
        self._running[sequence.request_id] = id
        return EngineCoreRequest(
            request_id=sequence.request_id,
            prompt_token_ids=list(sequence.tokens),
            mm_features=None,
            sampling_params=SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=max_tokens,
                min_tokens=min(max(request.min_tokens - request.remaining + sequence.remaining, 0), max_tokens),
                stop_token_ids=[*self._eos, *request.stop_token_ids],
                logprobs=0,
                detokenize=False,
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=str(self.version),
            data_parallel_rank=None,
        )

    def _give(self, batches: list[EngineCoreOutputs | Exception]) -> list[Output]:
        """One output for each sequence that has new tokens, so that none comes after the caller's `abort`."""
        given: dict[int, Output] = {}
        for output in itertools.chain.from_iterable(self._take(batch) for batch in batches):
            before = given.get(output.id)
            if before is not None:
                tokens, logprobs = [*before.tokens, *output.tokens], [*before.logprobs, *output.logprobs]
                output = Output(id=output.id, tokens=tokens, logprobs=logprobs, stop=output.stop)
            given[output.id] = output
        return list(given.values())

    def _take(self, batch: EngineCoreOutputs | Exception) -> list[Output]:
        if isinstance(batch, Exception):
            self._fail("ended", cause=batch)
        assert batch.weight_version == str(self.version), "a batch of another version after its swap"
        taken = [self._take_output(output) for output in batch.outputs]
        outputs = [output for output in taken if output is not None]
        if not math.isfinite(sum(sum(output.logprobs) for output in outputs)):
            raise PmdflowError(
                f"log-probs under policy version {self.version} are not finite: the weights have diverged"
            )
        return outputs

    def _take_output(self, output: EngineCoreOutput) -> Output | None:
        """Account for the new tokens of one request; None if it was aborted."""
        id = self._running.get(output.request_id)
        if id is None:
            return None
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise PmdflowError(f"vLLM refused sequence {id}: {output.finish_reason}; its log says why")
        sequence = self._sequences[id]
        self._count(output)
        # Fewer than generated only if the limit was lowered since the request was made.
        tokens = output.new_token_ids[: sequence.limit]
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

    def _count(self, output: EngineCoreOutput) -> None:
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

    def _capacity(self) -> int:
        """Sequences of full length that the key-value cache holds, and at most what vLLM was started for."""
        most = int(self._llm.vllm_config.scheduler_config.max_num_seqs)
        return max(1, min(most, self._cache_tokens() // self._max_length))

    def _cache_tokens(self) -> int:
        cache = self._llm.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    def _await(self, work: Coroutine[Any, Any, T], what: str) -> T:
        limit_s = SILENT_SHARE * self._settings.timeout_s
        try:
            answer = self._loop.run_until_complete(_within(limit_s - self._silent_s, work))
        except TimeoutError:
            self._fail(f"was silent for {limit_s:g} s, at last during {what}, with {len(self._running)} requests")
        except EngineDeadError as error:
            self._fail(f"ended during {what}", cause=error)
        self._silent_s = 0.0
        return answer

    def _fail(self, how: str, *, cause: BaseException | None = None) -> NoReturn:
        """Kill what is left of vLLM's processes, so that a stopped one holds no memory, and say what happened."""
        pids = ", ".join(map(str, self._kill()))
        raise EngineDied(f"vLLM's engine process {pids} {how}; its output is above") from cause

    def _kill(self) -> list[int]:
        """Kill vLLM's processes, ranks first: without their parent they are reaped, and their ids free for others."""
        processes = self._core.resources.engine_manager.processes
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        for process in processes:
            process.kill()
        return [process.pid for process in processes]
