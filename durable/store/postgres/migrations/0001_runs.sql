-- Tables and the functions that change them. `@schema@` stands for the schema's name.
--
-- Everything that writes is one function call, so it is one statement, one round trip and one transaction by itself: a
-- client that is stopped at any moment holds no lock. Functions pin their plans (SET ... below): rows of `runs` are found
-- through an index, in the order asked, whatever the statistics say; that order is by id, so writers do not deadlock.
--
-- A migration only ever adds. A function that needs another signature gets another name, and the old one stays.

CREATE TABLE @schema@.engines (
  incarnation text COLLATE "C" PRIMARY KEY,
  expires_at bigint NOT NULL,
  dead boolean NOT NULL DEFAULT false,
  present boolean NOT NULL DEFAULT false,  -- holds an advisory lock: its death can be seen
  missed_at bigint,                        -- since when that lock was found free
  beats bigint NOT NULL DEFAULT 1          -- only ever rises: fewer than its engine remembers means writes were lost
) WITH (fillfactor = 50);

CREATE TABLE @schema@.runs (
  number bigint GENERATED ALWAYS AS IDENTITY,
  wake_at bigint,
  updated_at bigint NOT NULL,
  created_at bigint NOT NULL,
  started_at bigint,
  finished_at bigint,
  epoch integer NOT NULL,
  seq integer NOT NULL,
  inbox_last integer NOT NULL DEFAULT 0,
  inbox_read integer NOT NULL DEFAULT 0,
  recovery_attempts integer NOT NULL DEFAULT 0,
  priority integer NOT NULL,
  parent_ordinal integer,
  id text COLLATE "C" PRIMARY KEY,
  commit_id text COLLATE "C",
  status text COLLATE "C" NOT NULL DEFAULT 'active',
  activity text COLLATE "C" NOT NULL,
  owner text COLLATE "C",
  workspace text COLLATE "C" NOT NULL,
  workflow text COLLATE "C" NOT NULL,
  version text COLLATE "C" NOT NULL,
  idempotency_key text COLLATE "C",
  input_hash text COLLATE "C" NOT NULL,
  parent_run_id text COLLATE "C",
  parent_key text COLLATE "C",
  tags text[],
  attributes jsonb,
  input bytea NOT NULL,
  output bytea,
  error bytea,
  CONSTRAINT suspended_run_has_a_wake_time CHECK (
    status <> 'active' OR owner IS NOT NULL OR wake_at IS NOT NULL OR activity IN ('paused', 'blocked'))
) WITH (
  fillfactor = 45,  -- room for the next version of each row on its page: commits stay HOT
  autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05
);
-- Columns that every commit changes (seq, commit_id, inbox_read, updated_at) stand in no index.
CREATE UNIQUE INDEX runs_key ON @schema@.runs (workspace, workflow, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX runs_due ON @schema@.runs (workspace, workflow, version, priority DESC, wake_at, number)
  WHERE owner IS NULL AND status = 'active' AND activity NOT IN ('paused', 'blocked');
CREATE INDEX runs_owned ON @schema@.runs (owner, workspace, workflow, version) WHERE owner IS NOT NULL;
CREATE INDEX runs_blocked ON @schema@.runs (id) WHERE activity = 'blocked' AND status = 'active';
CREATE INDEX runs_children ON @schema@.runs (parent_run_id) WHERE parent_run_id IS NOT NULL;
CREATE INDEX runs_listed ON @schema@.runs (workspace, number);
CREATE INDEX runs_finished ON @schema@.runs (workspace, workflow, finished_at, id) WHERE status <> 'active';

CREATE TABLE @schema@.journal (
  at bigint NOT NULL,
  enqueued_at bigint,
  started_at bigint,
  finished_at bigint,
  seq integer NOT NULL,
  ordinal integer,
  attempt integer NOT NULL,
  run_id text COLLATE "C" NOT NULL,
  kind text COLLATE "C" NOT NULL,
  status text COLLATE "C" NOT NULL,
  key text COLLATE "C",
  name text COLLATE "C",
  fingerprint text COLLATE "C",
  payload bytea,
  PRIMARY KEY (run_id, seq)
) PARTITION BY RANGE (run_id);  -- ids sort by time, and a child's begins with its parent's: old partitions fall empty
CREATE TABLE @schema@.journal_default PARTITION OF @schema@.journal DEFAULT;

CREATE TABLE @schema@.inbox (
  created_at bigint NOT NULL,
  number integer NOT NULL,
  ordinal integer,
  attempt integer NOT NULL,
  run_id text COLLATE "C" NOT NULL,
  id text COLLATE "C" NOT NULL,
  workspace text COLLATE "C" NOT NULL,
  kind text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  key text COLLATE "C",
  payload bytea,
  PRIMARY KEY (run_id, number),
  UNIQUE (run_id, id)
);

CREATE TABLE @schema@.event_waiters (
  run_id text COLLATE "C" NOT NULL,
  id text COLLATE "C" NOT NULL,
  event text COLLATE "C" NOT NULL,
  match bytea,
  expires_at bigint,
  PRIMARY KEY (run_id, id)
);
CREATE INDEX event_waiters_event ON @schema@.event_waiters (event);

CREATE TABLE @schema@.slots (
  key text COLLATE "C" NOT NULL,
  number integer NOT NULL,
  run_id text COLLATE "C" NOT NULL,
  epoch integer NOT NULL,
  PRIMARY KEY (key, number)
);
CREATE INDEX slots_holder ON @schema@.slots (run_id);

CREATE TABLE @schema@.schedule_fires (
  schedule_id text COLLATE "C" NOT NULL,
  occurrence bigint NOT NULL,
  run_id text COLLATE "C" NOT NULL,
  PRIMARY KEY (schedule_id, occurrence)
);
CREATE INDEX schedule_fires_run ON @schema@.schedule_fires (run_id);

-- The smallest run id of a moment: ids are uuid7, whose first 48 bits are milliseconds.
CREATE FUNCTION @schema@.first_id(p_at timestamptz) RETURNS text LANGUAGE sql IMMUTABLE
RETURN regexp_replace(lpad(to_hex((extract(epoch FROM p_at) * 1000)::bigint), 12, '0'), '(.{8})(.{4})', '\1-\2');

-- See that the journal has a partition for this month (UTC) and the next ones. Rows of months that have none stand in
-- journal_default, and such a month is left there. Returns how many were made; one at a time: two would wait for each other,
-- each having looked into journal_default, which the other must lock. Readers queue behind that lock, so it waits shortly.
CREATE FUNCTION @schema@.make_partitions(p_now timestamptz, p_months integer) RETURNS integer LANGUAGE plpgsql
SET timezone = 'UTC' SET lock_timeout = '500ms'
AS $$
DECLARE
  v_month timestamptz;
  v_name text;
  v_made integer := 0;
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtextextended('@schema@', 2)) THEN
    RETURN 0;
  END IF;
  FOR n IN 0 .. p_months LOOP
    v_month := date_trunc('month', p_now) + make_interval(months => n);
    v_name := to_char(v_month, '"journal_"YYYY_MM');
    CONTINUE WHEN EXISTS (SELECT 1 FROM pg_tables WHERE schemaname = '@schema@' AND tablename = v_name)
      OR EXISTS (SELECT 1 FROM @schema@.journal_default d WHERE d.run_id >= @schema@.first_id(v_month)
                 AND d.run_id < @schema@.first_id(v_month + interval '1 month'));
    EXECUTE format('CREATE TABLE @schema@.%I PARTITION OF @schema@.journal FOR VALUES FROM (%L) TO (%L)', v_name,
                   @schema@.first_id(v_month), @schema@.first_id(v_month + interval '1 month'));
    v_made := v_made + 1;
  END LOOP;
  RETURN v_made;
END $$;
SELECT @schema@.make_partitions(now(), 2);

-- Drop the partitions of months long past in which no run is left. Returns their names. One at a time, as above.
CREATE FUNCTION @schema@.drop_partitions(p_now timestamptz) RETURNS text[] LANGUAGE plpgsql
SET timezone = 'UTC' SET lock_timeout = '500ms'
AS $$
DECLARE
  v_name text;
  v_month timestamptz;
  v_dropped text[] := '{}';
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtextextended('@schema@', 2)) THEN
    RETURN v_dropped;
  END IF;
  FOR v_name IN SELECT tablename FROM pg_tables
                WHERE schemaname = '@schema@' AND tablename ~ '^journal_\d{4}_\d{2}$' ORDER BY tablename LOOP
    v_month := to_timestamp(substr(v_name, 9), 'YYYY_MM');
    EXIT WHEN v_month >= date_trunc('month', p_now) - interval '1 month';
    CONTINUE WHEN EXISTS (
      SELECT 1 FROM @schema@.runs r WHERE r.id >= @schema@.first_id(v_month)
      AND r.id < @schema@.first_id(v_month + interval '1 month'));
    EXECUTE format('DROP TABLE @schema@.%I', v_name);
    v_dropped := v_dropped || v_name;
  END LOOP;
  RETURN v_dropped;
END $$;

-- The store's clock: microseconds since the epoch, UTC. Everything that compares times asks here.
CREATE FUNCTION @schema@.now_us() RETURNS bigint LANGUAGE sql VOLATILE
RETURN (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;

-- For operators: payloads as text. Nothing in the engine reads these.
CREATE FUNCTION @schema@.decoded(p_payload bytea) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
  RETURN convert_from(p_payload, 'UTF8');
EXCEPTION WHEN OTHERS THEN
  RETURN '(' || length(p_payload) || ' bytes, sealed or packed)';
END $$;
CREATE VIEW @schema@.journal_text AS
SELECT run_id, seq, to_timestamp(at / 1e6) AS at, kind, status, key, ordinal, name, attempt,
       @schema@.decoded(payload) AS payload
FROM @schema@.journal;
CREATE VIEW @schema@.runs_text AS
SELECT id, workspace, workflow, version, status, activity, owner, epoch, seq, priority, recovery_attempts,
       inbox_last - inbox_read AS unread, parent_run_id, idempotency_key, tags, attributes,
       to_timestamp(wake_at / 1e6) AS wake_at, to_timestamp(created_at / 1e6) AS created_at,
       to_timestamp(started_at / 1e6) AS started_at, to_timestamp(finished_at / 1e6) AS finished_at,
       @schema@.decoded(input) AS input, @schema@.decoded(output) AS output, @schema@.decoded(error) AS error
FROM @schema@.runs;

-- ------------------------------------------------------------------ starting

-- Runs as a JSON list (field names as in NewRun; bytes in base64). Returns the ids that were new.
CREATE FUNCTION @schema@.start_runs(p_runs jsonb) RETURNS text[] LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
  v_born text[];
BEGIN
  WITH born AS (
    INSERT INTO @schema@.runs (
      id, workspace, workflow, version, input, input_hash, idempotency_key, priority, tags, attributes, parent_run_id,
      parent_key, parent_ordinal, owner, epoch, seq, activity, wake_at, created_at, started_at, updated_at)
    SELECT
      n.id, n.workspace, n.workflow, n.version, decode(n.input, 'base64'), n.input_hash, n.idempotency_key, n.priority,
      n.tags, n.attributes, n.parent->>'run_id', n.parent->>'key', (n.parent->>'ordinal')::integer, n.owner,
      CASE WHEN n.owner IS NULL THEN 0 ELSE 1 END,
      n.seq,
      CASE WHEN n.owner IS NOT NULL THEN 'executing' WHEN n.wake_at > v_now THEN 'scheduled' ELSE 'queued' END,
      CASE WHEN n.owner IS NULL THEN coalesce(n.wake_at, v_now) END,
      v_now, CASE WHEN n.owner IS NOT NULL THEN v_now END, v_now
    FROM jsonb_to_recordset(p_runs) AS n(
      id text, workspace text, workflow text, version text, input text, input_hash text, idempotency_key text,
      priority integer, tags text[], attributes jsonb, parent jsonb, owner text, seq integer, wake_at bigint)
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
  RETURN coalesce(v_born, '{}');
END $$;

-- ------------------------------------------------------------------ the inbox

-- Messages as a JSON list. One row for each, in order: what became of it, and who owns the run.
CREATE FUNCTION @schema@.send_messages(p_messages jsonb)
RETURNS TABLE (place bigint, answer text, run_owner text) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
BEGIN
  -- Locks first: the next statement sees what those before us in the queue have written.
  PERFORM 1 FROM @schema@.runs r
  WHERE r.id = ANY (ARRAY(SELECT DISTINCT m->>'run_id' FROM jsonb_array_elements(p_messages) m))
  ORDER BY r.id FOR NO KEY UPDATE;
  RETURN QUERY
  WITH given AS MATERIALIZED (
    SELECT m.*, row_number() OVER (PARTITION BY m.run_id, m.id ORDER BY m.place) AS copy
    FROM ROWS FROM (jsonb_to_recordset(p_messages) AS (
      run_id text, id text, kind text, name text, payload text, key text, ordinal integer, attempt integer,
      workspace text)) WITH ORDINALITY AS m(
      run_id, id, kind, name, payload, key, ordinal, attempt, workspace, place)),
  judged AS MATERIALIZED (
    SELECT g.*, r.owner, r.inbox_last,
      CASE
        WHEN r.id IS NULL THEN 'not_found'
        WHEN g.copy > 1 OR EXISTS (SELECT 1 FROM @schema@.inbox i WHERE i.run_id = g.run_id AND i.id = g.id)
          THEN 'duplicate'
        WHEN r.status <> 'active' THEN 'finished'
        ELSE 'accepted' END AS answer
    FROM given g LEFT JOIN @schema@.runs r ON r.id = g.run_id AND r.workspace = g.workspace),
  numbered AS MATERIALIZED (
    SELECT j.*, j.inbox_last + row_number() OVER (PARTITION BY j.run_id ORDER BY j.place) AS number
    FROM judged j WHERE j.answer = 'accepted'),
  put AS (
    INSERT INTO @schema@.inbox (
      run_id, number, id, created_at, workspace, kind, name, key, ordinal, attempt, payload)
    SELECT n.run_id, n.number, n.id, v_now, n.workspace, n.kind, n.name, n.key, n.ordinal, n.attempt,
           decode(n.payload, 'base64')
    FROM numbered n),
  raised AS (
    UPDATE @schema@.runs r SET
      inbox_last = v.last,
      wake_at = CASE
        WHEN r.owner IS NULL AND r.activity NOT IN ('paused', 'blocked')
          AND (r.activity <> 'scheduled' OR v.cancels) AND (r.wake_at IS NULL OR r.wake_at > v_now) THEN v_now
        ELSE r.wake_at END
    FROM (SELECT n.run_id, max(n.number) AS last, bool_or(n.kind = 'cancel') AS cancels
          FROM numbered n GROUP BY n.run_id) v
    WHERE r.id = v.run_id)
  SELECT j.place, CASE WHEN j.copy > 1 AND j.answer = 'duplicate' AND f.answer = 'finished' THEN 'finished'
                       ELSE j.answer END,
         CASE WHEN j.answer <> 'not_found' THEN j.owner END
  FROM judged j LEFT JOIN judged f ON j.copy > 1 AND f.copy = 1 AND f.run_id = j.run_id AND f.id = j.id
  ORDER BY j.place;
END $$;

-- ------------------------------------------------------------------ commits

-- A batch of commits, as columns, in id order. `p_*`: one element a commit, nulls where it keeps what the row has;
-- `j_*`: one element a journal row; `p_effects`: what the commits do beside their runs, each with the run it is `of`.
-- Returns the places (from 1) of the commits that are done, now or before, each one's inbox_last, and whom to wake.
CREATE FUNCTION @schema@.commit_runs(
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
  END IF;
END $$;

-- What the commits of `p_passed` do beside their runs, kind by kind: starts come before the messages to them.
-- Returns {run: [owner to wake]}.
CREATE FUNCTION @schema@.apply_effects(p_effects jsonb, p_passed text[]) RETURNS jsonb LANGUAGE plpgsql
AS $$
DECLARE
  v_born jsonb;
  v_messages jsonb;
  v_wake jsonb;
BEGIN
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

  INSERT INTO @schema@.event_waiters (run_id, id, event, match, expires_at)
  SELECT w."of", w.id, w.event, decode(w.match, 'base64'), w.expires_at
  FROM jsonb_to_recordset(p_effects->'opened') AS w("of" text, id text, event text, match text, expires_at bigint)
  WHERE w."of" = ANY (p_passed)
  ON CONFLICT (run_id, id) DO UPDATE
  SET event = excluded.event, match = excluded.match, expires_at = excluded.expires_at;
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
  RETURN v_wake;
END $$;

-- Reopen a dead or failed run, or wake a blocked one. True: its row carries this commit id now.
CREATE FUNCTION @schema@.requeue_run(
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
    AND (r.status IN ('dead', 'failed') OR (r.status = 'active' AND r.activity = 'blocked'))
  RETURNING r.seq INTO v_seq;
  IF v_seq IS NULL THEN
    RETURN EXISTS (SELECT 1 FROM @schema@.runs r WHERE r.id = p_id AND r.commit_id = p_commit_id);
  END IF;
  INSERT INTO @schema@.journal (
    run_id, seq, at, kind, status, key, ordinal, name, attempt, fingerprint, payload, enqueued_at, started_at, finished_at)
  VALUES (p_id, v_seq, j_at, j_kind, j_status, j_key, j_ordinal, j_name, j_attempt, j_fingerprint, j_payload,
          j_enqueued_at, j_started_at, j_finished_at);
  RETURN true;
END $$;

-- ------------------------------------------------------------------ claims

-- The advisory lock of an engine that is alive.
CREATE FUNCTION @schema@.presence_key(p_incarnation text) RETURNS bigint LANGUAGE sql IMMUTABLE
RETURN hashtextextended('@schema@:' || p_incarnation, 0);

CREATE FUNCTION @schema@.beat(p_incarnation text, p_lease_us bigint, p_present boolean, OUT now_us bigint, OUT alive boolean,
  OUT beats bigint)
LANGUAGE plpgsql AS $$
BEGIN
  now_us := @schema@.now_us();
  INSERT INTO @schema@.engines AS e (incarnation, expires_at, present)
  VALUES (p_incarnation, now_us + p_lease_us, p_present)
  ON CONFLICT (incarnation) DO UPDATE
  SET expires_at = excluded.expires_at, present = excluded.present, missed_at = NULL, beats = e.beats + 1 WHERE NOT e.dead
  RETURNING e.beats INTO beats;
  alive := FOUND;
END $$;

-- The lanes of these routes that have due or waiting runs: a lane is a route and a priority, each found by one seek in the
-- due index, so that neither a long backlog nor many sleepers are ever walked through.
CREATE FUNCTION @schema@.lanes(p_workspaces text[], p_workflows text[], p_versions text[])
RETURNS TABLE (workspace text, workflow text, version text, priority integer) LANGUAGE sql STABLE
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
  WITH RECURSIVE lanes AS (
    SELECT w.workspace, w.workflow, w.version, (
      SELECT max(x.priority) FROM @schema@.runs x
      WHERE x.workspace = w.workspace AND x.workflow = w.workflow AND x.version = w.version
        AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked')) AS priority
    FROM (SELECT DISTINCT * FROM unnest(p_workspaces, p_workflows, p_versions)) w(workspace, workflow, version)
    UNION ALL
    SELECT l.workspace, l.workflow, l.version, (
      SELECT max(x.priority) FROM @schema@.runs x
      WHERE x.workspace = l.workspace AND x.workflow = l.workflow AND x.version = l.version
        AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked')
        AND x.priority < l.priority)
    FROM lanes l WHERE l.priority IS NOT NULL)
  SELECT l.workspace, l.workflow, l.version, l.priority FROM lanes l WHERE l.priority IS NOT NULL
$$;

-- Take due runs and runs of engines that are gone. Returns their ids in order of claiming, which of them had crashed, and
-- when the next falls due.
CREATE FUNCTION @schema@.claim_runs(
  p_incarnation text, p_workspaces text[], p_workflows text[], p_versions text[], p_limit integer, p_blocked boolean,
  p_after text, p_confirm_us bigint, OUT ids text[], OUT crashed boolean[], OUT next_due_at bigint
) LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
  v_next bigint;
  v_gone text[];
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
    SELECT coalesce(array_agg(f.id ORDER BY f.id), '{}'), coalesce(array_agg(false), '{}') INTO ids, crashed FROM (
      SELECT r.id FROM @schema@.runs r
      WHERE r.activity = 'blocked' AND r.status = 'active' AND r.owner IS NULL AND r.id > p_after
        AND EXISTS (SELECT 1 FROM unnest(p_workspaces, p_workflows, p_versions) w(workspace, workflow, version)
                    WHERE w.workspace = r.workspace AND w.workflow = r.workflow AND w.version = r.version)
      ORDER BY r.id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED) f;
    next_due_at := NULL;
  ELSE
    WITH lanes AS MATERIALIZED (SELECT * FROM @schema@.lanes(p_workspaces, p_workflows, p_versions)),
    orphans AS (
      SELECT r.id, r.priority, r.wake_at, r.number, r.activity = 'executing' AS crashed
      FROM @schema@.runs r JOIN (SELECT DISTINCT * FROM unnest(p_workspaces, p_workflows, p_versions)) w(
        workspace, workflow, version) ON r.workspace = w.workspace AND r.workflow = w.workflow AND r.version = w.version
      WHERE r.owner = ANY (v_gone) AND r.activity NOT IN ('paused', 'blocked')
      ORDER BY r.priority DESC, r.wake_at NULLS FIRST LIMIT p_limit FOR NO KEY UPDATE OF r SKIP LOCKED),
    due AS (
      SELECT d.id, d.priority, d.wake_at, d.number, false AS crashed
      FROM lanes l CROSS JOIN LATERAL (
        SELECT x.id, x.priority, x.wake_at, x.number FROM @schema@.runs x
        WHERE x.workspace = l.workspace AND x.workflow = l.workflow AND x.version = l.version
          AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked')
          AND x.priority = l.priority AND x.wake_at <= v_now
        ORDER BY x.wake_at, x.number LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED) d),
    found AS (
      SELECT c.*, row_number() OVER (ORDER BY c.priority DESC, c.wake_at NULLS FIRST, c.number) AS place
      FROM (SELECT * FROM orphans UNION ALL SELECT * FROM due) c)
    SELECT
      coalesce(array_agg(f.id ORDER BY f.place) FILTER (WHERE f.place <= p_limit), '{}'),
      coalesce(array_agg(f.crashed ORDER BY f.place) FILTER (WHERE f.place <= p_limit), '{}'),
      (SELECT min((
         SELECT min(x.wake_at) FROM @schema@.runs x
         WHERE x.workspace = l.workspace AND x.workflow = l.workflow AND x.version = l.version
           AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked')
           AND x.priority = l.priority AND x.wake_at > v_now)) FROM lanes l)
    INTO ids, crashed, v_next FROM found f;
    next_due_at := least(next_due_at, v_next);
    IF cardinality(ids) = p_limit AND EXISTS (
      SELECT 1 FROM @schema@.lanes(p_workspaces, p_workflows, p_versions) l CROSS JOIN LATERAL (
        SELECT x.id FROM @schema@.runs x
        WHERE x.workspace = l.workspace AND x.workflow = l.workflow AND x.version = l.version
          AND x.owner IS NULL AND x.status = 'active' AND x.activity NOT IN ('paused', 'blocked')
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
      owner = p_incarnation, epoch = r.epoch + 1, started_at = coalesce(r.started_at, v_now), updated_at = v_now
    WHERE r.id = ANY (ids);
  END IF;
END $$;

-- Owners that live no more and leave runs of these routes behind: marked dead, in this very transaction, and their parked
-- runs freed. An engine whose lease still runs is gone once its lock has been free for longer than a moment.
CREATE FUNCTION @schema@.bury(
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

  UPDATE @schema@.runs r SET owner = NULL, epoch = r.epoch + 1, updated_at = p_now
  WHERE r.id = ANY (ARRAY(
    SELECT p.id FROM @schema@.runs p
    JOIN unnest(p_workspaces, p_workflows, p_versions) w(workspace, workflow, version)
      ON p.workspace = w.workspace AND p.workflow = w.workflow AND p.version = w.version
    WHERE p.owner = ANY (gone) AND p.activity IN ('paused', 'blocked')
    ORDER BY p.id FOR NO KEY UPDATE OF p SKIP LOCKED));
END $$;

-- Give up ownership; another epoch changes nothing. Returns how many runs were let go.
CREATE FUNCTION @schema@.release_runs(p_ids text[], p_epochs integer[]) RETURNS integer LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off
AS $$
DECLARE
  v_now bigint := @schema@.now_us();
  v_count integer;
BEGIN
  UPDATE @schema@.runs r SET
    owner = NULL,
    updated_at = v_now,
    activity = CASE r.activity WHEN 'executing' THEN 'queued' ELSE r.activity END,
    wake_at = CASE WHEN r.activity IN ('paused', 'blocked') THEN r.wake_at ELSE v_now END
  FROM unnest(p_ids, p_epochs) v(id, epoch)
  WHERE r.id = v.id AND r.epoch = v.epoch AND r.owner IS NOT NULL;
  GET DIAGNOSTICS v_count = ROW_COUNT;
  RETURN v_count;
END $$;

-- ------------------------------------------------------------------ retention

-- Delete finished runs, oldest first, with everything that hangs on them. Returns how many.
CREATE FUNCTION @schema@.prune_runs(
  p_workspace text, p_workflow text, p_but text[], p_older_than_us bigint, p_keep integer, p_limit integer
) RETURNS integer LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off
AS $$
DECLARE
  v_before bigint := @schema@.now_us() - p_older_than_us;
  v_ids text[];
BEGIN
  WITH RECURSIVE
  -- The workflows that have finished runs, one seek each.
  workflows AS (
    SELECT min(r.workflow) AS name FROM @schema@.runs r WHERE r.workspace = p_workspace AND r.status <> 'active'
    UNION ALL
    SELECT (SELECT min(r.workflow) FROM @schema@.runs r
            WHERE r.workspace = p_workspace AND r.status <> 'active' AND r.workflow > w.name)
    FROM workflows w WHERE w.name IS NOT NULL),
  -- The last run of each that may go. One bound, as the index has it: of two, joined by OR, all that stays is walked through.
  bounds AS (
    SELECT w.name, l.finished_at, l.id
    FROM workflows w CROSS JOIN LATERAL (
      SELECT v_before AS finished_at, '' COLLATE "C" AS id WHERE v_before IS NOT NULL
      UNION ALL
      (SELECT r.finished_at, r.id FROM @schema@.runs r
       WHERE p_keep IS NOT NULL AND r.workspace = p_workspace AND r.workflow = w.name AND r.status <> 'active'
       ORDER BY r.finished_at DESC, r.id DESC OFFSET p_keep LIMIT 1)
      ORDER BY finished_at DESC, id DESC LIMIT 1) l
    WHERE w.name IS NOT NULL
      AND CASE WHEN p_workflow IS NULL THEN w.name <> ALL (p_but) ELSE w.name = p_workflow END),
  old AS (
    SELECT f.id FROM bounds b CROSS JOIN LATERAL (
      SELECT r.id, r.finished_at FROM @schema@.runs r
      WHERE r.workspace = p_workspace AND r.workflow = b.name AND r.status <> 'active'
        AND (r.finished_at, r.id) <= (b.finished_at, b.id)
        AND NOT EXISTS (SELECT 1 FROM @schema@.runs p WHERE p.id = r.parent_run_id AND p.status = 'active')
        AND NOT EXISTS (SELECT 1 FROM @schema@.runs c WHERE c.parent_run_id = r.id AND c.status = 'active')
      ORDER BY r.finished_at, r.id LIMIT p_limit) f
    ORDER BY f.finished_at, f.id LIMIT p_limit)
  SELECT array_agg(o.id ORDER BY o.id) INTO v_ids FROM old o;

  WITH locked AS (
    SELECT r.id FROM @schema@.runs r WHERE r.id = ANY (v_ids) AND r.status <> 'active'
      -- Once more: a parent may have been requeued since.
      AND NOT EXISTS (SELECT 1 FROM @schema@.runs p WHERE p.id = r.parent_run_id AND p.status = 'active')
      AND NOT EXISTS (SELECT 1 FROM @schema@.runs c WHERE c.parent_run_id = r.id AND c.status = 'active')
    ORDER BY r.id FOR UPDATE SKIP LOCKED)
  SELECT array_agg(l.id) INTO v_ids FROM locked l;
  IF v_ids IS NULL THEN
    RETURN 0;
  END IF;
  DELETE FROM @schema@.journal j WHERE j.run_id = ANY (v_ids);
  DELETE FROM @schema@.inbox i WHERE i.run_id = ANY (v_ids);
  DELETE FROM @schema@.event_waiters w WHERE w.run_id = ANY (v_ids);
  DELETE FROM @schema@.slots s WHERE s.run_id = ANY (v_ids);
  DELETE FROM @schema@.schedule_fires f WHERE f.run_id = ANY (v_ids);
  DELETE FROM @schema@.runs r WHERE r.id = ANY (v_ids);
  RETURN cardinality(v_ids);
END $$;
