/** What is said between the service and an app: protocol/functions.md. */

import { describe } from "../errors.js";

export const SDK = "durable-typescript/0.1";
/** Bytes of a body, either way. */
export const BODY_MAX = 1 << 20;

/** What a run was started by, or has waited for. */
export interface Event<D = any> {
  id: string;
  name: string;
  data: D;
}

/** An event to be sent. The same `id` again changes nothing. */
export interface NewEvent {
  name: string;
  data?: unknown;
  id?: string;
}

/** Why a run has failed for good: what `onFailure` is told. */
export interface Failed {
  message: string;
  name?: string | null;
  code?: string | null;
  /** The operation it has failed with. */
  stepId?: string | null;
  details?: unknown;
}

export interface Memo {
  type: string;
  data?: unknown;
}

/** What the service posts: a run, and what has been done of it. */
export interface Call {
  runId: string;
  functionId: string;
  event: Event;
  steps: Record<string, Memo>;
  failure?: Failed | null;
}

export interface Thrown {
  message: string;
  name: string;
  code?: string;
  details?: unknown;
  retryable: boolean;
}

/** The next operation of a run, or its end. */
export type Operation =
  | { op: "step"; id: string; data: unknown }
  | { op: "sleep"; id: string; until: string }
  | { op: "wait"; id: string; event: string; match: Record<string, unknown> | null; until: string }
  | { op: "sendEvent"; id: string; events: NewEvent[] }
  | { op: "done"; data: unknown }
  | ({ op: "error"; id: string | null } & Thrown);

/** What the service posts, read; undefined: it is something else. */
export function readCall(body: string): Call | undefined {
  const call = JSON.parse(body) as Partial<Call> | null;
  if (!isObject(call) || typeof call.runId !== "string" || typeof call.functionId !== "string") return undefined;
  const { steps = {}, event = {} } = call;
  if (!isObject(steps) || !Object.values(steps).every(isObject) || !isObject(event)) return undefined;
  return { ...(call as Call), steps, event: readEvent(event) };
}

export function readEvent(given: unknown): Event {
  const { id, name, data } = given as Partial<Event>;
  return { id: String(id ?? ""), name: String(name ?? ""), data: data ?? null };
}

export function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Whatever was thrown, as it is told. */
export function thrown(error: unknown): Thrown {
  const { message, code, type, details, retryable } = describe(error);
  return {
    message,
    name: type || "Error",
    ...(code && code !== "error" && { code }),
    ...(details !== undefined && { details }),
    retryable: retryable ?? true,
  };
}
