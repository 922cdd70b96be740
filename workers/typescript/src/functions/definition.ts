/** Functions: what starts them, what they may do, and their code. The service checks them when they are synced. */

import type { Step } from "./step.js";
import type { Event, Failed } from "./wire.js";

export interface Rule {
  limit: number;
  /** A path into the event's data: each value of it has a limit of its own. */
  key?: string;
}

export interface Pace extends Rule {
  periodMs: number;
}

export interface FunctionDefinition<D = any> {
  /** Its name, the same for ever. */
  id: string;
  /** The event that starts it, or */
  event?: string;
  /** the cron line. */
  cron?: string;
  /** Runs go on with the version they began with, as long as it is served. */
  version?: string;
  /** Of each step that fails, 0 to 20; 3 unless said otherwise. */
  retries?: number;
  /** Of the whole run. */
  timeoutMs?: number;
  priority?: number;
  enabled?: boolean;
  /** At most so many runs at once; up to ten rules. */
  concurrency?: Rule | Rule[];
  /** More wait. */
  throttle?: Pace;
  /** More are dropped. */
  rateLimit?: Pace;
  debounce?: { periodMs: number; key?: string };
  batch?: { maxSize: number; timeoutMs: number; key?: string };
  /** What it returns is the run's result. */
  handler(step: Step, event: Event<D>): unknown;
  /** Called once when a run has failed for good; may use steps. */
  onFailure?(step: Step, event: Event<D>, failed: Failed): unknown;
}

/** A function, checked. Throws TypeError. */
export function define<D = any>(definition: FunctionDefinition<D>): FunctionDefinition<D> {
  const { id, event, cron, retries = 3 } = definition;
  if (!id || id.includes("@")) {
    throw new TypeError(`'${id}' is no name of a function: it needs one, without @, which stands before a version.`);
  }
  if ((event === undefined) === (cron === undefined)) {
    throw new TypeError(`Function ${id} is started by an event or by a cron line: give it one of them.`);
  }
  if (!Number.isInteger(retries) || retries < 0 || retries > 20) {
    throw new TypeError(`Function ${id} has ${retries} retries, and 0 to 20 are possible.`);
  }
  return definition;
}

/** As it is told apart: its id, and its version behind an @. */
export const address = ({ id, version }: FunctionDefinition): string => (version === undefined ? id : `${id}@${version}`);

/** As it is synced. */
export function wire(definition: FunctionDefinition): Record<string, unknown> {
  const { handler: _, onFailure, event, cron, ...rest } = definition;
  return {
    ...rest,
    trigger: event === undefined ? { cron } : { event },
    enabled: rest.enabled ?? true,
    retries: rest.retries ?? 3,
    priority: rest.priority ?? 0,
    hasOnFailure: onFailure !== undefined,
  };
}
