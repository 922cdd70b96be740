"""What can go wrong, by name, and what of it a seed has. A seed is a swarm member: a random subset of features and fault
kinds, each at its own rate; a fault that heals others by chance is then absent in many seeds (reliability 5.2)."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from msgspec import Struct

from durable.testing.simulation.loop import Node

ON_STORE = {
    "store_error_before": "refused; nothing happened",
    "store_error_after": "took effect, and the answer was an error",
    "store_dropped": "the connection broke, with everything on it in flight",
    "store_late": "the client gave up; the request arrived later all the same",
    "store_stall": "took 0.5 to 30 s",
}
LOST_REPLIES = {
    "lost_commit": "a commit's answer was lost",
    "lost_claim": "a claim's answer was lost",
    "lost_start": "a start's answer was lost",
    "lost_send": "a message's answer was lost",
}
ON_BEAT = {"beat_failed": "a heartbeat did not get through"}
ON_HINTS = {"hint_lost": "a store's hint was lost", "control_lost": "a control message was lost"}
ON_BROKER = {
    "task_refused": "a dispatch was refused",
    "task_ambiguous": "a dispatch was refused, and arrived",
    "task_lost": "a task vanished at the broker",
    "task_delayed": "a task arrived late, after others",
    "task_doubled": "a task was delivered twice",
    "result_lost": "a result vanished at the broker",
    "result_delayed": "a result arrived late, after others",
    "result_doubled": "a result was delivered twice",
    "result_redelivered": "a result was not acknowledged in time and came again",
}
ON_POOL = {"task_hung": "a dispatch was never answered, and may have arrived"}
"""Only where there is another transport."""
FORGETS = {"broker_forgets": "a broker dropped everything it held"}
"""Only where somebody finds out: a broker that can be asked, or steps with a timeout."""
MOVES = {
    "crash": "an engine vanished",
    "crash_before": "an engine vanished just before a durable effect",
    "crash_after": "an engine vanished just after a durable effect, the answer unheard",
    "crash_recovery": "an engine vanished just after it had claimed runs of one that was gone",
    "pause": "an engine stood still for 0.5 to 4 leases",
    "partition": "an engine was cut off from the store for 0.5 to 4 leases",
    "restart": "an engine was drained and another came",
    "clock_jump": "an engine's wall clock jumped by up to 10 minutes",
    "worker_crash": "a worker vanished",
    "worker_pause": "a worker stood still",
}
LOSSES = frozenset({"task_lost", "result_lost"})
"""Only where every remote step has a timeout: otherwise nobody could ever know."""

KINDS: dict[str, str] = {**ON_STORE, **LOST_REPLIES, **ON_BEAT, **ON_HINTS, **ON_BROKER, **MOVES, **ON_POOL, **FORGETS}
LATER = frozenset({*ON_POOL, *FORGETS})
"""Kinds drawn apart, so that the others stay as they were."""


NATIVE: dict[str, Any] = {
    "hosting": False,
    "hosts_programs": False,
    "turn_timeout": 3.0,
    "ask_every": 60.0,
    "talks": False,
    "events": False,
}
"""Of a swarm, for cases that were kept before there was more."""


class Swarm(Struct, frozen=True):
    """One seed, drawn. Smaller ones of the same seed are made by `msgspec.structs.replace`."""

    seed: int
    runs: tuple[int, ...]
    """Numbers of the programs started; each is drawn from the seed and its number alone."""
    moves: tuple[int, ...]
    """Numbers of the nemesis' moves; likewise."""
    kinds: frozenset[str]
    engines: int
    workers: int
    lease: float
    safety: float
    """Seconds of faults before everything heals."""
    rate: float
    """Of each kind on store and broker, for each call."""
    order: str
    """Of callbacks: see SimLoop."""
    store: str
    shared: bool
    """A shared broker; otherwise each engine's own event emitter."""
    holds: bool
    latency: float
    drift: float
    cold: bool
    hot_for: float
    hot_limit: int
    tick: float
    poll_every: float
    max_running: int
    cancel_grace: float
    pooled: bool = False
    """Two brokers in a pool; workers serve both."""
    dispatch_timeout: float = 5.0
    more: bool = False
    """Also random programs of durable/testing/programs.py, watchers, priorities and drawn arguments."""
    door: bool = False
    """One engine more, which starts, signals and inspects runs, and executes none."""
    partial: bool = False
    """The first engine does not serve every workflow."""
    retention: float | None = None
    """Seconds after which finished runs are deleted; None: never."""
    hosting: bool = False
    """Some programs are hosted by workers, turn by turn."""
    hosts_programs: bool = False
    """So are all of durable/testing/programs.py."""
    turn_timeout: float = 3.0
    ask_every: float = 60.0
    """After so many seconds brokers are asked after a task."""
    talks: bool = False
    """Steps tell lines, and workers tell them live."""
    events: bool = False
    """Programs wait for events, which clients publish, and send some."""

    @classmethod
    def draw(cls, seed: int) -> Swarm:
        """What this seed is."""
        after = Random(f"swarm, more/{seed}")
        draw = Random(f"swarm/{seed}")
        some = draw.choice((0.3, 0.6, 1.0))
        kinds = frozenset(kind for kind in KINDS if kind not in LATER and draw.random() < some)
        pool = Random(f"swarm, pool/{seed}")
        rule = Random(f"swarm, rule/{seed}")
        apart = Random(f"swarm, hosting/{seed}")
        pooled = pool.random() < 0.5
        if pooled and pool.random() < some:
            kinds |= ON_POOL.keys()
        engines_moves = ["crash", "crash_before", "crash_after", "pause", "partition", "restart"]
        if not kinds.intersection(engines_moves):
            kinds |= {draw.choice(engines_moves)}
        if apart.random() < some:
            kinds |= FORGETS.keys()
        lease = draw.choice((1.0, 2.0, 3.0, 5.0, 10.0, 30.0))
        return cls(
            seed=seed,
            runs=tuple(range(draw.randint(20, 26))),
            moves=tuple(range(draw.randint(5, 9))),
            kinds=kinds,
            engines=draw.choice((3, 3, 3, 4, 5)),
            workers=draw.randint(1, 3),
            lease=lease,
            safety=draw.uniform(3.0, 12.0) + 2 * lease * draw.random(),
            rate=draw.choice((0.002, 0.01, 0.03)),
            order=draw.choice(("any", "any", "fifo")),
            store="memory" if after.random() < 0.85 else "sqlite",
            shared=draw.random() < 0.7,
            holds=draw.random() < 0.6,
            latency=draw.choice((0.0002, 0.001, 0.01)),
            drift=draw.choice((0.0, 0.0, 0.0005)),
            cold=draw.random() < 0.25,
            hot_for=draw.choice((0.05, 0.5, 5.0)),
            hot_limit=draw.choice((0, 2, 10, 1000)),
            tick=draw.choice((0.0, 0.005, 0.02, 0.1)),
            poll_every=draw.choice((0.3, 1.0, 2.0)),
            max_running=draw.choice((2, 5, 20, 1000)),
            cancel_grace=draw.choice((0.5, 2.0, 10.0)),
            pooled=pooled,
            dispatch_timeout=pool.choice((0.2, 1.0, 5.0)),
            more=True,
            door=after.random() < 0.2,
            partial=after.random() < 0.2,
            retention=rule.choice((0.3, 2.0, 8.0)) if rule.random() < 0.15 else None,
            hosting=apart.random() < 0.5,
            hosts_programs=apart.random() < 0.15,
            turn_timeout=apart.choice((2.5, 4.0, 8.0)),  # more than two beats
            ask_every=apart.choice((0.2, 1.0, 3.0)) if apart.random() < 0.5 else 60.0,
            talks=apart.random() < 0.6,
            events=Random(f"swarm, events/{seed}").random() < 0.4,
        )

    @property
    def native(self) -> bool:
        """Nothing of what workers host and tell, nor of brokers that are asked."""
        return all(getattr(self, name) == value for name, value in NATIVE.items())

    @property
    def asks(self) -> bool:
        """A task that a broker has lost is found out soon, with no timeout of its own."""
        return self.shared and self.holds and self.ask_every < 10.0


class Faults:
    """Draws faults, and counts those that happened."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.tally: Counter[str] = Counter()
        self.healed = False
        self._random = Random(f"faults/{swarm.seed}")

    def hits(self, kind: str, weight: float = 1.0) -> bool:
        """Whether it happens now. Counted if so."""
        if self.healed or kind not in self.swarm.kinds:
            return False
        if self._random.random() >= self.swarm.rate * weight:
            return False
        self.tally[kind] += 1
        return True

    def delay(self, least: float, most: float) -> float:
        return self._random.uniform(least, most)

    def latency(self) -> float:
        """Of one way."""
        if self.healed:
            return 0.0002
        return self._random.expovariate(1.0) * self.swarm.latency


class Tripwire:
    """Counts durable effects, and says which node vanishes at which. An effect is whatever another process could see: a
    write to the store, a dispatch, a reply, an acknowledgement."""

    def __init__(self) -> None:
        self.count = 0
        self.names: list[str] = []
        self.at: dict[int, str] = {}
        """Effect number (from 1) → "before" or "after"."""
        self.armed: dict[Node, str] = {}
        """Node → when it is to vanish at its next effect: "before", "after", or "claim" (after a claim that got runs)."""
        self.tripped: list[tuple[int, str, Node]] = []

    def touch(self, node: Node, name: str) -> str | None:
        """An effect is about to happen on behalf of `node`."""
        self.count += 1
        self.names.append(name)
        when = self.at.get(self.count)
        if when is None and node in self.armed and self.armed[node] != "claim":
            when = self.armed.pop(node)
        if when is not None:
            self.tripped.append((self.count, when, node))
        return when
