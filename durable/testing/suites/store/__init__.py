"""What every store owes, one class of tests: subclass `StoreSuite`, give it a `builder` fixture, run pytest.

    class TestMine(StoreSuite):
        @pytest.fixture
        async def builder(self, tmp_path):
            builder = MyBuilder(tmp_path)
            yield builder
            await builder.close()

Rows of the reliability spec stand in the names: `test_S2_…`, `test_B11_…`. What a store says it cannot do is skipped, with
its reason. Nothing waits for seconds to pass: time is the builder's, and races are repeated until both orders were seen.
"""

from __future__ import annotations

from durable.testing.suites.store.builder import StoreBuilder
from durable.testing.suites.store.claims import ClaimTests
from durable.testing.suites.store.commits import CommitTests
from durable.testing.suites.store.effects import EffectTests
from durable.testing.suites.store.events import EventTests
from durable.testing.suites.store.inbox import InboxTests
from durable.testing.suites.store.items import ItemTests
from durable.testing.suites.store.journal import JournalTests
from durable.testing.suites.store.lanes import LaneTests
from durable.testing.suites.store.retention import RetentionTests
from durable.testing.suites.store.runs import RunTests
from durable.testing.suites.store.schedules import ScheduleTests

__all__ = ["StoreBuilder", "StoreSuite"]


class StoreSuite(
    RunTests,
    CommitTests,
    EffectTests,
    ClaimTests,
    LaneTests,
    InboxTests,
    JournalTests,
    RetentionTests,
    EventTests,
    ItemTests,
    ScheduleTests,
):
    """The whole contract."""
