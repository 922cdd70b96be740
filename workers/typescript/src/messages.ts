/** The messages of the protocol, as `protocol/schema` has them: a type and a reader for each. Writing one is JSON. */

import {
  anything,
  detail,
  flag,
  list,
  map,
  number,
  object,
  text,
  Unreadable,
  whole,
  withDefaults,
  word,
  type Read,
} from "./read.js";

const ms = whole();
const attempt = whole(1);
const seq = whole(0);

export type ErrorData = ReturnType<typeof readError>;
export const readError = object(
  { message: text },
  { code: text, type: text, retryable: flag, retryAfter: number, details: detail, stack: text },
);

export type StepEvent = ReturnType<typeof readStepEvent>;
export const readStepEvent = object(
  { at: ms, level: word("debug", "info", "warn", "error"), message: text },
  {
    data: detail,
    subId: text,
    name: text,
    group: text,
    status: word("ok", "failed", "skipped"),
    phase: text,
    process: text,
    index: whole(0),
  },
);

export type RemoteTask = ReturnType<typeof readRemoteTask>;
export const readRemoteTask = object(
  { runId: text, seq, stepId: text, name: text, group: text, input: anything, attempt },
  { traceparent: text, transport: text, priority: whole(), context: map(anything), token: text },
);

export type StepResult = ReturnType<typeof readStepResult>;
export const readStepResult = object(
  { runId: text, seq, stepId: text, status: word("completed", "failed") },
  { output: anything, error: readError, startedAt: ms, events: list(readStepEvent), attempt, token: text },
);

export type Heartbeat = ReturnType<typeof readHeartbeat>;
export const readHeartbeat = object({ runId: text, seq, group: text }, { stepId: text });

export type ControlMessage = ReturnType<typeof readControlMessage>;
export const readControlMessage = object(
  { from: text, kind: word("event", "cancel", "enqueued") },
  { runId: text, event: map(anything) },
);

const readHistoryItem = object(
  { seq, kind: word("step", "call", "timer", "signal", "child") },
  { name: text, output: anything, error: readError, order: whole(0), at: ms },
);
const readPendingSignal = object({ seq, signal: text, payload: anything }, {});

export type WorkflowTask = ReturnType<typeof readWorkflowTask>;
export const readWorkflowTask = object(
  {
    taskId: text,
    runId: text,
    workflow: text,
    workflowVersion: text,
    input: anything,
    history: list(readHistoryItem),
    group: text,
    attempt,
  },
  { pendingSignals: list(readPendingSignal), transport: text, traceparent: text, priority: whole(), at: ms },
);

const tag = <W extends string>(kind: W) => ({ kind: word(kind), seq });
const readers = {
  call: withDefaults(
    object({ ...tag("call"), name: text }, { group: text, input: anything, parallelGroup: text }),
    () => ({ group: "", input: null }),
  ),
  recordStep: object(
    { ...tag("recordStep"), name: text },
    {
      output: anything,
      error: readError,
      startedAt: ms,
      finishedAt: ms,
      events: list(readStepEvent),
      parallelGroup: text,
    },
  ),
  sleep: object({ ...tag("sleep"), ms: whole() }, { parallelGroup: text }),
  waitSignal: object({ ...tag("waitSignal"), signal: text }, { parallelGroup: text }),
  startChild: withDefaults(
    object({ ...tag("startChild"), workflow: text }, { input: anything, parallelGroup: text }),
    () => ({ input: null }),
  ),
};
export type Command = ReturnType<(typeof readers)[keyof typeof readers]>;
const kindOf = object({ kind: word("call", "recordStep", "sleep", "waitSignal", "startChild") }, {});
export const readCommand: Read<Command> = (value, at) => readers[kindOf(value, at).kind](value, at);

export type WorkflowDecision = ReturnType<typeof readWorkflowDecision>;
export const readWorkflowDecision = withDefaults(
  object(
    { taskId: text, runId: text, status: word("continue", "completed", "failed", "cancelled") },
    { commands: list(readCommand), output: anything, error: readError },
  ),
  () => ({ commands: [] as Command[] }),
);

export const readWorkflowStepEvent = object(
  { runId: text, seq, name: text, phase: word("running", "completed", "failed"), startedAt: ms },
  { finishedAt: ms, output: anything, error: readError, events: list(readStepEvent) },
);

const attribute: Read<string | number | boolean> = (value, at) => {
  if (typeof value === "string" || typeof value === "number" || typeof value === "boolean") return value;
  throw new Unreadable(`${at} is not a text, a number, true or false`);
};
export const readStartRun = withDefaults(
  object(
    { tenant: text, workflow: text },
    { input: anything, runId: text, tags: list(text), searchAttributes: map(attribute) },
  ),
  () => ({ input: null }),
);

export type WorkerHeartbeat = ReturnType<typeof readBeatObject>;
const readBeatObject = object({ ts: number }, { status: anything, descriptorHash: text });
/** Also a bare number, and seconds. */
export const readWorkerHeartbeat: Read<WorkerHeartbeat> = (value, at) => {
  const beat = typeof value === "number" ? { ts: value } : readBeatObject(value, at);
  return { ...beat, ts: beat.ts < 1e12 ? beat.ts * 1000 : beat.ts };
};

const readRange: Read<number[]> = (value, at) => {
  const range = list(whole(1))(value, at);
  if (range.length !== 2) throw new Unreadable(`${at} is not two versions`);
  return range;
};
export type WorkerDescriptor = ReturnType<typeof readWorkerDescriptor>;
export const readWorkerDescriptor = object(
  {
    instanceId: text,
    runtime: text,
    sdk: object({ name: text, version: text }, {}),
    protocol: object({ version: whole(1), range: readRange }, {}),
    capabilities: list(text),
    workflows: list(text),
    steps: list(text),
    startedAt: ms,
  },
  {
    partition: text,
    namespace: text,
    registrations: list(object({ name: text }, { version: text, group: text, requires: list(text), origin: text })),
  },
);

export type Task = { step: RemoteTask } | { turn: WorkflowTask };

/** A step's task or a turn: `workflow` is a text and `history` a list. Throws Unreadable. */
export function readTask(value: unknown): Task {
  const shape = (value ?? {}) as Record<string, unknown>;
  if (typeof shape.workflow === "string" && Array.isArray(shape.history)) {
    return { turn: readWorkflowTask(value, "the turn") };
  }
  const step = readRemoteTask(value, "the task");
  if (step.stepId !== `${step.runId}:${step.seq}`) throw new Unreadable("stepId is not <runId>:<seq>");
  return { step };
}

/** Text as JSON. Throws Unreadable. */
export function parse(data: string): unknown {
  try {
    return JSON.parse(data);
  } catch (error) {
    throw new Unreadable(`it is not JSON: ${String(error)}`);
  }
}
