/** What a transport brings, and what the worker gives it. */

import type { Control } from "../control.js";
import type { Heartbeat, StepResult, WorkflowDecision } from "../messages.js";

export type Answer = { result: StepResult } | { decision: WorkflowDecision };

/** One task in our hands. The transport keeps it (lock, lease, visibility) until one of the last three was called. */
export interface Delivery {
  /** The message, as JSON. Throws Unreadable. */
  read(): unknown;
  /** Aborted when the broker may have given the task to somebody else, or nobody wants it any more. */
  readonly signal: AbortSignal;
  /** Hand over the answer, then acknowledge. Throws where it could not be handed over. */
  answer(answer: Answer): Promise<void>;
  /** Have it delivered again, here or elsewhere. */
  giveBack(): Promise<void>;
  /** Put it away: nobody can read it. */
  refuse(why: string): Promise<void>;
}

/** The worker, as a transport sees it. */
export interface Host {
  /** Names of the steps that are served, and the routing tokens they wait under. */
  readonly steps: string[];
  readonly tokens: string[];
  readonly partition?: string;
  /** How many tasks at once. */
  readonly concurrency: number;
  readonly log: Log;
  /** Waits until at least one more may be taken; how many. 0: the worker is stopping. */
  room(): Promise<number>;
  /** Work on it. Resolves when it is settled, and never rejects. */
  take(delivery: Delivery): Promise<void>;
}

export interface Transport {
  /** Bytes an answer may have. */
  readonly maxMessage: number;
  /** The transport's own control plane, where it has one. */
  readonly control?: Control;
  /** Connect and begin to take. Throws with what to do about it. */
  start(host: Host): Promise<void>;
  /** Take nothing more. */
  stop(): Promise<void>;
  /** Let go of connections, once what was under way is settled or left. */
  close(): Promise<void>;
  /** Say that a task is being worked on, where the transport carries that. */
  heartbeat?(beat: Heartbeat): Promise<void>;
}

export type Log = (level: "debug" | "info" | "warn" | "error", message: string) => void;

/** Milliseconds to wait before try number `n` (from 0), with some chance in it. */
export const pause = (n: number, most = 5_000) => Math.min(most, 100 * 2 ** n) * (0.5 + Math.random() / 2);

/** Waits, or returns early when aborted. */
export function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    if (signal?.aborted) done();
    else signal?.addEventListener("abort", done);
  });
}
