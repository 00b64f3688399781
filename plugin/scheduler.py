"""vLLM's schedulers, with one thing more: a request whose step failed ends with an error, alone."""
from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from metalstep.plugin.outputs import StepResult

logger = logging.getLogger("vllm.metalstep.scheduler")


class EndsFailedRequests(Scheduler):
    """Ends the requests of StepResult.failed; the client gets an error instead of a text that stops in the middle."""

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: StepResult
    ) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        failed = getattr(model_runner_output, "failed", None) or {}
        for req_id, reason in failed.items():
            logger.error("Request %s ends: %s", req_id, reason)
        for request in self.finish_requests(list(failed), RequestStatus.FINISHED_ERROR) if failed else ():
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs


class MetalstepScheduler(EndsFailedRequests):
    """With --no-async-scheduling."""


class MetalstepAsyncScheduler(EndsFailedRequests, AsyncScheduler):
    """One step ahead of the device."""


def use(scheduler_config: Any) -> None:
    """Choose one of the above. vLLM warns of every class that is not its own; this one is made for the releases that compat.py names."""
    kind = MetalstepAsyncScheduler if scheduler_config.async_scheduling else MetalstepScheduler
    scheduler_config.scheduler_cls = kind
    logging.getLogger("vllm.config.scheduler").addFilter(lambda record: "custom scheduler class" not in record.getMessage())
