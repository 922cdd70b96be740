"""The whole engine under seeded scheduling, virtual time and faults: `python -m durable.testing.simulation --help`.

loop       nodes (simulated processes) on one deterministic loop
faults     which faults a seed has, how often, and what they are called
server     the one store behind all nodes, and each node's unreliable connection to it
broker     a shared transport and its workers; the control plane
witness    what really happened, written down outside the engine
world      engines, workers, clients and a nemesis: one seed from start to heal to end
checker    a pure function over witness, client history and store
crashes    crash before and after every durable effect of a scenario
runner     many seeds on all cores, totals, shrinking
"""
