/** Functions over HTTP: the golden vectors, how a call ends, what is refused, and the client. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { Client, createApp, define, NonRetryable, ServiceError, type FunctionDefinition, type Step } from "../src/functions/index.js";
import { HEADER, sign, TIMESTAMP } from "../src/functions/signature.js";
import { milliseconds } from "../src/functions/time.js";

const PROTOCOL = process.env.PROTOCOL_FOLDER ?? fileURLToPath(new URL("../../../../protocol", import.meta.url));
const load = (path: string) => JSON.parse(readFileSync(join(PROTOCOL, "vectors", "functions", path), "utf8"));
const bytes = (body: unknown) => new TextEncoder().encode(typeof body === "string" ? body : JSON.stringify(body));

/** What an app without keys answers to a call. */
async function asked(functions: FunctionDefinition[], call: unknown) {
  const { status, body } = await createApp({ name: "shop", functions }).answer({ method: "POST", headers: {}, body: bytes(call) });
  return { status, answer: JSON.parse(body) };
}

/** The operation that a function reaches. */
async function reached(handler: (step: Step) => unknown, steps = {}) {
  const call = { runId: "r-1", functionId: "f", event: { id: "e", name: "go", data: null }, steps };
  const { answer } = await asked([define({ id: "f", event: "go", handler })], call);
  return answer;
}

test("nothing is imported but Node's own and ours", () => {
  const source = fileURLToPath(new URL("../src/", import.meta.url));
  const seen = new Set<string>();
  const look = (path: string): void => {
    if (seen.has(path)) return;
    seen.add(path);
    for (const [, name = ""] of readFileSync(path, "utf8").matchAll(/^(?:import|export) (?:.* from )?"([^"]+)";$/gm)) {
      assert.match(name, /^(node:|\.)/, path);
      if (name.startsWith(".")) look(join(path, "..", name));
    }
  };
  look(join(source, "functions", "index.js"));
  assert.ok(seen.size > 8);
});

test("signatures are those of everybody", () => {
  for (const { key, body, header, name } of load("signature.json").signatures) assert.equal(sign(body, key), header, name);
});

const fulfil = define<{ id: string }>({
  id: "fulfil",
  event: "order/created",
  version: "2",
  async handler(step, { data: { id } }) {
    const charge = await step.run("charge", () => ({ receipt: `r-${id}` }));
    await step.sleepUntil("nap", "2026-01-01T00:00:00Z");
    const packed = await step.waitForEvent("packed", "order/packed", { match: { id }, timeout: "1 hour" });
    await step.sendEvent("tell", { name: "order/told", data: { id } });
    return { receipt: charge.receipt, box: packed?.data.box, by: packed?.name };
  },
  async onFailure(step, _event, { stepId, message }) {
    await step.run("apologise", () => `sorry for ${stepId}: ${message}`);
  },
});

for (const { name, call, answer } of load("conversation.json").passes) {
  test(`the golden conversation: ${name}`, async () => {
    const found = (await asked([fulfil], call)).answer;
    if (answer.until === "*") answer.until = found.until;
    assert.deepEqual(found, answer);
  });
}

for (const kind of ["valid", "invalid"] as const) {
  for (const { name, message } of load("call.json")[kind]) {
    test(`a call: ${name} is ${kind}`, async () => {
      assert.equal((await asked([fulfil], message)).status, kind === "valid" ? 200 : 400);
    });
  }
}

test("no catch and no finally of a function sees the end of its call", async () => {
  let seen = 0;
  const answer = await reached(async (step) => {
    try {
      await step.sleep("nap", 60);
    } catch {
      seen++;
    } finally {
      seen++;
    }
    return "swallowed";
  });
  assert.equal(answer.op, "sleep");
  assert.equal(seen, 0);
});

test("of steps side by side the first that is not done is run, and no other", async () => {
  const ran: string[] = [];
  const both = (step: Step) => Promise.all(["a", "b"].map((id) => step.run(id, () => void ran.push(id))));
  assert.equal((await reached(both)).id, "a");
  assert.equal((await reached(both, { a: { type: "run", data: 1 } })).id, "b");
  assert.deepEqual(ran, ["a", "b"]);
  const done = await reached(both, { a: { type: "run", data: 1 }, b: { type: "run", data: 2 } });
  assert.deepEqual(done, { op: "done", data: [1, 2] });
});

test("a step that nobody waits for is answered all the same", async () => {
  const answer = await reached((step) => {
    void step.run("a", () => new Promise((resolve) => setTimeout(resolve, 5, "late")));
    return "early";
  });
  assert.deepEqual(answer, { op: "step", id: "a", data: "late" });
});

const mistakes: [string, (step: Step) => unknown, object, string, string | null][] = [
  ["one id for two operations", (step) => Promise.all([step.run("a", () => 1), step.run("a", () => 2)]), { a: { type: "run" } }, "duplicate_step", null],
  ["one id for two types", (step) => step.sleep("a", 1), { a: { type: "run" } }, "step_type_changed", null],
  ["no id", (step) => step.run("", () => 1), {}, "bad_step_id", null],
  ["an operation in a step", (step) => step.run("a", () => step.sleep("b", 1)), {}, "nested_step", "a"],
  ["no length of time", (step) => step.sleep("a", "soon"), {}, "bad_duration", null],
  ["what is no JSON", (step) => step.run("a", () => 1n), {}, "payload_type", "a"],
  ["more than fits", (step) => step.run("a", () => "x".repeat(1 << 20)), {}, "payload_too_large", "a"],
];
for (const [name, handler, steps, code, id] of mistakes) {
  test(`a mistake is told, and not tried again: ${name}`, async () => {
    const answer = await reached(handler, steps);
    assert.deepEqual([answer.op, answer.code, answer.id, answer.retryable], ["error", code, id, false]);
  });
}

test("what is thrown is told: of a step with its id, outside without", async () => {
  const inside = await reached((step) => step.run("a", () => { throw new NonRetryable("no", { code: "c", details: [1] }); }));
  assert.deepEqual(inside, { op: "error", id: "a", message: "no", name: "NonRetryable", code: "c", details: [1], retryable: false });
  const outside = await reached(() => { throw new RangeError("flaky"); });
  assert.deepEqual(outside, { op: "error", id: null, message: "flaky", name: "RangeError", retryable: true });
});

test("lengths of time are seconds or words", () => {
  const all: [number | string, number][] = [[0.2, 200], ["200ms", 200], ["3 days", 3 * 864e5], ["1h", 36e5], ["90 min", 54e5], ["1 week", 6048e5], ["2s", 2000]];
  for (const [text, expected] of all) assert.equal(milliseconds(text), expected, String(text));
  for (const wrong of [-1, NaN, "", "5", "soon", "1 fortnight"]) assert.throws(() => milliseconds(wrong), NonRetryable);
});

test("definitions that make no sense are refused", () => {
  const handler = () => 1;
  for (const wrong of [{ id: "a@1", event: "e" }, { id: "a" }, { id: "a", event: "e", cron: "* * * * *" }, { id: "a", event: "e", retries: 21 }]) {
    assert.throws(() => define({ ...wrong, handler }), TypeError);
  }
  const twice = define({ id: "a", event: "e", handler });
  assert.throws(() => createApp({ name: "shop", functions: [twice, twice] }), /two functions/);
});

test("while a key is changed either counts, and the answer has the same", async () => {
  const app = createApp({ name: "shop", functions: [fulfil], keys: ["new", "old"] });
  const body = bytes(load("call.json").valid[0].message);
  for (const key of ["new", "old", "third"]) {
    const answer = await app.answer({ method: "POST", headers: { [HEADER]: sign(body, key) }, body });
    assert.equal(answer.status, key === "third" ? 401 : 200);
    if (key !== "third") assert.equal(answer.headers[HEADER], sign(answer.body, key));
  }
});

test("the manifest is for who signs the time, and says who the app is only where that is wanted", async () => {
  const app = createApp({ name: "shop", functions: [fulfil], keys: ["k"], discovery: "shop.dev" });
  const get = (time: number, more = {}) =>
    app.answer({ method: "GET", headers: { [TIMESTAMP]: String(time), [HEADER]: sign(String(time), "k"), ...more }, body: bytes("") });
  assert.equal((await get(Date.now() - 301_000)).status, 401);
  assert.deepEqual(Object.keys(JSON.parse((await get(Date.now())).body)), ["functions", "sdkVersion"]);
  const found = JSON.parse((await get(Date.now(), { "x-durable-discovery": "true" })).body);
  assert.deepEqual([found.appId, found.appName, found.signingKey], ["shop.dev", "shop", "k"]);
  assert.equal(found.functions[0].hasOnFailure, true);
});

test("both faces answer: Node's own, which takes no more than 1 MiB, and Request to Response", async () => {
  const app = createApp({ name: "shop", functions: [fulfil] });
  const server = createServer(app.node).listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  try {
    const call = JSON.stringify(load("call.json").valid[0].message);
    for (const answer of [await fetch(url, { method: "POST", body: call }), await app.fetch(new Request(url, { method: "POST", body: call }))]) {
      assert.deepEqual(await answer.json(), { op: "step", id: "charge", data: { receipt: "r-o-1" } });
    }
    assert.equal((await app.fetch(new Request(url, { method: "POST", body: "x".repeat((1 << 20) + 1) }))).status, 413);
    assert.equal((await fetch(url, { method: "PUT" })).status, 405);
    assert.equal((await fetch(url, { method: "POST", body: "no json" })).status, 400);
    assert.equal((await fetch(url, { method: "POST", body: call.replace("fulfil@2", "other") })).status, 404);
  } finally {
    server.close();
  }
});

/** A client whose service answers these, one after the other. */
function clientOf(answers: { status: number; body?: unknown; key?: string }[]) {
  const calls: { url: string; body: string; headers: Record<string, string> }[] = [];
  const fake = async (url: string, init: { body: string; headers: Record<string, string> }) => {
    calls.push({ url, ...init });
    const { status, body = {}, key = "k" } = answers.shift()!;
    const text = JSON.stringify(body);
    return new Response(text, { status, headers: { [HEADER]: sign(text, key) } });
  };
  return { calls, client: new Client({ url: "http://s/", appId: "shop.dev", signingKey: "k", fetch: fake as unknown as typeof fetch }) };
}

test("408, 429 and 5xx are asked for again, with the same event id", async () => {
  const { client, calls } = clientOf([{ status: 503 }, { status: 429 }, { status: 408 }, { status: 200, body: { eventId: "e" } }]);
  assert.equal((await client.send("go")).eventId, "e");
  assert.equal(new Set(calls.map(({ body }) => body)).size, 1);
  const { url, body, headers } = calls[3]!;
  assert.deepEqual([url, headers["x-durable-app"], headers[HEADER]], ["http://s/e", "shop.dev", sign(body, "k")]);
});

for (const status of [400, 401, 404, 409, 301]) {
  test(`${status} is an answer`, async () => {
    const { client, calls } = clientOf([{ status, body: { error: { code: "why", message: "no" } } }]);
    await assert.rejects(client.cancel("r"), (error) => error instanceof ServiceError && error.status === status && error.code === "why");
    assert.equal(calls.length, 1);
  });
}

test("an answer that another key has signed is not believed", async () => {
  const { client } = clientOf([{ status: 200, key: "another" }]);
  await assert.rejects(client.run("r"), /not signed with our key/);
});
