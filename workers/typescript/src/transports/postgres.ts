/** Rows of two tables on Postgres. Notifications wake it; polling alone would do. The clock is the server's. */

import { createHash, randomUUID } from "node:crypto";
import pg from "pg";
import { parse, type ErrorData } from "../messages.js";
import * as names from "../names.js";
import { pause, sleep, type Answer, type Host, type Transport } from "./transport.js";

const NOW = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint";
/** The engine takes an extension for a heartbeat. */
const BEAT_MS = 5_000;
const MORE = { tasks: ["token", "extra", "priority", "kind", "cancelled_at", "deliveries"], results: ["attempt", "token", "extra", "kind"] };

export interface PostgresOptions {
  /** `postgresql://…` */
  url: string;
  prefix?: string;
  namespace?: string;
  /** The tables' schema; what the connection's search path finds where there is none. */
  schema?: string;
  /** Seconds a task stays ours without a sign of life. The same for all who use the tables. */
  lease?: number;
  /** How many workers may take a task and not finish it before it is answered as failed. */
  maxDeliveries?: number;
  /** Seconds between two looks while nothing was said. */
  poll?: number;
}

interface Row {
  step_id: string;
  run_id: string;
  seq: number;
  name: string;
  grp: string;
  input: string | null;
  attempt: number;
  token?: string | null;
  extra?: string | null;
  priority?: number | null;
  kind?: string | null;
  cancelled_at?: string | null;
  deliveries?: number | null;
}

interface Held {
  row: Row;
  claim: string;
  lost: AbortController;
}

export function postgres(options: PostgresOptions): Transport {
  const prefix = names.effectivePrefix(options.prefix, options.namespace);
  const schema = options.schema ? `${pg.escapeIdentifier(options.schema)}.` : "";
  const tasks = schema + pg.escapeIdentifier(names.tasksTable(prefix));
  const results = schema + pg.escapeIdentifier(names.resultsTable(prefix));
  const leaseMs = (options.lease ?? 30) * 1_000;
  const maxDeliveries = options.maxDeliveries ?? 3;
  const word = createHash("sha256")
    .update(`${options.schema ?? ""}.${names.tasksTable(prefix)}`)
    .digest("hex")
    .slice(0, 16);
  const channel = (what: string) => `durable_${what}_${word}`;
  const held = new Map<string, Held>();
  const stopping = new AbortController();
  const pool = new pg.Pool({
    connectionString: options.url,
    max: 3,
    application_name: "durable worker",
    connectionTimeoutMillis: 5_000,
    query_timeout: 10_000,
  });
  pool.on("error", () => {}); // an idle connection broke; the next statement makes another
  let columns: { tasks: Set<string>; results: Set<string> } | undefined;
  let listener: pg.Client | undefined;
  let news = new AbortController();
  let keeping: NodeJS.Timeout | undefined;
  let loops: Promise<void>[] = [];

  /** Which columns there are: those that all know, and of ours what the engine's tables have. */
  async function look(): Promise<NonNullable<typeof columns>> {
    if (columns) return columns;
    const found = { tasks: new Set<string>(), results: new Set<string>() };
    for (const [which, table] of [["tasks", tasks], ["results", results]] as const) {
      const { rows } = await pool.query<{ attname: string }>(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped",
        [table],
      );
      if (!rows.length) throw new Error(`there is no table ${table}: an engine makes it, or see docs of the protocol`);
      for (const { attname } of rows) found[which].add(attname);
    }
    return (columns = found);
  }

  async function claim(tokens: string[], room: number): Promise<Held[]> {
    const has = await look();
    const name = randomUUID();
    const more = MORE.tasks.filter((column) => has.tasks.has(column)).map((column) => `, task.${column}`);
    const order = has.tasks.has("priority") ? "coalesce(priority, 0) DESC, created_at" : "created_at";
    const { rows } = await pool.query<Row>(
      `WITH mine AS (
         SELECT step_id FROM ${tasks}
          WHERE grp = ANY($1) AND (claimed_at IS NULL OR claimed_at < ${NOW} - $2)
            ${has.tasks.has("refused") ? "AND refused IS NULL" : ""}
          ORDER BY ${order} LIMIT $3 FOR UPDATE SKIP LOCKED)
       UPDATE ${tasks} AS task SET claimed_by = $4, claimed_at = ${NOW}
              ${has.tasks.has("deliveries") ? ", deliveries = coalesce(deliveries, 0) + 1" : ""}
         FROM mine WHERE task.step_id = mine.step_id
       RETURNING task.step_id, run_id, seq, name, grp, input, attempt ${more.join("")}`,
      [tokens, leaseMs, room, name],
    );
    return rows.map((row) => ({ row, claim: name, lost: new AbortController() }));
  }

  async function keep(host: Host): Promise<void> {
    const all = [...held.values()];
    if (!all.length || !columns) return;
    const cancelled = columns.tasks.has("cancelled_at") ? "cancelled_at IS NOT NULL" : "false";
    let kept: { id: string; claim: string; cancelled: boolean }[];
    try {
      const given = "unnest($1::text[], $2::text[]) AS given (id, claim)";
      const { rows } = await pool.query<(typeof kept)[number]>(
        `UPDATE ${tasks} AS task SET claimed_at = ${NOW} FROM ${given}
          WHERE step_id = given.id AND claimed_by = given.claim
         RETURNING given.id, given.claim, ${cancelled} AS cancelled`,
        [all.map(({ row }) => row.step_id), all.map((each) => each.claim)],
      );
      kept = rows;
    } catch (error) {
      host.log("warn", `leases could not be extended, which is tried again: ${String(error)}`);
      return;
    }
    const there = new Map(kept.map((row) => [`${row.id}#${row.claim}`, row.cancelled]));
    for (const { row, claim: name, lost } of all) {
      const state = there.get(`${row.step_id}#${name}`);
      if (state === false) continue;
      lost.abort(); // no row: gone, replaced, or somebody else's
      if (state) await remove(row, name).catch(() => {}); // claimed again when this claim has run out
    }
  }

  async function remove(row: Row, name: string): Promise<void> {
    await pool.query(`DELETE FROM ${tasks} WHERE step_id = $1 AND claimed_by = $2`, [row.step_id, name]);
  }

  async function finish(row: Row, claim: string, answer: Answer): Promise<void> {
    const has = await look();
    const fields: Record<string, unknown> = { step_id: row.step_id, run_id: row.run_id };
    if ("decision" in answer) {
      const decision = { seq: -1, status: answer.decision.status, kind: "decision", extra: JSON.stringify(answer.decision) };
      Object.assign(fields, decision, { attempt: row.attempt });
    } else {
      const { seq, status, output, error, startedAt, events, token, attempt } = answer.result;
      Object.assign(fields, { seq, status, started_at: startedAt, attempt, token });
      if (status === "completed") fields.output = JSON.stringify(output ?? null);
      if (error) fields.error = JSON.stringify(error);
      if (events) fields.extra = JSON.stringify({ events });
    }
    const given = Object.entries(fields).filter(([key]) => !MORE.results.includes(key) || has.results.has(key));
    const keys = given.map(([key]) => key);
    const newer = keys.filter((key) => key !== "step_id").map((key) => `${key} = excluded.${key}`);
    const conflict = has.results.has("attempt")
      ? `DO UPDATE SET ${newer.join(", ")}, created_at = excluded.created_at, claimed_by = NULL, claimed_at = NULL
         WHERE there.attempt < excluded.attempt`
      : "DO NOTHING";
    const places = keys.map((_, index) => `$${index + 4}`);
    await pool.query(
      `WITH done AS (DELETE FROM ${tasks} WHERE step_id = $1 AND claimed_by = $2),
            put AS (INSERT INTO ${results} AS there (${keys.join(", ")}, created_at)
                    VALUES (${places.join(", ")}, ${NOW}) ON CONFLICT (step_id) ${conflict})
       SELECT pg_notify($3, '')`,
      [row.step_id, claim, channel("results"), ...given.map(([, value]) => value ?? null)],
    );
  }

  function take(host: Host, mine: Held): void {
    const { row, claim, lost } = mine;
    const key = `${row.step_id}#${claim}`;
    const where = "WHERE step_id = $1 AND claimed_by = $2";
    const delivery = {
      read: () => messageOf(row),
      signal: lost.signal,
      answer: (answer: Answer) => finish(row, claim, answer),
      async giveBack() {
        const less = columns?.tasks.has("deliveries") ? ", deliveries = deliveries - 1" : "";
        await pool.query(`UPDATE ${tasks} SET claimed_by = NULL, claimed_at = NULL${less} ${where}`, [row.step_id, claim]);
        await pool.query("SELECT pg_notify($1, $2)", [channel("tasks"), row.grp]);
      },
      refuse: (why: string) =>
        finish(row, claim, failed(row, { message: `The task's row cannot be read: ${why}`, code: "payload_type", retryable: false })),
      giveUp() {
        const message = `remote step worker failed: ${(row.deliveries ?? 1) - 1} workers took the task and none finished it`;
        return finish(row, claim, failed(row, { message, code: "worker_failed", type: "WorkerFailed" }));
      },
    };
    if (row.cancelled_at) return void remove(row, claim).catch(() => {}); // claimed again when this claim has run out
    if ((row.deliveries ?? 0) > maxDeliveries) return void delivery.giveUp().catch(() => {});
    held.set(key, mine);
    void host.take(delivery).finally(() => held.delete(key));
  }

  async function work(host: Host): Promise<void> {
    for (let failures = 0; !stopping.signal.aborted; ) {
      const room = await host.room();
      if (!room) return;
      news = new AbortController();
      try {
        const claimed = await claim(host.tokens, room);
        if (failures) host.log("info", "tasks can be claimed again");
        failures = 0;
        for (const each of claimed) take(host, each);
        if (claimed.length < room) {
          await sleep((options.poll ?? 1) * 1_000, AbortSignal.any([news.signal, stopping.signal]));
        }
      } catch (error) {
        columns = undefined;
        if (!failures) host.log("warn", `tasks cannot be claimed, which is tried again: ${String(error)}`);
        await sleep(pause(failures++), stopping.signal);
      }
    }
  }

  /** Listen for ever; while that cannot be, polling does. */
  async function listen(host: Host): Promise<void> {
    for (let failures = 0; !stopping.signal.aborted; failures++) {
      const client = new pg.Client({ connectionString: options.url, application_name: "durable worker", keepAlive: true });
      const ended = new Promise<void>((resolve) => client.once("end", resolve).on("error", () => resolve()));
      client.on("notification", ({ channel: from, payload }) => {
        if (from !== channel("cancels")) news.abort();
        else if (!payload || [...held.values()].some(({ row }) => row.step_id === payload)) void keep(host);
      });
      try {
        await client.connect();
        listener = client;
        await client.query(`LISTEN ${channel("tasks")}; LISTEN ${channel("cancels")}`);
        failures = 0;
        news.abort(); // something may have been said before
        await ended;
      } catch {
        // polling goes on
      }
      listener = undefined;
      await client.end().catch(() => {});
      await sleep(pause(failures), stopping.signal);
    }
  }

  return {
    maxMessage: (1 << 20) + (256 << 10),

    async start(host) {
      try {
        await pool.query("SELECT 1");
      } catch (error) {
        throw new Error(`The database cannot be reached: ${String(error)}. Check the URL, and that it is up.`);
      }
      keeping = setInterval(() => void keep(host), Math.min(leaseMs / 3, BEAT_MS));
      loops = [work(host), listen(host)];
    },

    async stop() {
      stopping.abort();
      await loops[0];
    },

    async close() {
      clearInterval(keeping);
      await listener?.end().catch(() => {});
      await Promise.all(loops);
      await pool.end();
    },
  };
}

/** Whose it is stands in columns of its own, so it can be answered whatever else is in it, and nobody waits for ever. */
function failed(row: Row, error: ErrorData): Answer {
  if (row.kind === "turn") {
    return { decision: { taskId: row.step_id, runId: row.run_id, status: "failed", commands: [], error } };
  }
  const { run_id: runId, seq, step_id: stepId, attempt, token } = row;
  return { result: { runId, seq, stepId, attempt, ...(token && { token }), status: "failed", error } };
}

/** The row as the message it stands for. Throws Unreadable. */
function messageOf(row: Row): unknown {
  const more = row.extra ? parse(row.extra) : {};
  if (row.kind === "turn") return more;
  return {
    ...(more as object),
    runId: row.run_id,
    seq: row.seq,
    stepId: row.step_id,
    name: row.name,
    group: row.grp,
    input: parse(row.input ?? "null"),
    attempt: row.attempt,
    token: row.token,
    priority: row.priority,
  };
}
