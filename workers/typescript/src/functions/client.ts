/** Asks the service: sends events, syncs functions, looks at runs. */

import { randomUUID } from "node:crypto";
import type { App } from "./app.js";
import { read } from "./http.js";
import { APP_HEADER, HEADER, sign, signer } from "./signature.js";
import { isObject, SDK, type NewEvent } from "./wire.js";

/** The service did not do what it was asked. */
export class ServiceError extends Error {
  override name = "ServiceError";
  constructor(
    message: string,
    /** HTTP's; 0 where there was no answer. */
    readonly status: number,
    readonly code?: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }
}

export interface ClientOptions {
  /** Where the service is, like http://localhost:3030 */
  url: string;
  appId: string;
  signingKey: string;
  /** How often a call is made at most, the first included. */
  tries?: number;
  /** Seconds a call may take. */
  timeout?: number;
  fetch?: typeof fetch;
}

export interface Sent {
  eventId: string;
  /** What it has started. */
  runIds: string[];
}

export interface Run {
  id: string;
  workflowName: string;
  status: string;
  result?: unknown;
  error?: { message: string; code?: string };
  [more: string]: unknown;
}

/**
 * Every call is signed, and so is every answer. Of answers, 408, 429 and 5xx are asked for again, and so is what was not
 * answered at all: each call bears an id of its own or changes nothing the second time.
 */
export class Client {
  readonly #options: Required<ClientOptions>;

  constructor(options: ClientOptions) {
    this.#options = { tries: 4, timeout: 15, fetch: globalThis.fetch, ...options };
  }

  /** Makes an app's workspace, or finds it: the same name and environment answer the same. Throws ServiceError. */
  static async provision(options: {
    url: string;
    name: string;
    environment?: "dev" | "acc" | "prod";
    appUrl?: string;
    adminToken?: string;
  }): Promise<{ appId: string; signingKey: string }> {
    const { url, adminToken, environment = "dev", ...body } = options;
    const headers = { ...(adminToken !== undefined && { authorization: `Bearer ${adminToken}` }) };
    const asked = post(fetch, `${url.replace(/\/$/, "")}/api/apps`, JSON.stringify({ ...body, environment }), headers, 15);
    return understood(await asked) as { appId: string; signingKey: string };
  }

  /** Tells the service what functions there are: these, and no others. The same again changes nothing. */
  async sync(app: App, url?: string): Promise<void> {
    await this.#ask("/fn/sync", { sdkVersion: SDK, url, functions: app.definitions });
  }

  /** Sends an event; the same id again changes nothing, and is answered the same. */
  send(name: string, data: unknown = {}, id: string = randomUUID()): Promise<Sent> {
    return this.#ask("/e", { id, name, data });
  }

  /** 1 to 100 events: all of them, or none. */
  async sendMany(events: NewEvent[]): Promise<Sent[]> {
    const named = events.map((event) => ({ ...event, id: event.id ?? randomUUID(), data: event.data ?? {} }));
    return (await this.#ask<{ events: Sent[] }>("/e/bulk", { events: named })).events;
  }

  /** The run, with its steps. */
  run(runId: string): Promise<{ run: Run; steps: Record<string, unknown>[] }> {
    return this.#ask("/runs/get", { runId });
  }

  /** Newest first. */
  runs(
    filter: { functionId?: string; status?: string; cursor?: string; limit?: number } = {},
  ): Promise<{ runs: Run[]; cursor: string | null }> {
    return this.#ask("/runs/search", filter);
  }

  async cancel(runId: string): Promise<void> {
    await this.#ask("/runs/cancel", { runId });
  }

  /** A new run of the same; with `stepId` it takes over what came before that step. */
  rerun(runId: string, options: { stepId?: string; idempotencyKey?: string } = {}): Promise<{ runId: string }> {
    return this.#ask("/runs/rerun", { runId, idempotencyKey: randomUUID(), ...options });
  }

  async #ask<T>(path: string, body: unknown): Promise<T> {
    const { url, appId, signingKey, tries, timeout, fetch } = this.#options;
    const text = JSON.stringify(body);
    const headers = { [APP_HEADER]: appId, [HEADER]: sign(text, signingKey) };
    for (let tried = 1; ; tried++) {
      const answer = await post(fetch, url.replace(/\/$/, "") + path, text, headers, timeout);
      const again = answer.status === 0 || answer.status === 408 || answer.status === 429 || answer.status >= 500;
      if (again && tried < tries) {
        await pause(200 * 2 ** (tried - 1) * (0.5 + Math.random() / 2), answer.retryAfter);
        continue;
      }
      if (answer.status === 200 && signer(answer.body, answer.signature, [signingKey]) === undefined) {
        throw new ServiceError("The answer is not signed with our key: is this the service?", 200, "bad_signature");
      }
      return understood(answer) as T;
    }
  }
}

interface Answer {
  /** 0: there was none. */
  status: number;
  body: Uint8Array;
  signature?: string | undefined;
  /** Seconds. */
  retryAfter: number;
  why?: unknown;
}

async function post(
  call: typeof fetch,
  url: string,
  body: string,
  headers: Record<string, string>,
  timeout: number,
): Promise<Answer> {
  try {
    const answer = await call(url, {
      method: "POST",
      body,
      headers: { "content-type": "application/json", ...headers },
      redirect: "manual",
      signal: AbortSignal.timeout(timeout * 1e3),
    });
    return {
      status: answer.status,
      body: answer.body ? await read(answer.body as unknown as AsyncIterable<Uint8Array>) : new Uint8Array(),
      signature: answer.headers.get(HEADER) ?? undefined,
      retryAfter: Number(answer.headers.get("retry-after")) || 0,
    };
  } catch (why) {
    return { status: 0, body: new Uint8Array(), retryAfter: 0, why };
  }
}

function understood({ status, body, why }: Answer): unknown {
  let answer: unknown;
  try {
    answer = JSON.parse(new TextDecoder().decode(body));
  } catch {
    answer = undefined;
  }
  if (status === 200 && isObject(answer)) return answer;
  const error = isObject(answer) && isObject(answer.error) ? answer.error : {};
  const said = status === 0 ? `No answer: ${String(why)}` : `The service answered ${status}.`;
  throw new ServiceError(String(error.message ?? said), status, error.code === undefined ? undefined : String(error.code), { cause: why });
}

const pause = (milliseconds: number, retryAfter: number): Promise<void> =>
  new Promise((resolve) => setTimeout(resolve, Math.max(milliseconds, Math.min(retryAfter, 30) * 1e3)));
