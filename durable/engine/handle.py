"""A run seen from outside: its id, and the few things one does with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from durable.core.errors import ErrorData, RunCancelled, RunDead, RunFailed, RunTimeout
from durable.core.journal import Entry
from durable.core.payload import decode, decode_error
from durable.engine.pause import Timers
from durable.engine.residents import Final
from durable.protocol.states import Status
from durable.store.records import RunRecord

if TYPE_CHECKING:
    from durable.engine.engine import WorkflowEngine

T = TypeVar("T")

_RAISES = {Status.CANCELLED: RunCancelled, Status.DEAD: RunDead}


class RunHandle(Generic[T]):
    """One run. Nothing is held open by it; keep the id and make another any time."""

    def __init__(
        self, engine: WorkflowEngine, run_id: str, output_type: Any = Any, workspace: str | None = None
    ) -> None:
        self._engine = engine
        self._output_type = output_type
        self.id = run_id
        self.workspace = workspace
        """None: the engine's own."""

    def __repr__(self) -> str:
        return f"RunHandle({self.id!r})"

    async def result(self, timeout: float | None = None) -> T:
        """What the workflow returned. Raises RunFailed, RunTimeout, RunCancelled or RunDead with the run's error; or
        TimeoutError after `timeout` seconds, while the run goes on."""
        return outcome(self.id, await self._engine.wait(self.id, timeout, workspace=self.workspace), self._output_type)  # type: ignore[no-any-return]

    async def signal(self, name: str, payload: Any = None, *, id: str | None = None) -> bool:
        """Send a signal; the same id again changes nothing (False). Raises RunFinished if it is too late."""
        return await self._engine.signal(self.id, name, payload, id=id, workspace=self.workspace)

    async def cancel(self, reason: str = "", *, children: bool = False) -> bool:
        """Ask the run to stop and clean up; with `children`, everything it has started too."""
        return await self._engine.cancel(self.id, reason, children=children, workspace=self.workspace)

    async def pause(self, *, by: str = "", reason: str = "") -> bool:
        """Have the run begin nothing more until it is resumed. False: it is paused, or has been asked to."""
        return await self._engine.pause(self.id, by=by, reason=reason, workspace=self.workspace)

    async def resume(self, *, by: str = "", timers: Timers = "run") -> bool:
        """Have the paused run go on. `timers="hold"`: all its deadlines are later by the length of the pause."""
        return await self._engine.resume(self.id, by=by, timers=timers, workspace=self.workspace)

    async def get(self) -> RunRecord:
        """The run as stored."""
        return await self._engine.get(self.id, workspace=self.workspace)

    def watch(self, after: int = 0) -> AsyncIterator[Entry]:
        """The journal as it grows, until the run ends."""
        return self._engine.watch(self.id, after, workspace=self.workspace)


def outcome(run_id: str, final: Final, output_type: Any) -> Any:
    """The output, typed, or the error raised."""
    if final.status is Status.COMPLETED:
        return decode(final.output or b"null", output_type, what=f"the output of run {run_id}")
    error = decode_error(final.error) if final.error is not None else ErrorData(message=f"The run was {final.status}.")
    kind = _RAISES.get(final.status) or (RunTimeout if error.code == "run_timeout" else RunFailed)
    raised = kind(f"Run {run_id} {final.status}: {error.line}", run_id=run_id, error=error)
    if error.stack:  # the trace says who waited; this says where it happened
        raised.add_note("In the run:\n" + "\n".join(f"  {line}" for line in error.stack.splitlines()))
    raise raised
