-- The service's rows: items, events and what they start, lanes with their slots and throttles.
--
-- Engines of version 1 go on working: their functions keep their signatures, and those changed here do for them what they did.
-- They claim runs with lanes too, by the same rules, and a run that such an engine ends frees its slots.
--
-- The two indexes of due runs are built anew, in this transaction, so that runs with a lane stand in none that others use:
-- one pass over `runs` each, during which engines wait.

ALTER TABLE @schema@.runs
  ADD COLUMN first_due bigint,        -- of a run with a lane: the wake_at it had when it was first claimed
  ADD COLUMN lane text COLLATE "C",
  ADD COLUMN meta bytea;

DROP INDEX @schema@.runs_due;
CREATE INDEX runs_due ON @schema@.runs (workspace, workflow, version, priority DESC, wake_at, number)
  WHERE owner IS NULL AND status = 'active' AND activity NOT IN ('paused', 'blocked') AND lane IS NULL;
-- Runs with a lane that have never begun: by lane, to find its head; by time, to see whether there is any.
CREATE INDEX runs_queued ON @schema@.runs (workspace, workflow, version, lane, priority, wake_at, id)
  WHERE owner IS NULL AND status = 'active' AND activity NOT IN ('paused', 'blocked') AND lane IS NOT NULL
    AND started_at IS NULL;
CREATE INDEX runs_queued_due ON @schema@.runs (workspace, workflow, version, wake_at)
  WHERE owner IS NULL AND status = 'active' AND activity NOT IN ('paused', 'blocked') AND lane IS NOT NULL
    AND started_at IS NULL;
CREATE INDEX runs_resumed ON @schema@.runs (workspace, workflow, version, wake_at)
  WHERE owner IS NULL AND status = 'active' AND activity NOT IN ('paused', 'blocked') AND lane IS NOT NULL
    AND started_at IS NOT NULL;
CREATE INDEX runs_lane ON @schema@.runs (workspace, workflow, lane, status) WHERE lane IS NOT NULL;
CREATE INDEX runs_tags ON @schema@.runs USING gin (tags) WHERE tags IS NOT NULL;
CREATE INDEX runs_attributes ON @schema@.runs USING gin (attributes jsonb_path_ops) WHERE attributes IS NOT NULL;

-- ------------------------------------------------------------------ tables

-- What the newest run of a lane has said of it. (The function `lanes` of version 1 speaks of routes and priorities.)
CREATE TABLE @schema@.lanes (
  touched_at bigint NOT NULL,   -- when a run of it was last started, to the hour: what is old may be deleted
  weight double precision NOT NULL,
  workspace text COLLATE "C" NOT NULL,
  workflow text COLLATE "C" NOT NULL,
  key text COLLATE "C" NOT NULL,
  rules jsonb NOT NULL,
  PRIMARY KEY (workspace, workflow, key)
);

-- How often each lane was served, in virtual time (store/lanes.py); the highest `start` is the clock.
CREATE TABLE @schema@.turns (
  priority integer NOT NULL,
  start double precision NOT NULL,
  finish double precision NOT NULL,
  workspace text COLLATE "C" NOT NULL,
  workflow text COLLATE "C" NOT NULL,
  lane text COLLATE "C" NOT NULL,
  PRIMARY KEY (workspace, workflow, priority, lane)
);
CREATE INDEX turns_clock ON @schema@.turns (workspace, workflow, priority, start);

-- The moments that a throttle or a rate counts, numbered without gaps: whether one more may go is a look at one row.
CREATE TABLE @schema@.moments (
  at bigint NOT NULL,
  until bigint NOT NULL,   -- after which it counts no more
  number bigint NOT NULL,
  key text COLLATE "C" NOT NULL,   -- 'throttle:' or 'rate:', and the rule's
  PRIMARY KEY (key, number)
);
CREATE INDEX moments_past ON @schema@.moments (until);

-- Policies that events share: locked, in order of key, for as long as one decides.
CREATE TABLE @schema@.policies (
  opened_at bigint,    -- of debounce and batch: when the first event came
  members integer,     -- of batch
  used_at bigint NOT NULL,
  key text COLLATE "C" PRIMARY KEY,   -- 'rate:', 'singleton:' or 'window:', and the rule's
  run_id text COLLATE "C"   -- the run that waits, or the newest
);
CREATE INDEX policies_used ON @schema@.policies (used_at);

CREATE SEQUENCE @schema@.event_numbers;
CREATE TABLE @schema@.events (
  number bigint NOT NULL,
  received_at bigint NOT NULL,
  settled boolean NOT NULL,
  id text COLLATE "C" PRIMARY KEY,
  workspace text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  dedupe_id text COLLATE "C",
  admissions jsonb NOT NULL,
  meta bytea,
  data bytea NOT NULL
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
CREATE UNIQUE INDEX events_dedupe ON @schema@.events (workspace, dedupe_id) WHERE dedupe_id IS NOT NULL;
CREATE INDEX events_listed ON @schema@.events (workspace, number);
CREATE INDEX events_named ON @schema@.events (workspace, name, number);
CREATE INDEX events_received ON @schema@.events (workspace, received_at);
CREATE INDEX events_unsettled ON @schema@.events (number) WHERE NOT settled;

ALTER TABLE @schema@.event_waiters
  ADD COLUMN number bigint GENERATED ALWAYS AS IDENTITY,   -- the order in which they were opened
  ADD COLUMN workspace text COLLATE "C",
  ADD COLUMN probe text COLLATE "C" NOT NULL DEFAULT '';
UPDATE @schema@.event_waiters w SET workspace = r.workspace FROM @schema@.runs r WHERE r.id = w.run_id;
DROP INDEX @schema@.event_waiters_event;
CREATE INDEX event_waiters_probe ON @schema@.event_waiters (workspace, event, probe);

CREATE TABLE @schema@.items (
  version bigint NOT NULL,
  due_at bigint,
  expires_at bigint,
  updated_at bigint NOT NULL,
  kind text COLLATE "C" NOT NULL,
  workspace text COLLATE "C" NOT NULL,
  id text COLLATE "C" NOT NULL,
  data bytea NOT NULL,
  PRIMARY KEY (kind, workspace, id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
CREATE INDEX items_due ON @schema@.items (kind, due_at, workspace, id) WHERE due_at IS NOT NULL;
CREATE INDEX items_changed ON @schema@.items (kind, updated_at);
CREATE INDEX items_expired ON @schema@.items (expires_at) WHERE expires_at IS NOT NULL;

-- ------------------------------------------------------------------ looking for runs

-- Small and capital letters alike, by Unicode where this server can.
DO $do$
BEGIN
  EXECUTE format(
    'CREATE FUNCTION @schema@.folded(p_text text) RETURNS text LANGUAGE sql IMMUTABLE RETURN lower(p_text COLLATE %s)',
    CASE WHEN EXISTS (SELECT FROM pg_catalog.pg_collation WHERE collname = 'und-x-icu') THEN 'pg_catalog."und-x-icu"'
         ELSE '"default"' END);
END $do$;

-- A number below those of all runs of this workspace that were created at `p_at` or later, close to the first of them. Runs are
-- numbered in the order of creation but for what a statement may take, far less than a minute: any run that is older by so
-- much is a bound, and halving finds one that is close.
CREATE FUNCTION @schema@.number_before(p_workspace text, p_at bigint) RETURNS bigint LANGUAGE plpgsql STABLE
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
  v_low bigint := 0;
  v_high bigint;
  v_created bigint;
  v_number bigint;
BEGIN
  SELECT max(r.number) + 1 INTO v_high FROM @schema@.runs r WHERE r.workspace = p_workspace;
  WHILE v_high - v_low > 1 LOOP
    SELECT r.number, r.created_at INTO v_number, v_created FROM @schema@.runs r
    WHERE r.workspace = p_workspace AND r.number >= (v_low + v_high) / 2 ORDER BY r.number LIMIT 1;
    IF v_created < p_at - 60000000 AND v_number < v_high THEN
      v_low := v_number;
    ELSE
      v_high := (v_low + v_high) / 2;
    END IF;
  END LOOP;
  RETURN v_low;
END $$;

-- The same from the other side: a number above those of all that were created before `p_at`.
CREATE FUNCTION @schema@.number_behind(p_workspace text, p_at bigint) RETURNS bigint LANGUAGE plpgsql STABLE
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
  v_low bigint := 0;
  v_high bigint;
  v_created bigint;
  v_number bigint;
BEGIN
  SELECT max(r.number) + 1 INTO v_high FROM @schema@.runs r WHERE r.workspace = p_workspace;
  WHILE v_high - v_low > 1 LOOP
    SELECT r.number, r.created_at INTO v_number, v_created FROM @schema@.runs r
    WHERE r.workspace = p_workspace AND r.number <= (v_low + v_high) / 2 ORDER BY r.number DESC LIMIT 1;
    IF v_created >= p_at + 60000000 AND v_number > v_low THEN
      v_high := v_number;
    ELSE
      v_low := (v_low + v_high) / 2;
    END IF;
  END LOOP;
  RETURN v_high;
END $$;

-- ------------------------------------------------------------------ starting

-- The lanes of these runs, as the newest of them says. One that is as it was is not written, but for once an hour.
CREATE FUNCTION @schema@.touch_lanes(p_runs jsonb, p_now bigint) RETURNS void LANGUAGE sql
AS $$
  INSERT INTO @schema@.lanes AS l (workspace, workflow, key, rules, weight, touched_at)
  SELECT g.workspace, g.workflow, g.key, g.rules, g.weight, p_now
  FROM (
    SELECT DISTINCT ON (n->>'workspace', n->>'workflow', n->'lane'->>'key')
      n->>'workspace' AS workspace, n->>'workflow' AS workflow, n->'lane'->>'key' AS key,
      n->'lane'->'rules' AS rules, (n->'lane'->>'weight')::double precision AS weight
    FROM jsonb_array_elements(p_runs) WITH ORDINALITY AS x(n, place) WHERE n ? 'lane'
    ORDER BY n->>'workspace', n->>'workflow', n->'lane'->>'key', place DESC) g
  WHERE NOT EXISTS (
    SELECT 1 FROM @schema@.lanes t
    WHERE t.workspace = g.workspace AND t.workflow = g.workflow AND t.key = g.key AND t.rules = g.rules
      AND t.weight = g.weight AND t.touched_at > p_now - 3600000000)
  ORDER BY 1, 2, 3
  ON CONFLICT (workspace, workflow, key) DO UPDATE
  SET rules = excluded.rules, weight = excluded.weight, touched_at = excluded.touched_at
$$;

-- As before; `lane` (an object with key, rules, weight) and `meta` stand in a run only if it has them.
CREATE OR REPLACE FUNCTION @schema@.start_runs(p_runs jsonb) RETURNS text[] LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
  v_born text[];
BEGIN
  WITH born AS (
    INSERT INTO @schema@.runs (
      id, workspace, workflow, version, input, input_hash, idempotency_key, priority, tags, attributes, parent_run_id,
      parent_key, parent_ordinal, owner, epoch, seq, activity, wake_at, created_at, started_at, updated_at,
      lane, meta)
    SELECT
      n.id, n.workspace, n.workflow, n.version, decode(n.input, 'base64'), n.input_hash, n.idempotency_key, n.priority,
      n.tags, n.attributes, n.parent->>'run_id', n.parent->>'key', (n.parent->>'ordinal')::integer, n.owner,
      CASE WHEN n.owner IS NULL THEN 0 ELSE 1 END,
      n.seq,
      CASE WHEN n.owner IS NOT NULL THEN 'executing' WHEN n.wake_at > v_now THEN 'scheduled' ELSE 'queued' END,
      CASE WHEN n.owner IS NULL THEN coalesce(n.wake_at, v_now) END,
      v_now, CASE WHEN n.owner IS NOT NULL THEN v_now END, v_now, n.lane->>'key', decode(n.meta, 'base64')
    FROM jsonb_to_recordset(p_runs) AS n(
      id text, workspace text, workflow text, version text, input text, input_hash text, idempotency_key text,
      priority integer, tags text[], attributes jsonb, parent jsonb, owner text, seq integer, wake_at bigint,
      lane jsonb, meta text)
    ON CONFLICT DO NOTHING
    RETURNING id)
  SELECT array_agg(id) INTO v_born FROM born;
  INSERT INTO @schema@.journal (
    run_id, seq, at, kind, status, key, ordinal, name, attempt, fingerprint, payload, enqueued_at, started_at, finished_at)
  SELECT
    n->>'id', e.seq, e.at, e.kind, e.status, e.key, e.ordinal, e.name, e.attempt, e.fingerprint,
    decode(e.payload, 'base64'), e.enqueued_at, e.started_at, e.finished_at
  FROM (
    SELECT g AS n FROM jsonb_array_elements(p_runs) g WHERE cardinality(v_born) = jsonb_array_length(p_runs)
    UNION ALL  -- or of each run that is new the first, if it is given twice
    SELECT f.g FROM (
      SELECT DISTINCT ON (g->>'id') g FROM jsonb_array_elements(p_runs) WITH ORDINALITY AS x(g, place)
      WHERE cardinality(v_born) < jsonb_array_length(p_runs) AND g->>'id' = ANY (v_born)
      ORDER BY g->>'id', place) f) given, jsonb_to_recordset(n->'entries') AS e(
    seq integer, at bigint, kind text, status text, key text, ordinal integer, name text, attempt integer,
    fingerprint text, payload text, enqueued_at bigint, started_at bigint, finished_at bigint);
  IF v_born IS NOT NULL AND p_runs @? '$[*].lane' THEN
    PERFORM @schema@.touch_lanes(
      (SELECT jsonb_agg(n ORDER BY place) FROM jsonb_array_elements(p_runs) WITH ORDINALITY AS x(n, place)
       WHERE n->>'id' = ANY (v_born)), v_now);
  END IF;
  RETURN coalesce(v_born, '{}');
END $$;

-- ------------------------------------------------------------------ commits

-- As before; `wake` has an empty name too if slots have become free.
CREATE OR REPLACE FUNCTION @schema@.commit_runs(
  p_ids text[], p_epochs integer[], p_expected integer[], p_commit_ids text[], p_seqs integer[],
  p_inbox_reads integer[], p_progressed boolean[], p_statuses text[], p_activities text[], p_suspends boolean[],
  p_wake_ats bigint[], p_outputs bytea[], p_errors bytea[],
  j_run_ids text[], j_seqs integer[], j_ats bigint[], j_kinds text[], j_statuses text[], j_keys text[],
  j_ordinals integer[], j_names text[], j_attempts integer[], j_fingerprints text[], j_payloads bytea[],
  j_enqueued_ats bigint[], j_started_ats bigint[], j_finished_ats bigint[],
  p_effects jsonb,
  OUT places integer[], OUT mail integer[], OUT wake jsonb
) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
  v_passed text[];
  v_ended text[];
  v_places integer[];
  v_mail integer[];
BEGIN
  IF p_effects IS NOT NULL THEN
    -- Rows of other runs are touched too: all of them are locked in one order before anything is changed.
    PERFORM 1 FROM @schema@.runs r
    WHERE r.id = ANY (p_ids || ARRAY(SELECT m->'message'->>'run_id' FROM jsonb_array_elements(p_effects->'messages') m))
    ORDER BY r.id FOR NO KEY UPDATE;
  END IF;

  WITH changed AS (
    UPDATE @schema@.runs r SET
      seq = v.seq,
      commit_id = v.commit_id,
      updated_at = v_now,
      inbox_read = coalesce(v.inbox_read, r.inbox_read),
      recovery_attempts = CASE WHEN v.progressed THEN 0 ELSE r.recovery_attempts END,
      status = coalesce(v.status, r.status),
      activity = coalesce(v.activity, r.activity),
      finished_at = CASE WHEN v.status IS NULL THEN r.finished_at ELSE v_now END,
      owner = CASE WHEN v.status IS NOT NULL OR v.suspend THEN NULL ELSE r.owner END,
      output = CASE WHEN v.status IS NULL THEN r.output ELSE v.output END,
      error = CASE
        WHEN v.status IS NOT NULL OR v.activity = 'blocked' THEN v.error
        WHEN v.activity IS NOT NULL THEN NULL
        ELSE r.error END,
      wake_at = CASE
        WHEN v.status IS NOT NULL THEN NULL
        WHEN v.suspend IS NOT TRUE THEN r.wake_at
        WHEN r.inbox_last > coalesce(v.inbox_read, r.inbox_read)
          AND coalesce(v.activity, r.activity) NOT IN ('paused', 'blocked') THEN v_now
        ELSE v.wake_at END
    FROM unnest(
      p_ids, p_epochs, p_expected, p_commit_ids, p_seqs, p_inbox_reads, p_progressed, p_statuses, p_activities,
      p_suspends, p_wake_ats, p_outputs, p_errors) WITH ORDINALITY AS v(
      id, epoch, expected, commit_id, seq, inbox_read, progressed, status, activity, suspend, wake_at, output, error,
      place)
    WHERE r.id = v.id AND r.epoch = v.epoch AND r.seq = v.expected AND r.status = 'active'
      AND r.commit_id IS DISTINCT FROM v.commit_id
    RETURNING v.place::integer AS place, r.id, r.inbox_last, v.status)
  SELECT array_agg(c.place), array_agg(c.id), array_agg(c.inbox_last), array_agg(c.id) FILTER (WHERE c.status IS NOT NULL)
  INTO places, v_passed, mail, v_ended FROM changed c;

  IF cardinality(v_passed) = cardinality(p_ids) THEN
    INSERT INTO @schema@.journal (
      run_id, seq, at, kind, status, key, ordinal, name, attempt, fingerprint, payload, enqueued_at, started_at,
      finished_at)
    SELECT * FROM unnest(
      j_run_ids, j_seqs, j_ats, j_kinds, j_statuses, j_keys, j_ordinals, j_names, j_attempts, j_fingerprints,
      j_payloads, j_enqueued_ats, j_started_ats, j_finished_ats);
  ELSE
    INSERT INTO @schema@.journal (
      run_id, seq, at, kind, status, key, ordinal, name, attempt, fingerprint, payload, enqueued_at, started_at,
      finished_at)
    SELECT * FROM unnest(
      j_run_ids, j_seqs, j_ats, j_kinds, j_statuses, j_keys, j_ordinals, j_names, j_attempts, j_fingerprints,
      j_payloads, j_enqueued_ats, j_started_ats, j_finished_ats) AS j(run_id)
    WHERE j.run_id = ANY (v_passed);
    -- Refused, but the row carries this very commit: it had succeeded before.
    SELECT array_agg(v.place::integer), array_agg(r.inbox_last) INTO v_places, v_mail
    FROM unnest(p_ids, p_commit_ids) WITH ORDINALITY AS v(id, commit_id, place)
    JOIN @schema@.runs r ON r.id = v.id AND r.commit_id = v.commit_id
    WHERE v_passed IS NULL OR v.id <> ALL (v_passed);
    places := coalesce(places, '{}') || coalesce(v_places, '{}');
    mail := coalesce(mail, '{}') || coalesce(v_mail, '{}');
  END IF;

  IF p_effects IS NOT NULL AND v_passed IS NOT NULL THEN
    wake := @schema@.apply_effects(p_effects, v_passed);
  END IF;
  IF v_ended IS NOT NULL THEN
    DELETE FROM @schema@.event_waiters w WHERE w.run_id = ANY (v_ended);
    DELETE FROM @schema@.slots s WHERE s.run_id = ANY (v_ended);
    IF FOUND THEN
      wake := coalesce(wake, '{}') || '{"": []}';
    END IF;
  END IF;
END $$;

-- What keeps a wait from opening in the midst of a publication of its event: whoever opens it has the lock alone, publishers
-- share it. A few keys for all names, since the server has room for some thousands of locks only.
CREATE FUNCTION @schema@.event_lock(p_workspace text, p_name text) RETURNS bigint LANGUAGE sql IMMUTABLE
RETURN hashtextextended('@schema@:event', hashtextextended(p_workspace || ' ' || p_name, 0) & 255);

-- As before, and items; `wake` has an empty name too if slots have become free.
CREATE OR REPLACE FUNCTION @schema@.apply_effects(p_effects jsonb, p_passed text[]) RETURNS jsonb LANGUAGE plpgsql
AS $$
DECLARE
  v_born jsonb;
  v_messages jsonb;
  v_wake jsonb;
  v_now bigint := @schema@.now_us();
BEGIN
  IF p_effects ? 'items' THEN
    -- Of each item the last word counts: it was put, or (without data) dropped.
    WITH words AS MATERIALIZED (
      SELECT DISTINCT ON (i.kind, r.workspace, i.id) i.kind, r.workspace, i.id, i.data, i.expires_at
      FROM ROWS FROM (jsonb_to_recordset(p_effects->'items') AS (
        "of" text, kind text, id text, data text, expires_at bigint)) WITH ORDINALITY AS i(
        "of", kind, id, data, expires_at, place)
      JOIN @schema@.runs r ON r.id = i."of" WHERE i."of" = ANY (p_passed)
      ORDER BY i.kind, r.workspace, i.id, i.place DESC),
    dropped AS (
      DELETE FROM @schema@.items x USING words w
      WHERE w.data IS NULL AND x.kind = w.kind AND x.workspace = w.workspace AND x.id = w.id)
    INSERT INTO @schema@.items AS x (kind, workspace, id, data, version, due_at, expires_at, updated_at)
    SELECT w.kind, w.workspace, w.id, decode(w.data, 'base64'), 1, NULL, w.expires_at, v_now
    FROM words w WHERE w.data IS NOT NULL ORDER BY 1, 2, 3
    ON CONFLICT (kind, workspace, id) DO UPDATE SET
      data = excluded.data, due_at = NULL, expires_at = excluded.expires_at, updated_at = v_now,
      version = CASE WHEN x.expires_at <= v_now THEN 1 ELSE x.version + 1 END;
  END IF;

  WITH fired AS (
    INSERT INTO @schema@.schedule_fires (schedule_id, occurrence, run_id)
    SELECT e->>'schedule_id', (e->>'occurrence')::bigint, e->'run'->>'id'
    FROM jsonb_array_elements(p_effects->'fires') e WHERE e->>'of' = ANY (p_passed)
    ON CONFLICT DO NOTHING
    RETURNING schedule_id, occurrence, run_id),
  born AS (
    SELECT e->'run' AS run FROM jsonb_array_elements(p_effects->'starts') e WHERE e->>'of' = ANY (p_passed)
    UNION ALL
    SELECT e->'run' FROM jsonb_array_elements(p_effects->'fires') e
    JOIN fired f ON f.run_id = e->'run'->>'id' AND f.schedule_id = e->>'schedule_id'
      AND f.occurrence = (e->>'occurrence')::bigint)
  SELECT jsonb_agg(run) INTO v_born FROM born;
  IF v_born IS NOT NULL THEN
    PERFORM @schema@.start_runs(v_born);
  END IF;

  SELECT jsonb_agg(e) INTO v_messages
  FROM jsonb_array_elements(p_effects->'messages') e WHERE e->>'of' = ANY (p_passed);
  IF v_messages IS NOT NULL THEN
    WITH told AS (
      SELECT DISTINCT v_messages->(s.place::integer - 1)->>'of' AS run, s.run_owner
      FROM @schema@.send_messages((SELECT jsonb_agg(e->'message') FROM jsonb_array_elements(v_messages) e)) s
      WHERE s.run_owner IS NOT NULL),
    owners AS (SELECT run, jsonb_agg(run_owner) AS owners FROM told GROUP BY run)
    SELECT jsonb_object_agg(run, owners) INTO v_wake FROM owners;
  END IF;

  IF jsonb_array_length(p_effects->'opened') > 0 THEN
    INSERT INTO @schema@.event_waiters AS x (run_id, id, event, match, expires_at, probe, workspace)
    SELECT w."of", w.id, w.event, decode(w.match, 'base64'), w.expires_at, coalesce(w.probe, ''), r.workspace
    FROM jsonb_to_recordset(p_effects->'opened') AS w(
      "of" text, id text, event text, match text, expires_at bigint, probe text)
    JOIN @schema@.runs r ON r.id = w."of"
    WHERE w."of" = ANY (p_passed)
    ON CONFLICT (run_id, id) DO UPDATE
    SET event = excluded.event, match = excluded.match, expires_at = excluded.expires_at, probe = excluded.probe;
    -- Whoever publishes such an event now is waited for: what it did not see here, a look back will see there.
    PERFORM pg_advisory_xact_lock(k) FROM (
      SELECT DISTINCT @schema@.event_lock(r.workspace, w.event) AS k
      FROM jsonb_to_recordset(p_effects->'opened') AS w("of" text, event text)
      JOIN @schema@.runs r ON r.id = w."of" WHERE w."of" = ANY (p_passed) ORDER BY 1) locks;
  END IF;
  DELETE FROM @schema@.event_waiters w
  USING jsonb_to_recordset(p_effects->'closed') AS c("of" text, id text)
  WHERE w.run_id = c."of" AND w.id = c.id AND c."of" = ANY (p_passed);

  -- One at a time: two effects of one run follow each other.
  DECLARE
    e jsonb;
  BEGIN
    FOR e IN SELECT x FROM jsonb_array_elements(p_effects->'attributes') x WHERE x->>'of' = ANY (p_passed) LOOP
      UPDATE @schema@.runs r SET
        attributes = jsonb_strip_nulls(coalesce(r.attributes, '{}') || (e->'attributes')),
        tags = CASE WHEN jsonb_typeof(e->'tags') = 'array'
          THEN ARRAY(SELECT jsonb_array_elements_text(e->'tags')) ELSE r.tags END
      WHERE r.id = e->>'of';
    END LOOP;
  END;
  DELETE FROM @schema@.slots s
  USING jsonb_array_elements(p_effects->'freed') f
  WHERE s.run_id = f->>'of' AND f->>'of' = ANY (p_passed)
    AND (jsonb_typeof(f->'keys') = 'null' OR f->'keys' ? s.key);
  IF FOUND THEN
    v_wake := coalesce(v_wake, '{}') || '{"": []}';
  END IF;
  RETURN v_wake;
END $$;

-- As before; a paused run too.
CREATE OR REPLACE FUNCTION @schema@.requeue_run(
  p_id text, p_commit_id text, p_activity text,
  j_at bigint, j_kind text, j_status text, j_key text, j_ordinal integer, j_name text, j_attempt integer,
  j_fingerprint text, j_payload bytea, j_enqueued_at bigint, j_started_at bigint, j_finished_at bigint
) RETURNS boolean LANGUAGE plpgsql
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
  v_seq integer;
BEGIN
  UPDATE @schema@.runs r SET
    status = 'active', activity = p_activity, epoch = r.epoch + 1, seq = r.seq + 1, commit_id = p_commit_id, owner = NULL,
    recovery_attempts = 0, output = NULL, error = NULL, finished_at = NULL, wake_at = v_now, updated_at = v_now
  WHERE r.id = p_id AND r.commit_id IS DISTINCT FROM p_commit_id
    AND (r.status IN ('dead', 'failed') OR (r.status = 'active' AND r.activity IN ('blocked', 'paused')))
  RETURNING r.seq INTO v_seq;
  IF v_seq IS NULL THEN
    RETURN EXISTS (SELECT 1 FROM @schema@.runs r WHERE r.id = p_id AND r.commit_id = p_commit_id);
  END IF;
  DELETE FROM @schema@.slots s WHERE s.run_id = p_id;
  INSERT INTO @schema@.journal (
    run_id, seq, at, kind, status, key, ordinal, name, attempt, fingerprint, payload, enqueued_at, started_at, finished_at)
  VALUES (p_id, v_seq, j_at, j_kind, j_status, j_key, j_ordinal, j_name, j_attempt, j_fingerprint, j_payload,
          j_enqueued_at, j_started_at, j_finished_at);
  RETURN true;
END $$;

-- ------------------------------------------------------------------ claims

-- As before, of runs that have no lane: of these routes the priorities that have due or waiting runs.
CREATE OR REPLACE FUNCTION @schema@.lanes(p_workspaces text[], p_workflows text[], p_versions text[])
RETURNS TABLE (workspace text, workflow text, version text, priority integer) LANGUAGE sql STABLE
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
  WITH RECURSIVE lanes AS (
    SELECT w.workspace, w.workflow, w.version, (
      SELECT max(x.priority) FROM @schema@.runs x
      WHERE x.workspace = w.workspace AND x.workflow = w.workflow AND x.version = w.version
        AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked') AND x.lane IS NULL) AS priority
    FROM (SELECT DISTINCT * FROM unnest(p_workspaces, p_workflows, p_versions)) w(workspace, workflow, version)
    UNION ALL
    SELECT l.workspace, l.workflow, l.version, (
      SELECT max(x.priority) FROM @schema@.runs x
      WHERE x.workspace = l.workspace AND x.workflow = l.workflow AND x.version = l.version
        AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked') AND x.lane IS NULL
        AND x.priority < l.priority)
    FROM lanes l WHERE l.priority IS NOT NULL)
  SELECT l.workspace, l.workflow, l.version, l.priority FROM lanes l WHERE l.priority IS NOT NULL
$$;

-- One claim at a time for each workflow of these that has runs with a lane. A few keys for all workflows, since the server has
-- room for some thousands of locks only. Returns the time after waiting.
CREATE FUNCTION @schema@.lock_workflows(p_workspaces text[], p_workflows text[]) RETURNS bigint LANGUAGE plpgsql
AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(k) FROM (
    SELECT DISTINCT hashtextextended('@schema@:lanes', hashtextextended(w.workspace || ' ' || w.workflow, 0) & 255) AS k
    FROM unnest(p_workspaces, p_workflows) w(workspace, workflow)
    WHERE EXISTS (SELECT 1 FROM @schema@.lanes l WHERE l.workspace = w.workspace AND l.workflow = w.workflow)
    ORDER BY 1) locks;
  RETURN @schema@.now_us();
END $$;

-- Whether a run lacks a slot that its lane asks for.
CREATE FUNCTION @schema@.lacks(p_run text, p_workspace text, p_workflow text, p_lane text) RETURNS boolean LANGUAGE sql STABLE
RETURN EXISTS (
  SELECT 1 FROM @schema@.lanes l CROSS JOIN LATERAL jsonb_to_recordset(l.rules) AS r(key text, kind text)
  WHERE l.workspace = p_workspace AND l.workflow = p_workflow AND l.key = p_lane AND r.kind = 'slots'
    AND NOT EXISTS (SELECT 1 FROM @schema@.slots s WHERE s.run_id = p_run AND s.key = r.key));

-- Orphans of `p_gone` that lack a slot are freed, and queue. Returns the due runs of these routes that hold all slots they
-- need, and at least one: they wait for nothing.
CREATE FUNCTION @schema@.holding(
  p_workspaces text[], p_workflows text[], p_versions text[], p_gone text[], p_now bigint
) RETURNS text[] LANGUAGE plpgsql
AS $$
BEGIN
  IF cardinality(p_gone) > 0 THEN
    UPDATE @schema@.runs r SET
      owner = NULL, epoch = r.epoch + 1, wake_at = p_now, updated_at = p_now,
      first_due = coalesce(r.first_due, r.wake_at, p_now),
      recovery_attempts = r.recovery_attempts + (r.activity = 'executing')::integer,
      activity = CASE r.activity WHEN 'executing' THEN 'queued' ELSE r.activity END
    WHERE r.id = ANY (ARRAY(
      SELECT x.id FROM @schema@.runs x
      JOIN (SELECT DISTINCT * FROM unnest(p_workspaces, p_workflows, p_versions)) w(workspace, workflow, version)
        ON x.workspace = w.workspace AND x.workflow = w.workflow AND x.version = w.version
      WHERE x.owner = ANY (p_gone) AND x.lane IS NOT NULL AND x.activity NOT IN ('paused', 'blocked')
        AND @schema@.lacks(x.id, x.workspace, x.workflow, x.lane)
      ORDER BY x.id FOR NO KEY UPDATE OF x SKIP LOCKED));
  END IF;
  RETURN ARRAY(
    SELECT r.id FROM @schema@.resumed(p_workspaces, p_workflows, p_versions, p_now) r WHERE r.holds AND NOT r.lacks);
END $$;

-- Due runs of these routes that have a lane and have begun before.
CREATE FUNCTION @schema@.resumed(p_workspaces text[], p_workflows text[], p_versions text[], p_now bigint)
RETURNS TABLE (
  workspace text, workflow text, lane text, id text, priority integer, rank bigint, holds boolean, lacks boolean
) LANGUAGE sql STABLE
AS $$
  SELECT r.workspace, r.workflow, r.lane, r.id, r.priority, coalesce(r.first_due, r.wake_at) - r.priority * 60000000::bigint,
    EXISTS (SELECT 1 FROM @schema@.slots s WHERE s.run_id = r.id),
    @schema@.lacks(r.id, r.workspace, r.workflow, r.lane)
  FROM (SELECT DISTINCT * FROM unnest(p_workspaces, p_workflows, p_versions)) w(workspace, workflow, version)
  JOIN @schema@.runs r ON r.workspace = w.workspace AND r.workflow = w.workflow AND r.version = w.version
  WHERE r.owner IS NULL AND r.status = 'active' AND r.activity NOT IN ('paused', 'blocked') AND r.lane IS NOT NULL
    AND r.started_at IS NOT NULL AND r.wake_at <= p_now
$$;

-- The first in a lane, behind (p_rank, p_id), of the due runs that have never begun. Priority by priority, so that neither a
-- long backlog nor many sleepers are walked through.
CREATE FUNCTION @schema@.queued_head(
  p_workspace text, p_workflow text, p_versions text[], p_lane text, p_now bigint, p_rank bigint, p_id text
) RETURNS TABLE (id text, priority integer, rank bigint) LANGUAGE sql STABLE
AS $$
  WITH RECURSIVE steps AS (
    SELECT v.version, (
      SELECT min(x.priority) FROM @schema@.runs x
      WHERE x.workspace = p_workspace AND x.workflow = p_workflow AND x.version = v.version AND x.lane = p_lane
        AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked')
        AND x.started_at IS NULL) AS priority
    FROM unnest(p_versions) v(version)
    UNION ALL
    SELECT s.version, (
      SELECT min(x.priority) FROM @schema@.runs x
      WHERE x.workspace = p_workspace AND x.workflow = p_workflow AND x.version = s.version AND x.lane = p_lane
        AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked')
        AND x.started_at IS NULL AND x.priority > s.priority)
    FROM steps s WHERE s.priority IS NOT NULL)
  SELECT h.id, h.priority, h.rank FROM steps s CROSS JOIN LATERAL (
    SELECT x.id, x.priority, x.wake_at - x.priority * 60000000::bigint AS rank FROM @schema@.runs x
    WHERE x.workspace = p_workspace AND x.workflow = p_workflow AND x.version = s.version AND x.lane = p_lane
      AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked')
      AND x.started_at IS NULL AND x.priority = s.priority AND x.wake_at <= p_now
      AND (x.wake_at, x.id) > (coalesce(p_rank + s.priority * 60000000::bigint, -1), coalesce(p_id, ''))
    ORDER BY x.wake_at, x.id LIMIT 1) h
  WHERE s.priority IS NOT NULL
  ORDER BY h.rank, h.id LIMIT 1
$$;

-- When this throttle or rate lets the next one through; null: now.
CREATE FUNCTION @schema@.throttled_until(p_key text, p_limit bigint, p_period_us bigint, p_now bigint)
RETURNS bigint LANGUAGE sql STABLE
AS $$
  SELECT CASE WHEN p_limit < 1 THEN p_now + 86400000000 ELSE (
    SELECT m.at + p_period_us FROM @schema@.moments m
    WHERE m.key = p_key AND m.at > p_now - p_period_us AND m.number = 1 - p_limit + (
      SELECT max(t.number) FROM @schema@.moments t WHERE t.key = p_key)) END
$$;

-- Whether a lane's rules let this run go now: each slot it lacks has a free place, and, if it is `p_new`, each throttle is
-- open. `opens_at`: if throttles alone close it, when they do no more.
CREATE FUNCTION @schema@.fits(p_rules jsonb, p_run text, p_new boolean, p_now bigint, OUT fits boolean, OUT opens_at bigint)
LANGUAGE sql STABLE
AS $$
  WITH rules AS (
    SELECT r.kind, CASE
      WHEN r.kind = 'slots' AND NOT EXISTS (SELECT 1 FROM @schema@.slots s WHERE s.run_id = p_run AND s.key = r.key)
        AND (SELECT count(*) FROM @schema@.slots s WHERE s.key = r.key) >= r."limit" THEN 0
      WHEN r.kind <> 'slots' AND p_new THEN @schema@.throttled_until('throttle:' || r.key, r."limit", r.period_us, p_now)
    END AS closed_until
    FROM jsonb_to_recordset(p_rules) AS r(key text, "limit" bigint, kind text, period_us bigint))
  SELECT count(r.closed_until) = 0,
    CASE WHEN count(*) FILTER (WHERE r.kind = 'slots' AND r.closed_until IS NOT NULL) = 0 THEN max(r.closed_until) END
  FROM rules r
$$;

-- A free place among the slots of this key, taken; false if there is none. Workflows that share a key may try at once: the
-- primary key lets one of them have it, and the other looks again.
CREATE FUNCTION @schema@.take_slot(p_key text, p_limit bigint, p_run text, p_epoch integer) RETURNS boolean LANGUAGE plpgsql
AS $$
DECLARE
  v_number integer;
BEGIN
  LOOP
    SELECT CASE WHEN NOT EXISTS (SELECT 1 FROM @schema@.slots s WHERE s.key = p_key AND s.number = 0) THEN 0 ELSE (
      SELECT s.number + 1 FROM @schema@.slots s
      WHERE s.key = p_key AND NOT EXISTS (SELECT 1 FROM @schema@.slots t WHERE t.key = p_key AND t.number = s.number + 1)
      ORDER BY s.number LIMIT 1) END
    INTO v_number;
    IF (SELECT count(*) FROM @schema@.slots s WHERE s.key = p_key) >= p_limit THEN
      RETURN false;
    END IF;
    INSERT INTO @schema@.slots (key, number, run_id, epoch) VALUES (p_key, v_number, p_run, p_epoch)
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
      RETURN true;
    END IF;
  END LOOP;
END $$;

-- One more moment of this key, if it is open; those that no limit asks for any more go. The number is taken by one alone, as above.
CREATE FUNCTION @schema@.take_moment(p_key text, p_limit bigint, p_period_us bigint, p_now bigint) RETURNS boolean
LANGUAGE plpgsql
AS $$
DECLARE
  v_number bigint;
  v_at bigint;
BEGIN
  LOOP
    IF @schema@.throttled_until(p_key, p_limit, p_period_us, p_now) IS NOT NULL THEN
      RETURN false;
    END IF;
    SELECT m.number, m.at INTO v_number, v_at FROM @schema@.moments m WHERE m.key = p_key ORDER BY m.number DESC LIMIT 1;
    v_number := coalesce(v_number, 0) + 1;
    INSERT INTO @schema@.moments (key, number, at, until)
    VALUES (p_key, v_number, greatest(p_now, v_at), greatest(p_now, v_at) + p_period_us) ON CONFLICT DO NOTHING;
    EXIT WHEN FOUND;
  END LOOP;
  DELETE FROM @schema@.moments m WHERE m.key = p_key AND m.number <= v_number - p_limit AND m.until <= p_now;
  RETURN true;
END $$;

-- Turns of free runs (given in their order, with their ranks) and of lanes, lowest rank first, up to the limit: see
-- store/lanes.py, which this follows rule by rule. Takes slots, counts beginnings, moves virtual time on.
CREATE FUNCTION @schema@.take_turns(
  p_workspaces text[], p_workflows text[], p_versions text[], p_limit integer, p_now bigint, p_free text[],
  p_crashed boolean[], p_ranks bigint[], OUT ids text[], OUT crashed boolean[], OUT more boolean, OUT opens_at bigint
) LANGUAGE plpgsql
AS $$
DECLARE
  -- Lanes, one element each.
  q_workspaces text[];
  q_workflows text[];
  q_lanes text[];
  q_versions text[];      -- as array literals
  q_rules jsonb[];
  q_weights double precision[];
  -- Their heads. An id that is null: nobody more of this lane.
  h_ids text[];
  h_priorities integer[];
  h_ranks bigint[];
  h_new boolean[];
  h_finishes double precision[];
  -- Runs that have begun before, by lane in their order.
  d_ids text[];
  d_priorities integer[];
  d_ranks bigint[];
  d_next integer[];       -- of each lane: the next one's place
  d_last integer[];
  v_shared text[];        -- keys that stand in the rules of several lanes
  v_place integer := 0;   -- of the free runs: how many are taken
  v_best integer;
  v_start double precision;
  v_opens bigint;
  v_fits boolean;
  v_keys text[];
  v_rule record;
  v_next record;
  n integer;
BEGIN
  ids := '{}';
  crashed := '{}';
  more := false;

  -- The lanes that have due runs: one seek each, and their heads.
  WITH RECURSIVE routes AS MATERIALIZED (
    SELECT DISTINCT * FROM unnest(p_workspaces, p_workflows, p_versions) w(workspace, workflow, version)),
  due AS MATERIALIZED (
    SELECT r.*, row_number() OVER (ORDER BY r.workspace, r.workflow, r.lane, r.holds DESC, r.rank, r.id) AS place
    FROM @schema@.resumed(p_workspaces, p_workflows, p_versions, p_now) r WHERE r.lacks OR NOT r.holds),
  begun AS (
    SELECT d.workspace, d.workflow, d.lane, min(d.place) AS first, max(d.place) AS last FROM due d GROUP BY 1, 2, 3),
  queued AS (
    SELECT w.workspace, w.workflow, w.version, (
      SELECT min(x.lane) FROM @schema@.runs x
      WHERE x.workspace = w.workspace AND x.workflow = w.workflow AND x.version = w.version AND x.lane IS NOT NULL
        AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked')
        AND x.started_at IS NULL) AS lane
    FROM routes w
    UNION ALL
    SELECT q.workspace, q.workflow, q.version, (
      SELECT min(x.lane) FROM @schema@.runs x
      WHERE x.workspace = q.workspace AND x.workflow = q.workflow AND x.version = q.version AND x.lane > q.lane
        AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked')
        AND x.started_at IS NULL)
    FROM queued q WHERE q.lane IS NOT NULL),
  known AS (
    SELECT q.workspace, q.workflow, q.lane FROM queued q WHERE q.lane IS NOT NULL
    UNION
    SELECT b.workspace, b.workflow, b.lane FROM begun b),
  described AS MATERIALIZED (
    SELECT k.*, b.first, b.last, coalesce(l.rules, '[]') AS rules, coalesce(l.weight, 1) AS weight,
      ARRAY(SELECT w.version FROM routes w WHERE w.workspace = k.workspace AND w.workflow = k.workflow) AS versions,
      -- A lane whose next is a new run has no place for it, whichever that is.
      b.first IS NULL AND EXISTS (
        SELECT 1 FROM jsonb_to_recordset(coalesce(l.rules, '[]')) AS r(key text, "limit" bigint, kind text)
        WHERE r.kind = 'slots' AND (SELECT count(*) FROM @schema@.slots s WHERE s.key = r.key) >= r."limit") AS full
    FROM known k
    LEFT JOIN begun b ON b.workspace = k.workspace AND b.workflow = k.workflow AND b.lane = k.lane
    LEFT JOIN @schema@.lanes l ON l.workspace = k.workspace AND l.workflow = k.workflow AND l.key = k.lane),
  heads AS MATERIALIZED (
    SELECT x.*, h.id, h.priority, h.rank, x.first IS NULL AS new
    FROM described x CROSS JOIN LATERAL (
      SELECT d.id, d.priority, d.rank FROM due d WHERE d.place = x.first
      UNION ALL
      SELECT y.id, y.priority, y.rank
      FROM @schema@.queued_head(x.workspace, x.workflow, x.versions, x.lane, p_now, NULL, NULL) y
      WHERE x.first IS NULL) h
    WHERE NOT x.full),
  judged AS MATERIALIZED (
    SELECT h.*, f.fits, f.opens_at, coalesce(t.finish, 0) AS finish, row_number() OVER () AS place
    FROM heads h CROSS JOIN LATERAL @schema@.fits(h.rules, h.id, h.new, p_now) f
    LEFT JOIN @schema@.turns t ON t.workspace = h.workspace AND t.workflow = h.workflow AND t.priority = h.priority
      AND t.lane = h.lane)
  SELECT
    array_agg(j.workspace ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.workflow ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.lane ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.versions::text ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.rules ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.weight ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.id ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.priority ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.rank ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.new ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.finish ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.first::integer ORDER BY j.place) FILTER (WHERE j.fits),
    array_agg(j.last::integer ORDER BY j.place) FILTER (WHERE j.fits),
    min(j.opens_at),
    (SELECT array_agg(d.id ORDER BY d.place) FROM due d),
    (SELECT array_agg(d.priority ORDER BY d.place) FROM due d),
    (SELECT array_agg(d.rank ORDER BY d.place) FROM due d)
  INTO q_workspaces, q_workflows, q_lanes, q_versions, q_rules, q_weights, h_ids, h_priorities, h_ranks, h_new, h_finishes,
    d_next, d_last, opens_at, d_ids, d_priorities, d_ranks
  FROM judged j;
  v_shared := ARRAY(
    SELECT r.key FROM (SELECT DISTINCT q.place, e->>'key' AS key FROM unnest(q_rules) WITH ORDINALITY AS q(rules, place)
                       CROSS JOIN LATERAL jsonb_array_elements(q.rules) e) r
    GROUP BY r.key HAVING count(*) > 1);

  LOOP
    -- The lane whose turn it is: of each workflow the group of the lowest rank, and in it who was served least.
    WITH heads AS MATERIALIZED (
      SELECT * FROM unnest(q_workspaces, q_workflows, h_ids, h_priorities, h_ranks, h_finishes) WITH ORDINALITY AS h(
        workspace, workflow, id, priority, rank, finish, place)
      WHERE h.id IS NOT NULL),
    groups AS MATERIALIZED (
      SELECT g.*, coalesce((SELECT max(t.start) FROM @schema@.turns t WHERE t.workspace = g.workspace
                            AND t.workflow = g.workflow AND t.priority = g.priority), 0) AS clock
      FROM (SELECT DISTINCT ON (h.workspace, h.workflow) h.workspace, h.workflow, h.priority
            FROM heads h ORDER BY h.workspace, h.workflow, h.rank, h.priority DESC) g),
    firsts AS (
      SELECT DISTINCT ON (h.workspace, h.workflow) h.place, h.rank, h.id, greatest(h.finish, g.clock) AS start
      FROM heads h JOIN groups g ON g.workspace = h.workspace AND g.workflow = h.workflow AND g.priority = h.priority
      ORDER BY h.workspace, h.workflow, greatest(h.finish, g.clock), h.rank, h.id)
    SELECT f.place, f.start INTO v_best, v_start FROM firsts f ORDER BY f.rank, f.id LIMIT 1;

    WHILE v_place < cardinality(p_free) AND cardinality(ids) < p_limit
      AND (v_best IS NULL OR p_ranks[v_place + 1] <= h_ranks[v_best]) LOOP
      v_place := v_place + 1;
      ids := ids || p_free[v_place];
      crashed := crashed || p_crashed[v_place];
    END LOOP;
    IF cardinality(ids) >= p_limit THEN
      more := v_best IS NOT NULL OR v_place < cardinality(p_free);
      EXIT;
    END IF;
    EXIT WHEN v_best IS NULL;

    -- It is taken unless somebody writes to it just now, or another workflow was quicker at a key they share.
    PERFORM 1 FROM @schema@.runs r
    WHERE r.id = h_ids[v_best] AND r.owner IS NULL AND r.status = 'active' AND r.activity NOT IN ('paused', 'blocked')
      AND r.wake_at <= p_now
    FOR NO KEY UPDATE SKIP LOCKED;
    IF FOUND THEN
      v_fits := true;
      v_keys := '{}';
      FOR v_rule IN
        SELECT DISTINCT ON (r.kind, r.key) r.key, r."limit", r.kind, r.period_us
        FROM jsonb_to_recordset(q_rules[v_best]) AS r(key text, "limit" bigint, kind text, period_us bigint)
        WHERE CASE WHEN r.kind = 'slots'
          THEN NOT EXISTS (SELECT 1 FROM @schema@.slots s WHERE s.run_id = h_ids[v_best] AND s.key = r.key)
          ELSE h_new[v_best] END
        ORDER BY r.kind, r.key
      LOOP
        v_fits := CASE WHEN v_rule.kind = 'slots'
          THEN @schema@.take_slot(v_rule.key, v_rule."limit", h_ids[v_best],
                                  (SELECT r.epoch + 1 FROM @schema@.runs r WHERE r.id = h_ids[v_best]))
          ELSE @schema@.take_moment('throttle:' || v_rule.key, v_rule."limit", v_rule.period_us, p_now) END;
        EXIT WHEN NOT v_fits;
        v_keys := v_keys || v_rule.key;
      END LOOP;
      IF NOT v_fits THEN
        DELETE FROM @schema@.slots s WHERE s.run_id = h_ids[v_best] AND s.key = ANY (v_keys);
        -- The last of each key is ours: whoever adds one more waits for our end.
        DELETE FROM @schema@.moments m USING unnest(v_keys) k
        WHERE m.key = 'throttle:' || k
          AND m.number = (SELECT max(t.number) FROM @schema@.moments t WHERE t.key = 'throttle:' || k);
        h_ids[v_best] := NULL;
        CONTINUE;
      END IF;
      ids := ids || h_ids[v_best];
      crashed := crashed || false;
      INSERT INTO @schema@.turns AS t (workspace, workflow, priority, lane, start, finish)
      VALUES (q_workspaces[v_best], q_workflows[v_best], h_priorities[v_best], q_lanes[v_best], v_start,
              v_start + 1 / q_weights[v_best])
      ON CONFLICT (workspace, workflow, priority, lane) DO UPDATE SET start = excluded.start, finish = excluded.finish;
    ELSE
      v_keys := '{}';
    END IF;

    -- The next of this lane.
    IF d_next[v_best] < d_last[v_best] THEN
      d_next[v_best] := d_next[v_best] + 1;
      n := d_next[v_best];
      h_ids[v_best] := d_ids[n];
      h_priorities[v_best] := d_priorities[n];
      h_ranks[v_best] := d_ranks[n];
    ELSE
      SELECT * INTO v_next FROM @schema@.queued_head(
        q_workspaces[v_best], q_workflows[v_best], q_versions[v_best]::text[], q_lanes[v_best], p_now,
        CASE WHEN h_new[v_best] THEN h_ranks[v_best] END, CASE WHEN h_new[v_best] THEN h_ids[v_best] END);
      h_ids[v_best] := v_next.id;
      h_priorities[v_best] := v_next.priority;
      h_ranks[v_best] := v_next.rank;
      h_new[v_best] := true;
      d_next[v_best] := NULL;
    END IF;
    h_finishes[v_best] := coalesce(
      (SELECT t.finish FROM @schema@.turns t
       WHERE t.workspace = q_workspaces[v_best] AND t.workflow = q_workflows[v_best]
         AND t.priority = h_priorities[v_best] AND t.lane = q_lanes[v_best]), 0);

    -- Who does not fit any more: this lane, or others that share a key.
    FOR n IN
      SELECT q.place FROM unnest(h_ids, q_rules) WITH ORDINALITY AS q(id, rules, place)
      WHERE q.id IS NOT NULL AND (q.place = v_best OR (v_keys && v_shared AND EXISTS (
        SELECT 1 FROM jsonb_array_elements(q.rules) e WHERE e->>'key' = ANY (v_keys))))
    LOOP
      SELECT f.fits, f.opens_at INTO v_fits, v_opens FROM @schema@.fits(q_rules[n], h_ids[n], h_new[n], p_now) f;
      opens_at := least(opens_at, v_opens);
      IF NOT v_fits THEN
        h_ids[n] := NULL;
      END IF;
    END LOOP;
  END LOOP;
END $$;

-- When the next run with a lane falls due.
CREATE FUNCTION @schema@.next_laned(p_workspaces text[], p_workflows text[], p_versions text[], p_now bigint)
RETURNS bigint LANGUAGE sql STABLE
AS $$
  SELECT min(least(
    (SELECT min(x.wake_at) FROM @schema@.runs x
     WHERE x.workspace = w.workspace AND x.workflow = w.workflow AND x.version = w.version
       AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked') AND x.lane IS NOT NULL
       AND x.started_at IS NULL AND x.wake_at > p_now),
    (SELECT min(x.wake_at) FROM @schema@.runs x
     WHERE x.workspace = w.workspace AND x.workflow = w.workflow AND x.version = w.version
       AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked') AND x.lane IS NOT NULL
       AND x.started_at IS NOT NULL AND x.wake_at > p_now)))
  FROM unnest(p_workspaces, p_workflows, p_versions) w(workspace, workflow, version)
$$;

-- Blocked runs that lack a slot do not skip the queue: they are due, and tried again when their lane lets them.
CREATE FUNCTION @schema@.queue_blocked(p_workspaces text[], p_workflows text[], p_versions text[], p_after text, p_now bigint)
RETURNS void LANGUAGE sql
AS $$
  UPDATE @schema@.runs r SET
    activity = 'queued', error = NULL, wake_at = p_now, updated_at = p_now, first_due = coalesce(r.first_due, r.wake_at, p_now)
  WHERE r.id = ANY (ARRAY(
    SELECT x.id FROM @schema@.runs x
    WHERE x.activity = 'blocked' AND x.status = 'active' AND x.owner IS NULL AND x.lane IS NOT NULL AND x.id > p_after
      AND EXISTS (SELECT 1 FROM unnest(p_workspaces, p_workflows, p_versions) w(workspace, workflow, version)
                  WHERE w.workspace = x.workspace AND w.workflow = x.workflow AND w.version = x.version)
      AND @schema@.lacks(x.id, x.workspace, x.workflow, x.lane)
    ORDER BY x.id FOR NO KEY UPDATE SKIP LOCKED))
$$;

-- As before; and runs with a lane, if any is due, by the rules of store/lanes.py.
CREATE OR REPLACE FUNCTION @schema@.claim_runs(
  p_incarnation text, p_workspaces text[], p_workflows text[], p_versions text[], p_limit integer, p_blocked boolean,
  p_after text, p_confirm_us bigint, OUT ids text[], OUT crashed boolean[], OUT next_due_at bigint
) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
  v_next bigint;
  v_gone text[];
  v_laned_at bigint;      -- when a run with a lane is due
  v_laned boolean := false;
  v_holding text[] := '{}';
  v_ranks bigint[];
  v_more boolean;
  v_opens bigint;
BEGIN
  ids := '{}';
  crashed := '{}';
  IF NOT EXISTS (SELECT 1 FROM @schema@.engines e
                 WHERE e.incarnation = p_incarnation AND NOT e.dead AND e.expires_at > v_now) THEN
    RETURN;
  END IF;
  SELECT b.gone, b.look_again_at INTO v_gone, next_due_at
  FROM @schema@.bury(p_incarnation, p_workspaces, p_workflows, p_versions, p_confirm_us, v_now) b;

  IF p_blocked THEN
    PERFORM @schema@.queue_blocked(p_workspaces, p_workflows, p_versions, p_after, v_now);
    SELECT coalesce(array_agg(f.id ORDER BY f.id), '{}'), coalesce(array_agg(false), '{}') INTO ids, crashed FROM (
      SELECT r.id FROM @schema@.runs r
      WHERE r.activity = 'blocked' AND r.status = 'active' AND r.owner IS NULL AND r.id > p_after
        AND EXISTS (SELECT 1 FROM unnest(p_workspaces, p_workflows, p_versions) w(workspace, workflow, version)
                    WHERE w.workspace = r.workspace AND w.workflow = r.workflow AND w.version = r.version)
      ORDER BY r.id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED) f;
    next_due_at := NULL;
  ELSE
    SELECT min(least(
      (SELECT min(x.wake_at) FROM @schema@.runs x
       WHERE x.workspace = w.workspace AND x.workflow = w.workflow AND x.version = w.version
         AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked') AND x.lane IS NOT NULL
         AND x.started_at IS NULL),
      (SELECT min(x.wake_at) FROM @schema@.runs x
       WHERE x.workspace = w.workspace AND x.workflow = w.workflow AND x.version = w.version
         AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked') AND x.lane IS NOT NULL
         AND x.started_at IS NOT NULL)))
    INTO v_laned_at FROM unnest(p_workspaces, p_workflows, p_versions) w(workspace, workflow, version);
    v_laned := coalesce(v_laned_at <= v_now, false) OR (cardinality(v_gone) > 0 AND EXISTS (
      SELECT 1 FROM @schema@.runs r WHERE r.owner = ANY (v_gone) AND r.lane IS NOT NULL));
    IF v_laned THEN
      v_now := @schema@.lock_workflows(p_workspaces, p_workflows);
      v_holding := @schema@.holding(p_workspaces, p_workflows, p_versions, v_gone, v_now);
    ELSE
      next_due_at := least(next_due_at, v_laned_at);
    END IF;
    WITH lanes AS MATERIALIZED (SELECT * FROM @schema@.lanes(p_workspaces, p_workflows, p_versions)),
    orphans AS (
      SELECT r.id, r.priority, r.wake_at, r.number, r.activity = 'executing' AS crashed
      FROM @schema@.runs r JOIN (SELECT DISTINCT * FROM unnest(p_workspaces, p_workflows, p_versions)) w(
        workspace, workflow, version) ON r.workspace = w.workspace AND r.workflow = w.workflow AND r.version = w.version
      WHERE r.owner = ANY (v_gone) AND r.activity NOT IN ('paused', 'blocked')
        AND (r.lane IS NULL OR NOT @schema@.lacks(r.id, r.workspace, r.workflow, r.lane))
      ORDER BY r.priority DESC, r.wake_at NULLS FIRST LIMIT p_limit FOR NO KEY UPDATE OF r SKIP LOCKED),
    due AS (
      SELECT d.id, d.priority, d.wake_at, d.number, false AS crashed
      FROM lanes l CROSS JOIN LATERAL (
        SELECT x.id, x.priority, x.wake_at, x.number FROM @schema@.runs x
        WHERE x.workspace = l.workspace AND x.workflow = l.workflow AND x.version = l.version
          AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked') AND x.lane IS NULL
          AND x.priority = l.priority AND x.wake_at <= v_now
        ORDER BY x.wake_at, x.number LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED) d),
    holding AS (
      SELECT x.id, x.priority, x.wake_at, x.number, false AS crashed FROM @schema@.runs x
      WHERE x.id = ANY (v_holding) AND x.owner IS NULL AND x.status = 'active'
        AND x.activity NOT IN ('paused', 'blocked') AND x.wake_at <= v_now
      FOR NO KEY UPDATE SKIP LOCKED),
    found AS (
      SELECT c.*, row_number() OVER (ORDER BY c.priority DESC, c.wake_at NULLS FIRST, c.number) AS place
      FROM (SELECT * FROM orphans UNION ALL SELECT * FROM due UNION ALL SELECT * FROM holding) c)
    SELECT
      coalesce(array_agg(f.id ORDER BY f.place) FILTER (WHERE f.place <= p_limit), '{}'),
      coalesce(array_agg(f.crashed ORDER BY f.place) FILTER (WHERE f.place <= p_limit), '{}'),
      CASE WHEN v_laned THEN array_agg(coalesce(f.wake_at, 0) - f.priority * 60000000::bigint ORDER BY f.place) END,
      (SELECT min((
         SELECT min(x.wake_at) FROM @schema@.runs x
         WHERE x.workspace = l.workspace AND x.workflow = l.workflow AND x.version = l.version
           AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked') AND x.lane IS NULL
           AND x.priority = l.priority AND x.wake_at > v_now)) FROM lanes l)
    INTO ids, crashed, v_ranks, v_next FROM found f;
    next_due_at := least(next_due_at, v_next);
    IF v_laned THEN
      SELECT t.ids, t.crashed, t.more, t.opens_at INTO ids, crashed, v_more, v_opens
      FROM @schema@.take_turns(p_workspaces, p_workflows, p_versions, p_limit, v_now, ids, crashed, v_ranks) t;
      next_due_at := CASE WHEN v_more THEN v_now ELSE least(
        next_due_at, v_opens, @schema@.next_laned(p_workspaces, p_workflows, p_versions, v_now)) END;
    END IF;
    IF cardinality(ids) = p_limit AND EXISTS (
      SELECT 1 FROM @schema@.lanes(p_workspaces, p_workflows, p_versions) l CROSS JOIN LATERAL (
        SELECT x.id FROM @schema@.runs x
        WHERE x.workspace = l.workspace AND x.workflow = l.workflow AND x.version = l.version
          AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked') AND x.lane IS NULL
          AND x.priority = l.priority AND x.wake_at <= v_now
        ORDER BY x.wake_at LIMIT p_limit + 1) d
      WHERE d.id <> ALL (ids)) THEN
      next_due_at := v_now;  -- the limit has cut the list
    END IF;
  END IF;

  IF cardinality(ids) > 0 THEN
    UPDATE @schema@.runs r SET
      recovery_attempts = r.recovery_attempts + (r.owner IS NOT NULL AND r.activity = 'executing')::integer,
      activity = CASE
        WHEN r.activity = 'blocked' THEN r.activity
        WHEN r.recovery_attempts + (r.owner IS NOT NULL AND r.activity = 'executing')::integer > 0 THEN 'queued'
        ELSE 'executing' END,
      owner = p_incarnation, epoch = r.epoch + 1,
      first_due = CASE WHEN r.lane IS NOT NULL THEN coalesce(r.first_due, r.wake_at) END, started_at = coalesce(r.started_at, v_now), updated_at = v_now
    WHERE r.id = ANY (ids);
  END IF;
END $$;

-- As before; the slots of parked runs are free with them.
CREATE OR REPLACE FUNCTION @schema@.bury(
  p_claimer text, p_workspaces text[], p_workflows text[], p_versions text[], p_confirm_us bigint, p_now bigint,
  OUT gone text[], OUT look_again_at bigint
) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
  v_owners text[];
  v_vanished text[] := '{}';
  e record;
BEGIN
  gone := '{}';
  WITH RECURSIVE owners AS (
    SELECT min(r.owner) AS owner FROM @schema@.runs r WHERE r.owner IS NOT NULL
    UNION ALL
    SELECT (SELECT min(r.owner) FROM @schema@.runs r WHERE r.owner IS NOT NULL AND r.owner > o.owner)
    FROM owners o WHERE o.owner IS NOT NULL)
  SELECT array_agg(o.owner) INTO v_owners FROM owners o
  WHERE o.owner <> p_claimer AND EXISTS (
    SELECT 1 FROM unnest(p_workspaces, p_workflows, p_versions) w(workspace, workflow, version)
    WHERE EXISTS (SELECT 1 FROM @schema@.runs r WHERE r.owner = o.owner AND r.workspace = w.workspace
                  AND r.workflow = w.workflow AND r.version = w.version));
  IF v_owners IS NULL THEN
    RETURN;
  END IF;

  FOR e IN SELECT * FROM @schema@.engines x
           WHERE x.incarnation = ANY (v_owners) AND x.present AND NOT x.dead AND x.expires_at > p_now LOOP
    IF NOT pg_try_advisory_xact_lock_shared(@schema@.presence_key(e.incarnation)) THEN
      IF e.missed_at IS NOT NULL THEN
        UPDATE @schema@.engines x SET missed_at = NULL WHERE x.incarnation = e.incarnation;
      END IF;
    ELSIF e.missed_at IS NULL THEN
      UPDATE @schema@.engines x SET missed_at = p_now WHERE x.incarnation = e.incarnation AND x.missed_at IS NULL;
      look_again_at := least(look_again_at, p_now + p_confirm_us);
    ELSIF e.missed_at + p_confirm_us > p_now THEN
      look_again_at := least(look_again_at, e.missed_at + p_confirm_us);
    ELSE
      v_vanished := v_vanished || e.incarnation;
    END IF;
  END LOOP;

  -- The condition is looked at again under the row's lock: a heartbeat that came first keeps its engine alive.
  UPDATE @schema@.engines x SET dead = true
  WHERE x.incarnation = ANY (v_owners) AND NOT x.dead
    AND (x.expires_at <= p_now OR (x.incarnation = ANY (v_vanished) AND x.missed_at IS NOT NULL));
  SELECT coalesce(array_agg(o), '{}') INTO gone FROM unnest(v_owners) o
  WHERE NOT EXISTS (SELECT 1 FROM @schema@.engines x WHERE x.incarnation = o AND NOT x.dead);

  WITH freed AS (
    UPDATE @schema@.runs r SET owner = NULL, epoch = r.epoch + 1, updated_at = p_now
    WHERE r.id = ANY (ARRAY(
      SELECT p.id FROM @schema@.runs p
      JOIN unnest(p_workspaces, p_workflows, p_versions) w(workspace, workflow, version)
        ON p.workspace = w.workspace AND p.workflow = w.workflow AND p.version = w.version
      WHERE p.owner = ANY (gone) AND p.activity IN ('paused', 'blocked')
      ORDER BY p.id FOR NO KEY UPDATE OF p SKIP LOCKED))
    RETURNING r.id)
  DELETE FROM @schema@.slots s USING freed f WHERE s.run_id = f.id;
END $$;

-- As before; a run's slots are free too.
CREATE OR REPLACE FUNCTION @schema@.release_runs(p_ids text[], p_epochs integer[]) RETURNS integer LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
  v_count integer;
BEGIN
  WITH freed AS (
    UPDATE @schema@.runs r SET
      owner = NULL,
      updated_at = v_now,
      activity = CASE r.activity WHEN 'executing' THEN 'queued' ELSE r.activity END,
      wake_at = CASE WHEN r.activity IN ('paused', 'blocked') THEN r.wake_at ELSE v_now END
    FROM unnest(p_ids, p_epochs) v(id, epoch)
    WHERE r.id = v.id AND r.epoch = v.epoch AND r.owner IS NOT NULL
    RETURNING r.id),
  gone AS (DELETE FROM @schema@.slots s USING freed f WHERE s.run_id = f.id)
  SELECT count(*) INTO v_count FROM freed;
  RETURN v_count;
END $$;

-- ------------------------------------------------------------------ events

-- The last number that was given to an event.
CREATE FUNCTION @schema@.last_event() RETURNS bigint LANGUAGE sql VOLATILE
AS $$ SELECT CASE WHEN n.is_called THEN n.last_value ELSE 0 END FROM @schema@.event_numbers n $$;

-- Publishers hold locks of this class while their events have numbers and are not committed: each at the last number that had
-- been given before its own.
CREATE FUNCTION @schema@.events_under_way() RETURNS integer LANGUAGE sql IMMUTABLE
RETURN hashtext('durable events of @schema@');

-- A number up to which all events are committed, or never will be: no other appears below it. The number first, then the locks:
-- whoever had one by then holds its lock, or has committed. Rows have to be read after this, by another statement.
CREATE FUNCTION @schema@.whole_events() RETURNS bigint LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
  v_last bigint := @schema@.last_event();
  v_most bigint;
BEGIN
  -- A lock has the low bits of a number; one that is above `v_last`, and then by far less than half of what they can say, is of
  -- a publisher that came after.
  SELECT max(d) INTO v_most FROM (
    SELECT (v_last - l.objid::bigint) & 2147483647 AS d FROM pg_locks l
    WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.classid::bigint = @schema@.events_under_way()::bigint & 4294967295) x
  WHERE d < 1073741824;
  RETURN v_last - coalesce(v_most, 0);
END $$;

-- Accept events, in order of place. Events and the admissions of their triggers as columns; `p_runs`: the runs of triggers
-- without policies, each with the place `of` its event; `p_policies`: the triggers of events that have a policy, in order.
-- One row for each event: its number (null: a duplicate of `event_id`), its admissions where they are other than given, and
-- who waits for it.
CREATE FUNCTION @schema@.publish(
  p_ids text[], p_workspaces text[], p_names text[], p_dedupe_ids text[], p_datas bytea[], p_metas bytea[],
  p_admissions text[], p_probes jsonb, p_runs jsonb, p_policies jsonb, p_max_payload bigint
) RETURNS TABLE (place integer, event_id text, number bigint, received_at bigint, admissions jsonb, waiters jsonb)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
#variable_conflict use_column
DECLARE
  v_now bigint := @schema@.now_us();
  v_numbers bigint[];
  v_put bigint[];
  v_runs jsonb := p_runs;
  v_born text[];
  v_places integer[] := '{}';    -- of admissions made here, and what they are
  v_made jsonb[] := '{}';
  v_keys text[];
  v_waiting jsonb;
  t record;
BEGIN
  IF p_policies IS NOT NULL THEN
    PERFORM @schema@.lock_policies(p_policies, v_now);
  END IF;
  -- Numbered under those locks: events that share a policy have numbers in the order in which it has seen them. Another lock
  -- says that numbers above the last one given are on their way (`whole_events`).
  PERFORM pg_advisory_xact_lock_shared(@schema@.events_under_way(), (@schema@.last_event() & 2147483647)::integer);
  v_numbers := ARRAY(SELECT nextval('@schema@.event_numbers') FROM generate_series(1, cardinality(p_ids)));
  WITH given AS MATERIALIZED (
    SELECT * FROM unnest(p_ids, p_workspaces, p_names, p_dedupe_ids, p_datas, p_metas, p_admissions, v_numbers)
      AS g(id, workspace, name, dedupe_id, data, meta, admissions, number)),
  put AS (
    INSERT INTO @schema@.events (
      id, workspace, name, dedupe_id, data, meta, admissions, number, received_at, settled)
    SELECT g.id, g.workspace, g.name, g.dedupe_id, g.data, g.meta, g.admissions::jsonb, g.number, v_now, true
    FROM given g ORDER BY g.workspace, g.dedupe_id, g.number  -- publishers wait for each other in one order
    ON CONFLICT DO NOTHING
    RETURNING number)
  SELECT coalesce(array_agg(p.number), '{}') INTO v_put FROM put p;

  IF cardinality(v_put) < cardinality(p_ids) THEN
    v_numbers := ARRAY(SELECT CASE WHEN n.number = ANY (v_put) THEN n.number END
                       FROM unnest(v_numbers) WITH ORDINALITY AS n(number, place) ORDER BY n.place);
    SELECT jsonb_agg(r ORDER BY x.place) INTO v_runs
    FROM jsonb_array_elements(p_runs) WITH ORDINALITY AS x(r, place) WHERE v_numbers[(r->>'of')::integer] IS NOT NULL;
    SELECT jsonb_agg(e ORDER BY x.place) INTO p_policies
    FROM jsonb_array_elements(p_policies) WITH ORDINALITY AS x(e, place) WHERE v_numbers[(e->>'of')::integer] IS NOT NULL;
  END IF;

  IF p_policies IS NOT NULL THEN
    PERFORM @schema@.lock_joined(p_policies);
    PERFORM @schema@.touch_lanes((SELECT jsonb_agg(e->'run') FROM jsonb_array_elements(p_policies) e), v_now);
  END IF;

  IF v_runs IS NOT NULL THEN
    v_born := @schema@.start_runs(v_runs);
    IF cardinality(v_born) < jsonb_array_length(v_runs) THEN
      -- Of events that have a run that was there before: all their admissions anew.
      SELECT coalesce(array_agg((r->>'of')::integer ORDER BY x.place), '{}'), coalesce(array_agg(jsonb_build_object(
        'workflow', r->>'workflow', 'verdict', 'started', 'run_id', @schema@.run_there(r), 'new', r->>'id' = ANY (v_born))
        ORDER BY x.place), '{}')
      INTO v_places, v_made
      FROM jsonb_array_elements(v_runs) WITH ORDINALITY AS x(r, place)
      WHERE r->'of' IN (SELECT o->'of' FROM jsonb_array_elements(v_runs) o WHERE o->>'id' <> ALL (v_born));
    END IF;
  END IF;
  FOR t IN SELECT (e->>'of')::integer AS of, e FROM jsonb_array_elements(p_policies) WITH ORDINALITY AS x(e, place)
           ORDER BY x.place LOOP
    v_places := v_places || t.of;
    v_made := v_made || @schema@.admit(t.e, v_now, p_max_payload);
  END LOOP;

  -- Last, so that whoever opens a wait and holds its run's row never waits for us who wait for that row.
  PERFORM pg_advisory_xact_lock_shared(k) FROM (
    SELECT DISTINCT @schema@.event_lock(g.workspace, g.name) AS k
    FROM unnest(p_workspaces, p_names, v_numbers) AS g(workspace, name, number) WHERE g.number IS NOT NULL ORDER BY 1) locks;
  RETURN QUERY
  WITH given AS MATERIALIZED (
    SELECT * FROM unnest(p_ids, p_workspaces, p_names, p_dedupe_ids, v_numbers) WITH ORDINALITY
      AS g(id, workspace, name, dedupe_id, number, place)),
  made AS MATERIALIZED (
    SELECT m.place, jsonb_agg(m.admission ORDER BY m.nth) AS admissions
    FROM unnest(v_places, v_made) WITH ORDINALITY AS m(place, admission, nth) GROUP BY m.place),
  told AS MATERIALIZED (
    SELECT g.*, m.admissions, (
      SELECT jsonb_agg(jsonb_build_object(
        'run_id', w.run_id, 'id', w.id, 'match', translate(encode(w.match, 'base64'), E'\n', ''), 'expires_at', w.expires_at,
        'owner', r.owner) ORDER BY w.number)
      FROM @schema@.event_waiters w JOIN @schema@.runs r ON r.id = w.run_id
      WHERE w.workspace = g.workspace AND w.event = g.name AND (w.expires_at IS NULL OR w.expires_at > v_now)
        AND CASE WHEN jsonb_typeof(p_probes->(g.place::integer - 1)) = 'array'
          THEN w.probe = '' OR p_probes->(g.place::integer - 1) ? w.probe ELSE true END) AS waiters
    FROM given g LEFT JOIN made m ON m.place = g.place WHERE g.number IS NOT NULL),
  changed AS (
    UPDATE @schema@.events e SET admissions = coalesce(x.admissions, e.admissions), settled = x.waiters IS NULL
    FROM told x WHERE e.id = x.id AND (x.admissions IS NOT NULL OR x.waiters IS NOT NULL))
  SELECT x.place::integer, x.id, x.number, v_now, x.admissions, x.waiters FROM told x
  UNION ALL
  SELECT g.place::integer, coalesce(
    (SELECT e.id FROM @schema@.events e WHERE e.id = g.id),
    (SELECT e.id FROM @schema@.events e WHERE e.workspace = g.workspace AND e.dedupe_id = g.dedupe_id)), NULL, NULL, NULL, NULL
  FROM given g WHERE g.number IS NULL;
END $$;

-- The run that was there before this one: of the same id, or of the same key.
CREATE FUNCTION @schema@.run_there(p_run jsonb) RETURNS text LANGUAGE sql STABLE
RETURN coalesce(
  (SELECT r.id FROM @schema@.runs r WHERE r.id = p_run->>'id'),
  (SELECT r.id FROM @schema@.runs r WHERE r.workspace = p_run->>'workspace' AND r.workflow = p_run->>'workflow'
   AND r.idempotency_key = p_run->>'idempotency_key'),
  p_run->>'id');

CREATE FUNCTION @schema@.policy_keys(p_policies jsonb) RETURNS text[] LANGUAGE sql IMMUTABLE
RETURN ARRAY(
  SELECT DISTINCT k.key FROM jsonb_array_elements(p_policies) e CROSS JOIN LATERAL (VALUES
    ('rate:' || (e->'rate'->>'key')), ('singleton:' || (e->'singleton'->>'key')),
    ('window:' || coalesce(e->'debounce'->>'key', e->'batch'->>'key'))) AS k(key)
  WHERE k.key IS NOT NULL ORDER BY 1);

-- Lock what these triggers share with others, in order of key: each policy is a row of its own. Whoever publishes locks policies
-- first, then events of the same dedupe id, then runs, then lanes, so publishers do not deadlock.
CREATE FUNCTION @schema@.lock_policies(p_policies jsonb, p_now bigint) RETURNS void LANGUAGE plpgsql
AS $$
DECLARE
  v_keys text[];
  v_count integer;
BEGIN
  v_keys := @schema@.policy_keys(p_policies);
  LOOP
    INSERT INTO @schema@.policies (key, used_at)
    SELECT k, p_now FROM unnest(v_keys) k WHERE NOT EXISTS (SELECT 1 FROM @schema@.policies p WHERE p.key = k) ORDER BY k
    ON CONFLICT DO NOTHING;
    PERFORM 1 FROM @schema@.policies p WHERE p.key = ANY (v_keys) ORDER BY p.key FOR UPDATE;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    EXIT WHEN v_count = cardinality(v_keys);  -- or one was pruned just now
  END LOOP;
END $$;

-- Lock the runs that these policies name, in order of id.
CREATE FUNCTION @schema@.lock_joined(p_policies jsonb) RETURNS void LANGUAGE sql
AS $$
  SELECT 1 FROM @schema@.runs r
  WHERE r.id = ANY (ARRAY(SELECT p.run_id FROM @schema@.policies p WHERE p.key = ANY (@schema@.policy_keys(p_policies))))
  ORDER BY r.id FOR NO KEY UPDATE
$$;

-- Decide about one trigger, whose policies are locked. Returns its admission.
CREATE FUNCTION @schema@.admit(p_trigger jsonb, p_now bigint, p_max_payload bigint) RETURNS jsonb LANGUAGE plpgsql
AS $$
DECLARE
  v_run jsonb := p_trigger->'run';
  v_rate jsonb := p_trigger->'rate';
  v_singleton jsonb := p_trigger->'singleton';
  v_debounce jsonb := p_trigger->'debounce';
  v_batch jsonb := p_trigger->'batch';
  v_window text := 'window:' || coalesce(v_debounce->>'key', v_batch->>'key');
  v_verdict text := 'started';
  v_run_id text;
  v_new boolean := false;
  v_in_the_way text;
  v_cancelled text;
  v_waits text;          -- the run that this event may still join
  v_opened_at bigint;
  v_members integer;
  v_until bigint;
  v_member bytea;
BEGIN
  IF jsonb_typeof(v_rate) = 'object' AND @schema@.throttled_until(
      'rate:' || (v_rate->>'key'), (v_rate->>'limit')::bigint, (v_rate->>'period_us')::bigint, p_now) IS NOT NULL THEN
    RETURN jsonb_build_object('workflow', v_run->>'workflow', 'verdict', 'dropped');
  END IF;
  IF v_window IS NOT NULL THEN
    SELECT p.run_id, p.opened_at, p.members INTO v_waits, v_opened_at, v_members
    FROM @schema@.policies p JOIN @schema@.runs r ON r.id = p.run_id
    WHERE p.key = v_window AND r.status = 'active' AND r.owner IS NULL AND r.epoch = 0 AND r.activity = 'scheduled'
      AND r.wake_at > p_now;
  END IF;
  IF v_waits IS NOT NULL AND jsonb_typeof(v_batch) = 'object' THEN
    -- A batch that has no room for it is full: due, and an unfinished run like any other.
    UPDATE @schema@.runs r SET wake_at = p_now, activity = 'queued', updated_at = p_now
    WHERE r.id = v_waits AND length(r.input) + 1 + length(decode(v_batch->>'member', 'base64')) > p_max_payload;
    IF FOUND THEN
      v_waits := NULL;
    END IF;
  END IF;
  IF jsonb_typeof(v_singleton) = 'object' THEN
    SELECT r.id INTO v_in_the_way FROM @schema@.policies p JOIN @schema@.runs r ON r.id = p.run_id
    WHERE p.key = 'singleton:' || (v_singleton->>'key') AND r.status = 'active';
    IF v_in_the_way = v_waits THEN
      v_in_the_way := NULL;  -- the run that this event joins is not in its way
    END IF;
    IF v_in_the_way IS NOT NULL AND v_singleton->>'mode' = 'skip' THEN
      RETURN jsonb_build_object('workflow', v_run->>'workflow', 'verdict', 'skipped', 'run_id', v_in_the_way);
    END IF;
  END IF;

  IF v_window IS NULL THEN
    v_new := cardinality(@schema@.start_runs(jsonb_build_array(v_run))) > 0;
    v_run_id := @schema@.run_there(v_run);
    IF jsonb_typeof(v_rate) = 'object' AND v_new THEN
      PERFORM @schema@.take_moment(
        'rate:' || (v_rate->>'key'), (v_rate->>'limit')::bigint, (v_rate->>'period_us')::bigint, p_now);
    END IF;
  ELSE
    IF jsonb_typeof(v_debounce) = 'object' THEN
      v_verdict := 'debounced';
      v_until := least(p_now + (v_debounce->>'period_us')::bigint,
                       CASE WHEN v_waits IS NULL THEN p_now ELSE v_opened_at END + (v_debounce->>'max_wait_us')::bigint);
      IF v_waits IS NOT NULL THEN
        UPDATE @schema@.runs r SET
          input = decode(v_run->>'input', 'base64'), input_hash = v_run->>'input_hash', meta = decode(v_run->>'meta', 'base64'),
          updated_at = p_now, wake_at = v_until, activity = CASE WHEN v_until <= p_now THEN 'queued' ELSE r.activity END
        WHERE r.id = v_waits;
        v_run_id := v_waits;
      END IF;
    ELSE
      v_verdict := 'batched';
      v_member := decode(v_batch->>'member', 'base64');
      v_until := p_now + CASE WHEN (v_batch->>'max_size')::integer > 1 THEN (v_batch->>'timeout_us')::bigint ELSE 0 END;
      IF v_waits IS NOT NULL THEN
        UPDATE @schema@.runs r SET
          input = substr(r.input, 1, length(r.input) - 2) || ','::bytea || v_member || ']}'::bytea, updated_at = p_now
        WHERE r.id = v_waits;
        v_run_id := v_waits;
        v_members := v_members + 1;
        UPDATE @schema@.policies p SET members = v_members, used_at = p_now WHERE p.key = v_window;
        IF v_members >= (v_batch->>'max_size')::integer THEN
          UPDATE @schema@.runs r SET wake_at = p_now, activity = 'queued', updated_at = p_now WHERE r.id = v_waits;
        END IF;
      END IF;
    END IF;
    IF v_run_id IS NULL THEN
      v_run := v_run || jsonb_build_object('wake_at', v_until, 'owner', NULL);
      v_new := cardinality(@schema@.start_runs(jsonb_build_array(v_run))) > 0;
      v_run_id := @schema@.run_there(v_run);
      IF v_new THEN
        UPDATE @schema@.policies p SET run_id = v_run_id, opened_at = p_now, members = 1, used_at = p_now
        WHERE p.key = v_window;
      END IF;
    END IF;
  END IF;
  IF jsonb_typeof(v_singleton) = 'object' THEN
    UPDATE @schema@.policies p SET run_id = v_run_id, used_at = p_now WHERE p.key = 'singleton:' || (v_singleton->>'key');
    IF v_in_the_way <> v_run_id THEN
      PERFORM @schema@.send_messages(jsonb_build_array(jsonb_build_object(
        'run_id', v_in_the_way, 'id', 'singleton:' || (v_run->>'id'), 'kind', 'cancel', 'name', '', 'attempt', 0,
        'workspace', (SELECT r.workspace FROM @schema@.runs r WHERE r.id = v_in_the_way),
        'payload', encode(convert_to(jsonb_build_object(
          'reason', format('run %s takes its place', v_run->>'id'))::text, 'UTF8'), 'base64'))));
      v_cancelled := v_in_the_way;
    END IF;
  END IF;
  RETURN jsonb_build_object('workflow', v_run->>'workflow', 'verdict', v_verdict, 'run_id', v_run_id, 'new', v_new,
                            'cancelled', v_cancelled);
END $$;

-- ------------------------------------------------------------------ items

-- Write items, given as columns, each on its own: over the version expected (0: where there is none; null: over whatever is
-- there). The place of each, whether it was done, and the version now there.
CREATE FUNCTION @schema@.put_items(
  p_kinds text[], p_workspaces text[], p_ids text[], p_datas bytea[], p_due_ats bigint[], p_expires_ins bigint[],
  p_expected bigint[]
) RETURNS TABLE (place integer, done boolean, version bigint) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
#variable_conflict use_column
DECLARE
  v_now bigint := @schema@.now_us();
  g record;
BEGIN
  FOR g IN
    SELECT g.*, v_now + g.expires_in AS expires_at
    FROM unnest(p_kinds, p_workspaces, p_ids, p_datas, p_due_ats, p_expires_ins, p_expected) WITH ORDINALITY
      AS g(kind, workspace, id, data, due_at, expires_in, expected, place)
    ORDER BY g.kind, g.workspace, g.id, g.place
  LOOP
    place := g.place;
    IF g.expected > 0 THEN
      UPDATE @schema@.items i SET
        data = g.data, due_at = g.due_at, expires_at = g.expires_at, updated_at = v_now, version = i.version + 1
      WHERE i.kind = g.kind AND i.workspace = g.workspace AND i.id = g.id AND i.version = g.expected
        AND (i.expires_at IS NULL OR i.expires_at > v_now)
      RETURNING i.version INTO version;
    ELSE
      INSERT INTO @schema@.items AS i (kind, workspace, id, data, version, due_at, expires_at, updated_at)
      VALUES (g.kind, g.workspace, g.id, g.data, 1, g.due_at, g.expires_at, v_now)
      ON CONFLICT (kind, workspace, id) DO UPDATE SET
        data = excluded.data, due_at = excluded.due_at, expires_at = excluded.expires_at, updated_at = v_now,
        version = CASE WHEN i.expires_at <= v_now THEN 1 ELSE i.version + 1 END
      WHERE g.expected IS NULL OR i.expires_at <= v_now
      RETURNING i.version INTO version;
    END IF;
    done := FOUND;
    IF NOT done THEN
      SELECT i.version INTO version FROM @schema@.items i
      WHERE i.kind = g.kind AND i.workspace = g.workspace AND i.id = g.id AND (i.expires_at IS NULL OR i.expires_at > v_now);
      version := coalesce(version, 0);
    END IF;
    RETURN NEXT;
  END LOOP;
END $$;

-- Delete items; how many of them anybody could still see.
CREATE FUNCTION @schema@.delete_items(p_kinds text[], p_workspaces text[], p_ids text[]) RETURNS integer LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
  v_count integer;
BEGIN
  PERFORM 1 FROM @schema@.items i JOIN (SELECT DISTINCT * FROM unnest(p_kinds, p_workspaces, p_ids)) k(kind, workspace, id)
    ON i.kind = k.kind AND i.workspace = k.workspace AND i.id = k.id
  ORDER BY i.kind, i.workspace, i.id FOR UPDATE OF i;
  WITH gone AS (
    DELETE FROM @schema@.items i USING unnest(p_kinds, p_workspaces, p_ids) k(kind, workspace, id)
    WHERE i.kind = k.kind AND i.workspace = k.workspace AND i.id = k.id
    RETURNING i.expires_at)
  SELECT count(*) INTO v_count FROM gone g WHERE g.expires_at IS NULL OR g.expires_at > v_now;
  RETURN v_count;
END $$;

-- Move schedules on, each on its own: items as columns, and `p_occurrences`: {of, schedule_id, at, run}, in order. Of each the
-- place, whether it was done, and the ids of the runs that are new.
CREATE FUNCTION @schema@.fire(
  p_kinds text[], p_workspaces text[], p_ids text[], p_datas bytea[], p_due_ats bigint[], p_expires_ins bigint[],
  p_expected bigint[], p_occurrences jsonb
) RETURNS TABLE (place integer, done boolean, started text[]) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
#variable_conflict use_column
DECLARE
  v_done integer[];
  v_runs jsonb;
  v_born text[];
BEGIN
  v_done := ARRAY(
    SELECT p.place FROM @schema@.put_items(
      p_kinds, p_workspaces, p_ids, p_datas, p_due_ats, p_expires_ins, p_expected) p WHERE p.done);
  WITH given AS MATERIALIZED (
    SELECT o, x.place FROM jsonb_array_elements(p_occurrences) WITH ORDINALITY AS x(o, place)
    WHERE (o->>'of')::integer = ANY (v_done)),
  fired AS (
    INSERT INTO @schema@.schedule_fires (schedule_id, occurrence, run_id)
    SELECT o->>'schedule_id', (o->>'at')::bigint, o->'run'->>'id' FROM given ORDER BY 1, 2
    ON CONFLICT DO NOTHING
    RETURNING schedule_id, occurrence, run_id)
  SELECT jsonb_agg(g.o->'run' ORDER BY g.place) INTO v_runs FROM given g
  JOIN fired f ON f.schedule_id = g.o->>'schedule_id' AND f.occurrence = (g.o->>'at')::bigint AND f.run_id = g.o->'run'->>'id';
  IF v_runs IS NOT NULL THEN
    v_born := @schema@.start_runs(v_runs);
  END IF;
  RETURN QUERY
  SELECT n, n = ANY (v_done), ARRAY(
    SELECT o->'run'->>'id' FROM jsonb_array_elements(p_occurrences) WITH ORDINALITY AS x(o, nth)
    WHERE (o->>'of')::integer = n AND o->'run'->>'id' = ANY (v_born) ORDER BY x.nth)
  FROM generate_series(1, cardinality(p_ids)) n;
END $$;

-- ------------------------------------------------------------------ limits

-- Every rule of every lane that has a run, or had one lately.
CREATE FUNCTION @schema@.limits(p_workspace text, p_workflow text)
RETURNS TABLE (
  workflow text, lane text, rule text, kind text, "limit" bigint, period_us bigint, used bigint, queued bigint,
  weight double precision, next_at bigint
) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
#variable_conflict use_column
DECLARE
  v_now bigint := @schema@.now_us();
BEGIN
  RETURN QUERY
  WITH rules AS (
    SELECT l.workflow, l.key AS lane, r.*, l.weight FROM @schema@.lanes l
    CROSS JOIN LATERAL ROWS FROM (jsonb_to_recordset(l.rules) AS (
      key text, kind text, "limit" bigint, period_us bigint)) WITH ORDINALITY AS r(key, kind, "limit", period_us, place)
    WHERE l.workspace = p_workspace AND (p_workflow IS NULL OR l.workflow = p_workflow)),
  counted AS (
    SELECT r.*, CASE WHEN r.kind = 'slots' THEN (SELECT count(*) FROM @schema@.slots s WHERE s.key = r.key)
      ELSE (SELECT count(*) FROM @schema@.moments m
            WHERE m.key = 'throttle:' || r.key AND m.at > v_now - r.period_us) END AS used
    FROM rules r)
  SELECT c.workflow, c.lane, c.key, c.kind, c."limit", c.period_us, c.used, (
    SELECT count(*) FROM @schema@.runs x
    WHERE x.workspace = p_workspace AND x.workflow = c.workflow AND x.lane = c.lane AND x.status = 'active'
      AND x.owner IS NULL AND x.activity NOT IN ('paused', 'blocked') AND x.wake_at <= v_now
      AND CASE WHEN c.kind = 'slots'
        THEN NOT EXISTS (SELECT 1 FROM @schema@.slots s WHERE s.run_id = x.id AND s.key = c.key)
        ELSE x.started_at IS NULL END),
    c.weight, CASE WHEN c.kind <> 'slots' THEN @schema@.throttled_until('throttle:' || c.key, c."limit", c.period_us, v_now) END
  FROM counted c
  WHERE c.used > 0 OR EXISTS (
    SELECT 1 FROM @schema@.runs x
    WHERE x.workspace = p_workspace AND x.workflow = c.workflow AND x.lane = c.lane AND x.status = 'active')
  ORDER BY c.workflow, c.lane, c.place;
END $$;

-- ------------------------------------------------------------------ retention

-- Delete what says nothing any more, up to `p_limit` rows of each kind, and, unless `p_older_than_us` is null, this workspace's
-- settled events that are older. Returns how many rows went of the kind that had most.
CREATE FUNCTION @schema@.sweep(p_workspace text, p_older_than_us bigint, p_limit integer) RETURNS integer LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
  v_count integer;
  v_most integer := 0;
BEGIN
  DELETE FROM @schema@.items i USING (
    SELECT x.kind, x.workspace, x.id FROM @schema@.items x WHERE x.expires_at <= v_now
    ORDER BY x.expires_at LIMIT p_limit FOR UPDATE SKIP LOCKED) o
  WHERE i.kind = o.kind AND i.workspace = o.workspace AND i.id = o.id AND i.expires_at <= v_now;
  GET DIAGNOSTICS v_count = ROW_COUNT;
  v_most := greatest(v_most, v_count);

  IF p_older_than_us IS NOT NULL THEN
    DELETE FROM @schema@.events e WHERE e.id = ANY (ARRAY(
      SELECT x.id FROM @schema@.events x
      WHERE x.workspace = p_workspace AND x.received_at < v_now - p_older_than_us AND x.settled
      ORDER BY x.received_at LIMIT p_limit FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS v_count = ROW_COUNT;
    v_most := greatest(v_most, v_count);
  END IF;

  DELETE FROM @schema@.moments m USING (
    SELECT x.key, x.number FROM @schema@.moments x WHERE x.until <= v_now
    ORDER BY x.until, x.key, x.number LIMIT p_limit FOR UPDATE SKIP LOCKED) o
  WHERE m.key = o.key AND m.number = o.number;
  GET DIAGNOSTICS v_count = ROW_COUNT;
  v_most := greatest(v_most, v_count);

  -- Policies of the last minute may be on their way to a run.
  DELETE FROM @schema@.policies p WHERE p.key = ANY (ARRAY(
    SELECT x.key FROM @schema@.policies x
    WHERE x.used_at < v_now - 60000000
      AND NOT EXISTS (SELECT 1 FROM @schema@.runs r WHERE r.id = x.run_id AND r.status = 'active')
    ORDER BY x.used_at LIMIT p_limit FOR UPDATE SKIP LOCKED));
  GET DIAGNOSTICS v_count = ROW_COUNT;
  v_most := greatest(v_most, v_count);

  -- Who starts a run of a lane that is older than an hour touches it first.
  DELETE FROM @schema@.lanes l USING (
    SELECT x.workspace, x.workflow, x.key FROM @schema@.lanes x
    WHERE x.touched_at < v_now - 7200000000 AND NOT EXISTS (
      SELECT 1 FROM @schema@.runs r
      WHERE r.workspace = x.workspace AND r.workflow = x.workflow AND r.lane = x.key)
    ORDER BY x.workspace, x.workflow, x.key LIMIT p_limit FOR UPDATE SKIP LOCKED) o
  WHERE l.workspace = o.workspace AND l.workflow = o.workflow AND l.key = o.key AND l.touched_at < v_now - 7200000000;
  GET DIAGNOSTICS v_count = ROW_COUNT;
  v_most := greatest(v_most, v_count);

  DELETE FROM @schema@.turns t USING (
    SELECT x.workspace, x.workflow, x.priority, x.lane FROM @schema@.turns x
    WHERE x.finish <= (SELECT max(c.start) FROM @schema@.turns c WHERE c.workspace = x.workspace AND c.workflow = x.workflow
                       AND c.priority = x.priority)
    ORDER BY x.workspace, x.workflow, x.priority, x.lane LIMIT p_limit FOR UPDATE SKIP LOCKED) o
  WHERE t.workspace = o.workspace AND t.workflow = o.workflow AND t.priority = o.priority AND t.lane = o.lane;
  GET DIAGNOSTICS v_count = ROW_COUNT;
  RETURN greatest(v_most, v_count);
END $$;

-- The waiters of these events have been told.
CREATE FUNCTION @schema@.settle_events(p_ids text[]) RETURNS integer LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off
AS $$
DECLARE
  v_count integer;
BEGIN
  PERFORM 1 FROM @schema@.events e WHERE e.id = ANY (p_ids) AND NOT e.settled ORDER BY e.id FOR NO KEY UPDATE;
  UPDATE @schema@.events e SET settled = true WHERE e.id = ANY (p_ids) AND NOT e.settled;
  GET DIAGNOSTICS v_count = ROW_COUNT;
  RETURN v_count;
END $$;
