/** The worker: takes what a transport brings, runs handlers, answers. It knows no broker.
 *
 *   delivery → read → (no handler | duplicate) → handler → answer handed over → acknowledged
 *                                      ├─ cancelled ──→ failed, step_cancelled
 *                                      └─ lost, or left behind ──→ no answer
 */

import { randomBytes } from "node:crypto";
import type { Control } from "./control.js";
import { describe } from "./errors.js";
import { readTask, type ControlMessage, type RemoteTask, type StepResult, type WorkflowTask } from "./messages.js";
import { routingToken } from "./names.js";
import { Unreadable } from "./read.js";
import { Step } from "./step.js";
import { pause, sleep, type Answer, type Delivery, type Host, type Log, type Transport } from "./transports/transport.js";

/** A handler says itself what its input is: it comes as JSON, unchecked. */
export type Handler = (input: any, step: Step) => unknown;

export interface WorkerOptions {
  transport: Transport;
  /** Handlers by step name. */
  steps: Record<string, Handler>;
  /** How many tasks at once. Over BullMQ: of each step. */
  concurrency?: number;
  /** Serve the tasks of this partition, and no others. */
  partition?: string;
  /** Where cancels come from and progress goes; the transport's own where it has one. */
  control?: Control;
  /** Seconds that tasks under way have to finish when the worker stops. */
  drainTimeout?: number;
  /** Seconds between two heartbeats, where the transport carries them. */
  heartbeatInterval?: number;
  /** Results that are kept to answer tasks that come twice; 0: none. */
  remember?: number;
  log?: Log;
}

interface Job {
  task: RemoteTask;
  abort: AbortController;
  /** The control plane said so. */
  cancelled: boolean;
  /** The broker may have given it to another worker. */
  lost: boolean;
}

const ANSWER_TRIES = 8;
/** For giving back what could not be finished. */
const LAST_WORDS_MS = 2_000;

export class Worker {
  private readonly transport: Transport;
  private readonly control: Control | undefined;
  private readonly concurrency: number;
  private readonly drainTimeout: number;
  private readonly log: Log;
  private readonly incarnation = randomBytes(8).toString("hex");
  private readonly jobs = new Set<Job>();
  private readonly settling = new Set<Promise<void>>();
  /** By step id and attempt: answers under way. */
  private readonly twins = new Map<string, Promise<Answer | undefined>>();
  private readonly remembered = new Map<string, Answer>();
  private roomWaiters: (() => void)[] = [];
  private beating: NodeJS.Timeout | undefined;
  private state: "new" | "running" | "stopping" | "stopped" = "new";
  /** Tasks left under way are given back, without an answer. */
  private readonly leaving = new AbortController();
  private ended: Promise<void> | undefined;
  private readonly whenStopped = deferred();

  constructor(private readonly options: WorkerOptions) {
    if (!Object.keys(options.steps).length) throw new Error("A worker needs at least one step: steps: {name: handler}.");
    this.transport = options.transport;
    this.control = options.control ?? options.transport.control;
    this.concurrency = options.concurrency ?? 16;
    this.drainTimeout = options.drainTimeout ?? 30;
    this.log = options.log ?? ((level, message) => level !== "debug" && console.error(`${level}: ${message}`));
  }

  /** Work until `stop`, or until SIGTERM or SIGINT: then finish what is under way. A second signal ends the process at once. */
  async run(): Promise<void> {
    let started: Promise<void> | undefined;
    let asked = false;
    const leave = () => {
      if (asked) process.exit(1); // the broker gives what is left to others
      asked = true;
      this.log("info", "stopping: tasks under way may finish; a second signal ends the process at once");
      void started?.then(() => this.stop());
    };
    process.on("SIGTERM", leave).on("SIGINT", leave);
    try {
      await (started = this.start());
      await this.whenStopped.promise;
    } finally {
      process.off("SIGTERM", leave).off("SIGINT", leave);
    }
  }

  /** Begin, and return once tasks are taken. Throws with what to do about it. */
  async start(): Promise<void> {
    if (this.state !== "new") throw new Error("A worker is started once; make another one.");
    this.state = "running";
    const steps = Object.keys(this.options.steps);
    const host: Host = {
      steps,
      tokens: [...new Set(steps.map((name) => routingToken(name, this.options.partition)))],
      ...(this.options.partition && { partition: this.options.partition }),
      concurrency: this.concurrency,
      log: this.log,
      room: () => this.room(),
      take: (delivery) => this.take(delivery),
    };
    await this.control?.start((message) => this.heard(message));
    await this.transport.start(host);
    const interval = (this.options.heartbeatInterval ?? 5) * 1_000;
    if (this.transport.heartbeat) this.beating = setInterval(() => this.beat(), interval);
  }

  /** Take nothing more, let what is under way finish, give back what is still there after `drainTimeout`. Idempotent. */
  stop(): Promise<void> {
    this.ended ??= this.end();
    return this.ended;
  }

  private async end(): Promise<void> {
    this.state = "stopping";
    this.wake();
    await this.transport.stop();
    await this.settled(this.drainTimeout * 1_000);
    this.leaving.abort();
    for (const job of this.jobs) job.abort.abort(new Error("The worker is stopping."));
    await this.settled(LAST_WORDS_MS);
    clearInterval(this.beating);
    await this.transport.close();
    await this.control?.close();
    this.state = "stopped";
    this.whenStopped.resolve();
  }

  /** Waits for all that is under way, at most so long. */
  private async settled(ms: number): Promise<void> {
    const done = new AbortController();
    const all = Promise.all(this.settling).then(() => done.abort());
    await Promise.race([all, sleep(ms, done.signal)]);
  }

  // -- taking

  private async room(): Promise<number> {
    while (this.state === "running" && this.settling.size >= this.concurrency) {
      await new Promise<void>((resolve) => this.roomWaiters.push(resolve));
    }
    return this.state === "running" ? this.concurrency - this.settling.size : 0;
  }

  private wake(): void {
    const waiters = this.roomWaiters;
    this.roomWaiters = [];
    for (const resolve of waiters) resolve();
  }

  private take(delivery: Delivery): Promise<void> {
    const settled = this.settle(delivery).catch((error: unknown) => {
      this.log("warn", `a task could not be settled, and comes again: ${String(error)}`);
    });
    this.settling.add(settled);
    return settled.finally(() => {
      this.settling.delete(settled);
      this.wake();
    });
  }

  private async settle(delivery: Delivery): Promise<void> {
    let task;
    try {
      task = readTask(delivery.read());
    } catch (error) {
      if (!(error instanceof Unreadable)) throw error;
      this.log("error", `a message that cannot be read is put away: ${error.message}`);
      return delivery.refuse(error.message);
    }
    if ("turn" in task) return this.handOver(delivery, { decision: noHost(task.turn) });
    const answer = await this.once(task.step, delivery);
    if (answer) return this.handOver(delivery, answer);
    if (delivery.signal.aborted) return; // it is somebody else's
    return delivery.giveBack();
  }

  /** The answer of one step and attempt, however often it is delivered. None: lost, or cut short. */
  private async once(task: RemoteTask, delivery: Delivery): Promise<Answer | undefined> {
    const key = `${task.stepId}#${task.attempt}`;
    const twin = this.twins.get(key);
    const known = this.remembered.get(key) ?? (twin && (await twin));
    if (known) return known;
    const working = this.work(task, delivery);
    this.twins.set(key, working);
    try {
      const answer = await working;
      if (answer && "result" in answer && answer.result.status === "completed") this.remember(key, answer);
      return answer;
    } finally {
      if (this.twins.get(key) === working) this.twins.delete(key);
    }
  }

  private remember(key: string, answer: Answer): void {
    this.remembered.set(key, answer);
    const [oldest] = this.remembered.keys();
    if (this.remembered.size > (this.options.remember ?? 1_000) && oldest !== undefined) this.remembered.delete(oldest);
  }

  // -- working

  private async work(task: RemoteTask, delivery: Delivery): Promise<Answer | undefined> {
    const handler = Object.hasOwn(this.options.steps, task.name) ? this.options.steps[task.name] : undefined;
    const echo = {
      runId: task.runId,
      seq: task.seq,
      stepId: task.stepId,
      attempt: task.attempt,
      ...(task.token !== undefined && { token: task.token }),
    };
    if (!handler) {
      const error = { message: `no handler for ${task.name}`, code: "unknown_step", retryable: false };
      return { result: { ...echo, status: "failed", error } };
    }
    const job: Job = { task, abort: new AbortController(), cancelled: false, lost: false };
    const lose = () => {
      job.lost = true;
      job.abort.abort(new Error("The task was taken away from this worker."));
    };
    delivery.signal.addEventListener("abort", lose);
    if (delivery.signal.aborted) lose();
    const startedAt = Date.now();
    const step = new Step(task, job.abort.signal, (event) => this.progress(task, event));
    // A run that is being cancelled may still wait for a step of its cleaning up.
    const error = { message: "The step was cancelled.", code: "step_cancelled", retryable: true };
    const cancelled = (): StepResult => ({ ...echo, status: "failed", startedAt, error, ...events() });
    const events = () => step.events.length > 0 && { events: step.events };
    this.jobs.add(job);
    try {
      const output = await untilLeaving(this.leaving.signal, handler(task.input, step));
      if (job.lost) return undefined;
      if (job.cancelled) return { result: cancelled() };
      return { result: this.fitting({ ...echo, status: "completed", startedAt, ...written(output), ...events() }) };
    } catch (thrown) {
      if (job.lost || thrown === LEFT) return undefined;
      if (job.cancelled) return { result: cancelled() };
      return { result: this.fitting({ ...echo, status: "failed", startedAt, error: describe(thrown), ...events() }) };
    } finally {
      delivery.signal.removeEventListener("abort", lose);
      this.jobs.delete(job);
    }
  }

  /** Itself, where it is too large less of it, and where no wire carries what counts in it, a failure that says so. */
  private fitting(result: StepResult): StepResult {
    const { events: _events, ...quiet } = result;
    const { output: _output, error, ...bare } = quiet;
    const failed = (code: string, message: string): StepResult => ({
      ...bare,
      status: "failed",
      error: { message, code, retryable: false },
    });
    const { details: _details, stack: _stack, ...terse } = error ?? { message: "" };
    const limit = this.transport.maxMessage;
    let size = 0;
    try {
      for (const less of [result, quiet, ...(error ? [{ ...bare, error: terse }] : [])]) {
        size = Buffer.byteLength(JSON.stringify(less));
        if (size <= limit) return less;
      }
    } catch (reason) {
      return failed("payload_type", `the step returned what JSON cannot say: ${String(reason)}`);
    }
    return failed(
      "payload_too_large",
      `the step's answer has ${size} bytes, the transport carries ${limit}: return a reference to the data instead`,
    );
  }

  private async handOver(delivery: Delivery, answer: Answer): Promise<void> {
    for (let tries = 0; ; tries++) {
      if (delivery.signal.aborted) return;
      try {
        return await delivery.answer(answer);
      } catch (error) {
        this.log("warn", `an answer could not be handed over: ${String(error)}`);
        if (tries >= ANSWER_TRIES || this.leaving.signal.aborted) return delivery.giveBack();
        await sleep(pause(tries), this.leaving.signal);
      }
    }
  }

  // -- telling and hearing

  private progress(task: RemoteTask, event: Step["events"][number]): void {
    const { runId, seq, stepId, attempt, name } = task;
    const told = { type: "step.progress", runId, seq, stepId, attempt, name, event, at: event.at };
    this.control?.publish({ from: this.incarnation, kind: "event", event: told });
  }

  private beat(): void {
    for (const { task } of this.jobs) {
      const { runId, seq, stepId, group } = task;
      this.transport.heartbeat?.({ runId, seq, stepId, group }).catch(() => {}); // a hint
    }
  }

  private heard({ from, kind, runId, event }: ControlMessage): void {
    if (from === this.incarnation) return;
    if (kind === "cancel" && runId) this.cancel((task) => task.runId === runId);
    if (kind !== "event" || event?.type !== "step.cancel") return;
    const until = typeof event.attempt === "number" ? event.attempt : Infinity;
    this.cancel(({ stepId, attempt }) => stepId === event.stepId && attempt <= until);
  }

  private cancel(meant: (task: RemoteTask) => boolean): void {
    for (const job of this.jobs) {
      if (!meant(job.task)) continue;
      job.cancelled = true;
      job.abort.abort(new Error("The step was cancelled."));
    }
  }
}

function deferred(): { promise: Promise<void>; resolve: () => void } {
  let resolve = () => {};
  const promise = new Promise<void>((settle) => (resolve = settle));
  return { promise, resolve };
}

const LEFT = Symbol("left");

/** What the handler gives; where the worker leaves first, and the handler does not end soon after, `LEFT` is thrown. */
async function untilLeaving(leaving: AbortSignal, working: unknown): Promise<unknown> {
  if (!(working instanceof Promise)) return working;
  let leave = () => {};
  const left = new Promise<never>((_, reject) => {
    leave = () => reject(LEFT as unknown as Error);
    leaving.addEventListener("abort", leave);
  });
  try {
    return await Promise.race([working, left]);
  } finally {
    leaving.removeEventListener("abort", leave);
    working.catch(() => {});
  }
}

/** Nothing is null. */
const written = (output: unknown) => ({ output: output === undefined ? null : output });

/** This worker hosts no workflows; a turn that nobody answers would come again for ever. */
function noHost(turn: WorkflowTask): Extract<Answer, { decision: unknown }>["decision"] {
  const error = { message: `no handler for ${turn.workflow}`, code: "unknown_step", retryable: false };
  return { taskId: turn.taskId, runId: turn.runId, status: "failed", commands: [], error };
}
