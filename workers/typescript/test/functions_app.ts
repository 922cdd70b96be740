/**
 * An app for tests/workers/test_functions_typescript.py. Without arguments it serves; `functions_app.js METHOD ARGUMENTS` calls the
 * service with the client, and prints the answer as JSON.
 */

import { appendFileSync, readFileSync } from "node:fs";
import { createServer } from "node:http";
import { Client, createApp, define, NonRetryable, ServiceError } from "../src/functions/index.js";

const { DIARY = "", DURABLE_URL: url = "", APP_ID: appId = "", KEYS = "", VERSIONS = "1,2", PORT } = process.env;
const note = (what: string) => appendFileSync(DIARY, `${what}\n`);
const noted = (what: string) => readFileSync(DIARY, "utf8").split("\n").filter((line) => line === what).length;
const keys = KEYS.split(",").filter(Boolean);

const app = createApp({
  name: "shop",
  keys,
  functions: [
    define<{ id: string }>({
      id: "order",
      event: "order/created",
      async handler(step, { data: { id } }) {
        const charge = await step.run("charge", () => {
          note(`charge ${id}`);
          return { receipt: `r-${id}`, key: step.key("charge") };
        });
        await step.sleep("nap", 0.05);
        const packed = await step.waitForEvent("packed", "order/packed", { match: { id }, timeout: "1 hour" });
        await step.sendEvent("tell", [
          { name: "order/told", data: { id } },
          { name: "order/told", data: { id: `${id} again` } },
        ]);
        await step.run("seal", () => note(`seal ${id}`));
        const key = charge.key === `${step.runId}/charge`;
        return { receipt: charge.receipt, box: packed?.data.box, by: packed?.name, key };
      },
    }),
    define<{ id: string }>({
      id: "told",
      event: "order/told",
      async handler(step, event) {
        await step.run("note", () => note(`told ${event.data.id}`));
      },
    }),
    define({
      id: "late",
      event: "late/go",
      handler: async (step) => ({ found: await step.waitForEvent("never", "never", { timeout: 0.05 }) }),
    }),
    define({
      id: "flaky",
      event: "flaky/go",
      retries: 1,
      handler: (step) =>
        step.run("try", () => {
          note("try");
          if (noted("try") < 2) throw new Error("not yet");
          return noted("try");
        }),
    }),
    define({
      id: "declined",
      event: "declined/go",
      async handler(step) {
        try {
          await step.run("pay", () => {
            note("pay");
            throw new NonRetryable("card declined", { code: "card_declined", details: { limit: 5 } });
          });
        } catch {
          note("swallowed");
        }
      },
      async onFailure(step, _event, { message, code, stepId, details }) {
        await step.run("apologise", () => note(`sorry: ${message}, ${code}, ${stepId}, ${(details as { limit: number }).limit}`));
      },
    }),
    ...VERSIONS.split(",").map((version) =>
      define({
        id: "versioned",
        event: "versioned/go",
        version,
        async handler(step) {
          await step.waitForEvent("on", "versioned/on", { timeout: "1 hour" });
          return `by ${version}`;
        },
      }),
    ),
  ],
});

async function call(method: string, given: any[]): Promise<unknown> {
  if (method === "provision") {
    return Client.provision({ url, name: "shop", environment: "dev", appUrl: given[0], adminToken: given[1] });
  }
  const client = new Client({ url, appId, signingKey: keys[0]! }) as any;
  return client[method](...(method === "sync" ? [app, ...given] : given));
}

const [method, given] = process.argv.slice(2);
if (method === undefined) {
  createServer(app.node).listen(Number(PORT), "127.0.0.1");
} else {
  const answer = await call(method, JSON.parse(given ?? "[]")).catch((error: unknown) => {
    if (error instanceof ServiceError) return { refused: error.status, code: error.code };
    throw error;
  });
  console.log(JSON.stringify(answer ?? null));
}
