"""vLLM's engine in processes of its own, driven from one thread; every call has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Coroutine, Sequence
from typing import Any, NoReturn, TypeVar

from transformers import AutoConfig
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from pmdflow.errors import EngineDied
from pmdflow.rollout.engines.vllm.failures import Failures, shown
from pmdflow.rollout.engines.vllm.settings import VllmSettings, make_engine_args
from pmdflow.rollout.engines.vllm.sockets import Sockets

STEP_WAIT_S = 0.05
"""Longest that an exchange waits for tokens: leases, flushes and weights wait as long."""
SILENT_SHARE = 0.75
"""Share of `timeout_s` after which a silent engine is killed; the rest is for the actor to send what it has and give
its leases back, and for supervision to notice."""

T = TypeVar("T")


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    async with asyncio.timeout(seconds):
        return await work


class VllmProcess:
    """Requests to and outputs from vLLM's engine process; one that is gone or silent is killed and `EngineDied` raised.

    Requests and outputs go straight to and from the process, beside the per-request queues of `AsyncLLM`: only there
    does each batch of tokens carry the version of the weights that generated it.
    """

    def __init__(self, settings: VllmSettings, *, seed: int) -> None:
        """Start vLLM and wait until it has loaded the model.

        Raises:
            ValueError: vLLM cannot load the model, in its own words, or the settings do not fit the machine.
        """
        self._silent_limit_s = SILENT_SHARE * settings.timeout_s
        self._silent_s = 0.0
        """How long calls have waited in vain since the engine's last answer."""
        self._loop = asyncio.new_event_loop()
        arguments = make_engine_args(settings, seed=seed)
        self._failures, self._sockets = Failures(), Sockets()
        try:
            self._llm = AsyncLLM.from_engine_args(arguments)
        except Exception as error:  # of the model, the machine or vLLM itself
            family = AutoConfig.from_pretrained(settings.model_path).model_type
            raise ValueError(
                f"vLLM cannot load {settings.model_path}, a {family} ({self._failures.first() or shown(error)}); "
                "set rollout.engine to transformers, or choose another model"
            ) from error
        self._core: Any = self._llm.engine_core
        self.max_length = int(self._llm.model_config.max_model_len)
        self._mean_length = min(settings.mean_length or self.max_length, self.max_length)
        self.vocab_size = int(self._llm.model_config.get_vocab_size())
        self._ranks: list[int] = []
        """Process of each tensor-parallel rank; vLLM's engine process itself if there is one."""
        self._ranks = self._await(self._llm.collective_rpc("end_with", args=(os.getpid(),)), "the first call")
        self._adapted = settings.lora is not None
        if self._adapted:
            self._await(self._llm.collective_rpc("begin_adapters"), "the first adapters")
        self._await(self._llm.update_weight_version("0"), "the first version")

    @property
    def capacity(self) -> int:
        """Sequences of mean length that the key-value cache holds, and at most what vLLM was started for."""
        most = int(self._llm.vllm_config.scheduler_config.max_num_seqs)
        cache = self._llm.vllm_config.cache_config
        return max(1, min(most, int(cache.num_gpu_blocks * cache.block_size) // self._mean_length))

    def send(self, aborted: Sequence[str], requests: Sequence[EngineCoreRequest]) -> None:
        """Abort requests, then add new ones."""
        self._await(self._send(aborted, requests), "new requests")

    def exchange(
        self, aborted: Sequence[str], requests: Sequence[EngineCoreRequest], *, running: int
    ) -> list[EngineCoreOutputs]:
        """Send, then wait for outputs, but not longer than `STEP_WAIT_S`; with `running` requests some must come."""
        start, silent_s = time.monotonic(), self._silent_s
        batches = self._await(self._exchange(aborted, requests), f"a step with {running} requests")
        if running and not batches:
            self._silent_s = silent_s + time.monotonic() - start
        return batches

    def pause(self) -> list[EngineCoreOutputs]:
        """Stop generating; returns every output until now."""
        self._await(self._core.pause_scheduler_async(mode="keep", clear_cache=False), "a pause")
        # The answer came behind all outputs in one stream, so they are all in the queue.
        batches = [self._core.outputs_queue.get_nowait() for _ in range(self._core.outputs_queue.qsize())]
        for batch in batches:
            if isinstance(batch, Exception):
                self._fail("ended", cause=batch)
        return batches

    def load(self, path: str, *, version: int, clear: bool) -> None:
        """Load the weights or adapters in a safetensors file while paused; `clear` forgets older keys and values."""
        self._await(self._load(path, version, clear=clear), f"loading version {version}")

    def resume(self) -> None:
        """Generate on."""
        self._await(self._core.resume_scheduler_async(), "a resumption")

    def sleep(self) -> None:
        """Give the GPU's memory back while paused; weights are kept on the host."""
        self._await(self._sleep(), "falling asleep")

    def wake(self) -> None:
        """Take the memory again and generate on."""
        self._await(self._llm.wake_up(), "waking up")

    def close(self) -> None:
        """End vLLM's processes."""
        self._kill()
        self._llm.shutdown()
        task = self._core.resources.output_queue_task
        if task is not None:
            task.cancel()
            self._loop.run_until_complete(asyncio.wait([task]))
        self._loop.close()
        self._failures.close()
        self._sockets.close()

    async def _send(self, aborted: Sequence[str], requests: Sequence[EngineCoreRequest]) -> None:
        await self._core.abort_requests_async(list(aborted))
        for request in requests:
            await self._core.add_request_async(request)

    async def _exchange(self, aborted: Sequence[str], requests: Sequence[EngineCoreRequest]) -> list[EngineCoreOutputs]:
        await self._send(aborted, requests)
        try:
            async with asyncio.timeout(STEP_WAIT_S):
                batches = [await self._core.get_output_async()]
        except TimeoutError:
            return []
        while not self._core.outputs_queue.empty():
            batches.append(await self._core.get_output_async())
        return batches

    async def _load(self, path: str, version: int, *, clear: bool) -> None:
        llm = self._llm
        if self._adapted:
            await llm.collective_rpc("replace_adapters", args=(path,))
            await llm.update_weight_version(str(version))
        else:
            await llm.start_weight_update()
            await llm.update_weights(WeightTransferUpdateRequest(update_info={"path": path}))
            await llm.finish_weight_update(weight_version=str(version))
        if clear:
            await llm.reset_prefix_cache(reset_running_requests=True)

    async def _sleep(self) -> None:
        # What runs has its keys and values in the cache that is discarded: it must begin anew.
        await self._llm.reset_prefix_cache(reset_running_requests=True)
        await self._core.sleep_async(1, "keep")

    def _await(self, work: Coroutine[Any, Any, T], what: str) -> T:
        limit_s = self._silent_limit_s
        try:
            answer = self._loop.run_until_complete(_within(limit_s - self._silent_s, work))
        except TimeoutError:
            self._fail(f"was silent for {limit_s:g} s, at last during {what}")
        except EngineDeadError as error:
            self._fail(f"ended during {what}", cause=error)
        self._silent_s = 0.0
        return answer

    def _fail(self, how: str, *, cause: BaseException | None = None) -> NoReturn:
        """Kill what is left of vLLM's processes, so that a stopped one holds no memory, and say what happened."""
        pids = ", ".join(map(str, self._kill()))
        why = f" ({first})" if (first := self._failures.first()) else ""
        raise EngineDied(f"vLLM's engine process {pids} {how}{why}; its output is above") from cause

    def _kill(self) -> list[int]:
        """Kill vLLM's processes, ranks first: without their parent they are reaped, and their ids free for others."""
        processes = self._core.resources.engine_manager.processes
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        for process in processes:
            process.kill()
        return [process.pid for process in processes]
