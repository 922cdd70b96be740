/** What a handler is given beside its input. */

import type { RemoteTask, StepEvent } from "./messages.js";

const EVENTS_MAX = 1_000;

export type Level = StepEvent["level"];

export class Step {
  /** Lines told so far, in order. */
  readonly events: StepEvent[] = [];

  constructor(
    private readonly task: RemoteTask,
    /** Aborted when the step is cancelled, or another worker may have it by now. */
    readonly signal: AbortSignal,
    private readonly tell: (event: StepEvent) => void,
  ) {}

  get runId(): string {
    return this.task.runId;
  }

  get stepId(): string {
    return this.task.stepId;
  }

  /** The same for every delivery and every attempt: give it to whatever the step does to the world. */
  get idempotencyKey(): string {
    return this.task.stepId;
  }

  /** From 1. */
  get attempt(): number {
    return this.task.attempt;
  }

  get name(): string {
    return this.task.name;
  }

  /** W3C trace context of the run, to be continued. */
  get traceparent(): string | undefined {
    return this.task.traceparent;
  }

  /** Opaque; as the engine's side gave it. */
  get context(): Record<string, unknown> {
    return this.task.context ?? {};
  }

  /** A line for the run's timeline: seen at once where somebody watches, and kept with the answer. `data`: any JSON. */
  log(message: string, data?: unknown, level: Level = "info"): void {
    if (this.events.length >= EVENTS_MAX) return;
    const event: StepEvent = { at: Date.now(), level, message, index: this.events.length };
    if (data !== undefined) event.data = kept(data);
    this.events.push(event);
    this.tell(event);
  }
}

/** As it is now; as text where JSON cannot say it, since a line is no reason to fail. */
export function kept(data: unknown): unknown {
  try {
    return JSON.parse(JSON.stringify(data)) as unknown;
  } catch {
    return String(data);
  }
}
