/** An app's functions, behind one URL. It keeps nothing: any process may answer any call. */

import { NonRetryable } from "../errors.js";
import { address, define, wire, type FunctionDefinition } from "./definition.js";
import { handleFetch, handleNode, type NodeHandler } from "./http.js";
import { HEADER, isNow, sign, signer, TIMESTAMP } from "./signature.js";
import { Step } from "./step.js";
import { BODY_MAX, readCall, SDK, thrown, type Call, type Operation } from "./wire.js";

export interface AppOptions {
  name: string;
  functions: FunctionDefinition[];
  /** Signing keys: one, or two while it is changed. None: unsigned, for development only. */
  keys?: string[];
  /** The app's id, told with its key to who asks in development. */
  discovery?: string;
}

export interface Asked {
  method: string;
  /** Names in small letters. */
  headers: Record<string, string | undefined>;
  body: Uint8Array;
}

export interface Answered {
  status: number;
  headers: Record<string, string>;
  body: string;
}

export interface App {
  readonly name: string;
  /** As they are synced. */
  readonly definitions: Record<string, unknown>[];
  /** For `http.createServer`, and whatever is called as its listeners are. */
  readonly node: NodeHandler;
  /** From a `Request` to a `Response`. */
  readonly fetch: (request: Request) => Promise<Response>;
  /** The same without any framework. */
  readonly answer: (asked: Asked) => Promise<Answered>;
}

/** Throws TypeError where the functions make no sense. */
export function createApp({ name, functions, keys = [], discovery }: AppOptions): App {
  const known = new Map<string, FunctionDefinition>();
  for (const one of functions) {
    const place = address(define(one));
    if (known.has(place)) throw new TypeError(`There are two functions ${place}.`);
    known.set(place, one);
  }
  const definitions = [...known.values()].map(wire);

  /** Signed with the key that has signed the request. */
  const said = (status: number, body: unknown, key: string | undefined = keys[0]): Answered => {
    const text = encode(body);
    const headers = { "content-type": "application/json", ...(key !== undefined && { [HEADER]: sign(text, key) }) };
    return { status, headers, body: text };
  };
  const refused = (status: number, code: string, message: string): Answered => said(status, { error: { code, message } });
  const forged = () => refused(401, "bad_signature", "The signature does not hold.");

  const manifest = (headers: Asked["headers"]): Answered => {
    const time = headers[TIMESTAMP];
    const key = signer(time ?? "", headers[HEADER], keys);
    if (keys.length && !(isNow(time) && key !== undefined)) return forged();
    const told = headers["x-durable-discovery"] === "true" && discovery !== undefined;
    const more = told && { appId: discovery, appName: name, signingKey: keys[0] ?? null };
    return said(200, { functions: definitions, sdkVersion: SDK, ...more }, key);
  };

  const answer = async ({ method, headers, body }: Asked): Promise<Answered> => {
    if (body.length > BODY_MAX) return refused(413, "payload_too_large", "A body has at most 1 MiB.");
    if (method === "GET") return manifest(headers);
    if (method !== "POST") return refused(405, "method_not_allowed", "It is GET or POST.");
    const key = signer(body, headers[HEADER], keys);
    if (keys.length && key === undefined) return forged();
    let call: Call | undefined;
    try {
      call = readCall(new TextDecoder("utf-8", { fatal: true }).decode(body));
    } catch {
      return refused(400, "bad_json", "The body is no JSON.");
    }
    if (!call) return refused(400, "bad_body", "The body is no call of a function.");
    const found = known.get(call.functionId);
    if (!found) return refused(404, "unknown_function", `There is no function ${call.functionId} here.`);
    return said(200, await next(found, call), key);
  };

  return {
    name,
    definitions,
    answer,
    node: (request, response) => void handleNode(answer, request, response),
    fetch: (request) => handleFetch(answer, request),
  };
}

/** The next operation of a run: the first that the function has reached, or its end. */
async function next(one: FunctionDefinition, { runId, steps, event, failure }: Call): Promise<Operation> {
  const step = new Step(runId, steps);
  const whole = async (): Promise<Operation> => {
    try {
      const data = failure && one.onFailure ? await one.onFailure(step, event, failure) : await one.handler(step, event);
      return { op: "done", data: data ?? null };
    } catch (error) {
      return { op: "error", id: null, ...thrown(error) };
    }
  };
  // Where an operation was reached, its answer counts, even if the function did not wait for it.
  const ended = whole();
  const first = await Promise.race([step.reached.then(() => undefined), ended]);
  return first === undefined || step.taken ? step.reached : first;
}

/** What no JSON can carry, or is too large, is told instead: it would be no better the next time. */
function encode(body: unknown): string {
  const id = (body as { id?: string }).id ?? null;
  const instead = (message: string, code: string): string =>
    JSON.stringify({ op: "error", id, ...thrown(new NonRetryable(message, { code })) });
  let text: string;
  try {
    text = JSON.stringify(body);
  } catch (error) {
    return instead(`A result is no JSON: ${error instanceof Error ? error.message : String(error)}`, "payload_type");
  }
  if (Buffer.byteLength(text) <= BODY_MAX) return text;
  return instead("A result has more than 1 MiB. Keep it elsewhere, and return where.", "payload_too_large");
}
