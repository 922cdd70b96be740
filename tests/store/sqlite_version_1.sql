-- A file as version 1 made it, with one run that is due.
PRAGMA journal_mode = WAL;

CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE runs (
  number INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  epoch INTEGER NOT NULL,
  seq INTEGER NOT NULL,
  commit_id TEXT,
  updated_at INTEGER NOT NULL,
  inbox_last INTEGER NOT NULL DEFAULT 0,
  inbox_read INTEGER NOT NULL DEFAULT 0,
  recovery_attempts INTEGER NOT NULL DEFAULT 0,
  status TEXT NOT NULL DEFAULT 'active',
  activity TEXT NOT NULL,
  owner TEXT,
  wake_at INTEGER,
  workspace TEXT NOT NULL,
  workflow TEXT NOT NULL,
  version TEXT NOT NULL,
  priority INTEGER NOT NULL,
  idempotency_key TEXT,
  input_hash TEXT NOT NULL,
  parent_run_id TEXT,
  parent_key TEXT,
  parent_ordinal INTEGER,
  tags TEXT,
  attributes TEXT,
  created_at INTEGER NOT NULL,
  started_at INTEGER,
  finished_at INTEGER,
  input BLOB,
  output BLOB,
  error BLOB,
  CONSTRAINT suspended_run_has_a_wake_time CHECK (
    status <> 'active' OR owner IS NOT NULL OR wake_at IS NOT NULL OR activity IN ('paused', 'blocked'))
);
CREATE UNIQUE INDEX runs_key ON runs (workspace, workflow, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX runs_due ON runs (workflow, version, priority DESC, wake_at) WHERE owner IS NULL AND status = 'active' AND activity NOT IN ('paused', 'blocked');
CREATE INDEX runs_owned ON runs (owner) WHERE owner IS NOT NULL;
CREATE INDEX runs_blocked ON runs (id) WHERE activity = 'blocked' AND status = 'active';
CREATE INDEX runs_children ON runs (parent_run_id) WHERE parent_run_id IS NOT NULL;

CREATE TABLE big_inputs (run_id TEXT PRIMARY KEY, input BLOB NOT NULL) WITHOUT ROWID;

CREATE TABLE journal (
  run_id TEXT NOT NULL,
  seq INTEGER NOT NULL,
  at INTEGER NOT NULL,
  kind TEXT NOT NULL,
  status TEXT NOT NULL,
  key TEXT,
  ordinal INTEGER,
  name TEXT,
  attempt INTEGER NOT NULL,
  fingerprint TEXT,
  payload BLOB,
  enqueued_at INTEGER,
  started_at INTEGER,
  finished_at INTEGER,
  PRIMARY KEY (run_id, seq)
);

CREATE TABLE inbox (
  run_id TEXT NOT NULL,
  number INTEGER NOT NULL,
  id TEXT NOT NULL,
  created_at INTEGER NOT NULL,
  workspace TEXT NOT NULL,
  kind TEXT NOT NULL,
  name TEXT NOT NULL,
  payload BLOB,
  key TEXT,
  ordinal INTEGER,
  attempt INTEGER NOT NULL,
  PRIMARY KEY (run_id, number),
  UNIQUE (run_id, id)
);

CREATE TABLE event_waiters (
  run_id TEXT NOT NULL,
  id TEXT NOT NULL,
  event TEXT NOT NULL,
  match BLOB,
  expires_at INTEGER,
  PRIMARY KEY (run_id, id)
) WITHOUT ROWID;
CREATE INDEX event_waiters_event ON event_waiters (event);

CREATE TABLE slots (
  key TEXT NOT NULL,
  number INTEGER NOT NULL,
  run_id TEXT NOT NULL,
  epoch INTEGER NOT NULL,
  PRIMARY KEY (key, number)
) WITHOUT ROWID;
CREATE INDEX slots_holder ON slots (run_id);

CREATE TABLE schedule_fires (
  schedule_id TEXT NOT NULL,
  occurrence INTEGER NOT NULL,
  run_id TEXT NOT NULL,
  PRIMARY KEY (schedule_id, occurrence)
) WITHOUT ROWID;

CREATE TABLE engines (incarnation TEXT PRIMARY KEY, expires_at INTEGER NOT NULL, dead INTEGER NOT NULL) WITHOUT ROWID;

INSERT INTO meta VALUES ('schema_version', '1'), ('min_engine_version', '1'), ('store_id', 'one'), ('generation', '3');
INSERT INTO runs (id, epoch, seq, updated_at, activity, wake_at, workspace, workflow, version, priority, input_hash, created_at, input)
VALUES ('r', 0, 0, 1, 'queued', 1, 'default', 'checkout', '1', 0, '', 1, '{}');
