"""What happens on the server as one step: a task that is answered, given back or taken over is never in two places, nor in none.

The engines' sorted set holds until when each counts as alive, in the server's own time.
"""

from __future__ import annotations

import hashlib

from durable.transports.redis_link import Command

GROUP = "workers"
"""The consumer group of every stream of tasks."""

_NOW = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
"""


class Script:
    """Called by its hash; every connection loads it first."""

    def __init__(self, text: str) -> None:
        self.load: Command = ("SCRIPT", "LOAD", text)
        self._sha = hashlib.sha1(text.encode()).hexdigest()

    def __call__(self, keys: list[str], *args: object) -> Command:
        return ("EVALSHA", self._sha, len(keys), *keys, *args)


ANSWER = Script(
    _NOW
    + """
-- tasks, engines | group, entry, answer, engine that asked, base of result streams, stream for when there is no engine
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
local home = ARGV[6]
local alive = redis.call('ZSCORE', KEYS[2], ARGV[4])
if alive and tonumber(alive) >= now then
  home = ARGV[5] .. ARGV[4]
else
  local other = redis.call('ZREVRANGEBYSCORE', KEYS[2], '+inf', now, 'LIMIT', 0, 1)[1]
  if other then home = ARGV[5] .. other end
end
return redis.call('XADD', home, '*', 'a', ARGV[3])
"""
)
"""Acknowledges a task and sends its answer home: to the engine that asked, else to any, else where the next one looks."""

BACK = Script(
    """
-- tasks | group, entry
local found = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1]
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 1 and found then
  redis.call('XDEL', KEYS[1], ARGV[2])
  return redis.call('XADD', KEYS[1], '*', unpack(found[2]))
end
return false
"""
)
"""Puts a task at the end of its stream, as if nobody had ever had it."""

LEAVE = Script(
    """
-- tasks | group, consumer
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local count = 0
while true do
  local found = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 100, ARGV[2])
  if #found == 0 then break end
  for _, pending in ipairs(found) do
    local entry = redis.call('XRANGE', KEYS[1], pending[1], pending[1])[1]
    redis.call('XACK', KEYS[1], ARGV[1], pending[1])
    if entry then
      redis.call('XDEL', KEYS[1], pending[1])
      redis.call('XADD', KEYS[1], '*', unpack(entry[2]))
      count = count + 1
    end
  end
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return count
"""
)
"""A worker goes: what it still had goes back."""

TAKE = Script(
    """
-- streams of tasks | group, consumer, room
local taken, room = {}, tonumber(ARGV[3])
for _, stream in ipairs(KEYS) do
  if room <= 0 then break end
  local got = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', room, 'STREAMS', stream, '>')
  if got then
    room = room - #got[1][2]
    taken[#taken + 1] = got[1]
  end
end
return taken
"""
)
"""As many as there is room for and no more, whichever of many streams they wait in. XREADGROUP's COUNT is for each."""

RECLAIM = Script(
    """
-- tasks | group, consumer, ms a task may be silent, room, ms a consumer may be silent
if redis.call('EXISTS', KEYS[1]) == 0 then return {} end
local taken = {}
for _, pending in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], '-', '+', ARGV[4])) do
  local entry = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], pending[1])[1]
  if entry then
    taken[#taken + 1] = {entry[1], entry[2], pending[4]}
  else
    redis.call('XACK', KEYS[1], ARGV[1], pending[1])
  end
end
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local facts = {}
  for n = 1, #consumer, 2 do facts[consumer[n]] = consumer[n + 1] end
  if facts['pending'] == 0 and facts['idle'] > tonumber(ARGV[5]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], facts['name'])
  end
end
return taken
"""
)
"""Takes over tasks whose worker is silent, with how often each was given out, and forgets workers that are gone."""

_MOVE = """
local function move(from, to, most)
  local entries = redis.call('XRANGE', from, '-', '+', 'COUNT', most)
  for _, entry in ipairs(entries) do
    redis.call('XADD', to, '*', unpack(entry[2]))
    redis.call('XDEL', from, entry[1])
  end
  if redis.call('XLEN', from) == 0 then
    redis.call('DEL', from)
    return true
  end
  return false
end
"""

ADOPT = Script(
    _NOW
    + _MOVE
    + """
-- engines, stream for when there is no engine | own instance, ms to live, base of result streams, most to move at once
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
local whole = move(KEYS[2], ARGV[3] .. ARGV[1], tonumber(ARGV[4]))
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - 1, 'LIMIT', 0, 10)) do
  if move(ARGV[3] .. gone, ARGV[3] .. ARGV[1], tonumber(ARGV[4])) then
    redis.call('ZREM', KEYS[1], gone)
  else
    whole = false
  end
end
return whole and 1 or 0
"""
)
"""An engine's sign of life. It takes over what was meant for engines that are gone; 0: there is more."""

RETIRE = Script(
    _NOW
    + _MOVE
    + """
-- engines, stream for when there is no engine | own instance, base of result streams, most to move at once
redis.call('ZREM', KEYS[1], ARGV[1])
local other = redis.call('ZREVRANGEBYSCORE', KEYS[1], '+inf', now, 'LIMIT', 0, 1)[1]
return move(ARGV[2] .. ARGV[1], other and (ARGV[2] .. other) or KEYS[2], tonumber(ARGV[3])) and 1 or 0
"""
)
"""An engine goes, and leaves to another what it has not taken; 0: there is more."""

PASS = Script(
    _NOW
    + """
-- engines, own stream | own instance, base of result streams, entry
local others = redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf')
local at = 0
for n, instance in ipairs(others) do
  if instance == ARGV[1] then at = n end
end
local other = others[at % math.max(#others, 1) + 1]
local entry = redis.call('XRANGE', KEYS[2], ARGV[3], ARGV[3])[1]
if not entry then return 1 end
if not other or other == ARGV[1] then return 0 end
redis.call('XADD', ARGV[2] .. other, '*', unpack(entry[2]))
redis.call('XDEL', KEYS[2], ARGV[3])
return 1
"""
)
"""Hands an answer on to the next engine; 0: there is no other."""

TAKEN = Script(
    """
-- own stream, held | entry, task, attempt, ... ; an attempt of '' is any
for n = 1, #ARGV, 3 do
  redis.call('XDEL', KEYS[1], ARGV[n])
  if ARGV[n + 1] ~= '' then
    local attempt = redis.call('HGET', KEYS[2], ARGV[n + 1])
    if attempt and (ARGV[n + 2] == '' or attempt == ARGV[n + 2]) then redis.call('HDEL', KEYS[2], ARGV[n + 1]) end
  end
end
return redis.status_reply('OK')
"""
)
"""Answers were taken: they are deleted, and their tasks held no more, unless a newer attempt is."""

LOADS = [one.load for one in (ANSWER, BACK, LEAVE, TAKE, RECLAIM, ADOPT, RETIRE, PASS, TAKEN)]
