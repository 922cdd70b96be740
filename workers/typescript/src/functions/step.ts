/** What a function does that must happen once. */

import { AsyncLocalStorage } from "node:async_hooks";
import { NonRetryable } from "../errors.js";
import { after, iso, type Duration } from "./time.js";
import { isObject, readEvent, thrown, type Event, type Memo, type NewEvent, type Operation } from "./wire.js";

const inside = new AsyncLocalStorage<string>();

/**
 * Each operation has an id, unique in the function. What has been done before is answered from memory; the first that has not
 * ends this call of the function, which is called again when it is done. So code between operations runs again and again: it
 * must do nothing but lead to the same operations.
 *
 * Where a call ends, the promise of the operation never settles: no `catch` and no `finally` of the function sees it.
 */
export class Step {
  /** The operation that ends this call. */
  readonly reached: Promise<Operation>;
  #answer!: (operation: Operation) => void;
  #taken = false;
  readonly #asked = new Set<string>();

  constructor(
    readonly runId: string,
    private readonly memory: Readonly<Record<string, Memo>>,
  ) {
    this.reached = new Promise((resolve) => (this.#answer = resolve));
  }

  /**
   * Does it once and keeps what it returns, which must be JSON. It may run twice if the process dies in it: use `key` with what
   * it calls. What it throws is tried again, unless it is a `NonRetryable`.
   */
  run<T>(id: string, body: () => T | Promise<T>): Promise<T> {
    return this.#once(id, "run", async () => {
      try {
        const data = await inside.run(id, async () => body());
        return { op: "step", id, data: data ?? null };
      } catch (error) {
        return { op: "error", id, ...thrown(error) };
      }
    }) as Promise<T>;
  }

  /** Whether an operation was reached, done or still under way. */
  get taken(): boolean {
    return this.#taken;
  }

  /** The same for every attempt of an operation: hand it to what the step calls. */
  key(id: string): string {
    return `${this.runId}/${id}`;
  }

  async sleep(id: string, time: Duration): Promise<void> {
    await this.#once(id, "sleep", () => ({ op: "sleep", id, until: after(time) }));
  }

  async sleepUntil(id: string, moment: Date | string): Promise<void> {
    await this.#once(id, "sleep", () => ({ op: "sleep", id, until: iso(moment) }));
  }

  /** The next event of that name whose data has all that `match` has; null when none has come in time. */
  async waitForEvent<D = any>(
    id: string,
    event: string,
    { match, timeout = "7 days" }: { match?: Record<string, unknown>; timeout?: Duration } = {},
  ): Promise<Event<D> | null> {
    const found = await this.#once(id, "wait", () => ({ op: "wait", id, event, match: match ?? null, until: after(timeout) }));
    return isObject(found) ? readEvent(found) : null;
  }

  /** Sends an event, or up to 100 of them, once. */
  async sendEvent(id: string, events: NewEvent | NewEvent[]): Promise<void> {
    await this.#once(id, "sendEvent", () => ({
      op: "sendEvent",
      id,
      events: [events].flat().map((event) => ({ ...event, data: event.data ?? {} })),
    }));
  }

  /** What came of it; or nothing ever, and the call ends with it, unless it ends with another already. */
  #once(id: string, type: string, operation: () => Operation | Promise<Operation>): Promise<unknown> {
    const outer = inside.getStore();
    if (outer !== undefined) {
      const message = `Operation '${id}' stands in step '${outer}': a step has no operations of its own. Put it behind the step.`;
      return Promise.reject(new NonRetryable(message, { code: "nested_step" }));
    }
    const known = Object.hasOwn(this.memory, id) ? this.memory[id] : undefined;
    const wrong = this.#misuse(id, type, known);
    if (known && !wrong) return Promise.resolve(known.data ?? null);
    if (!this.#taken) {
      this.#taken = true;
      // A mistake in the function's code is the function's failure: it has no operation that could be tried again.
      void this.#answered(wrong ? () => ({ op: "error", id: null, ...thrown(wrong) }) : operation);
    }
    return new Promise(() => {});
  }

  async #answered(operation: () => Operation | Promise<Operation>): Promise<void> {
    try {
      this.#answer(await operation());
    } catch (error) {
      this.#answer({ op: "error", id: null, ...thrown(error) });
    }
  }

  #misuse(id: string, type: string, known: Memo | undefined): NonRetryable | undefined {
    if (!id) return new NonRetryable("An operation needs an id.", { code: "bad_step_id" });
    if (this.#asked.has(id)) {
      const message = `There are two operations '${id}' in one run: give each an id of its own.`;
      return new NonRetryable(message, { code: "duplicate_step" });
    }
    this.#asked.add(id);
    if (known && known.type !== type) {
      const message = `Operation '${id}' was a ${known.type} before, and is a ${type} now.`;
      return new NonRetryable(message, { code: "step_type_changed" });
    }
    return undefined;
  }
}
