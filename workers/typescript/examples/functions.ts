/**
 * Functions in TypeScript, behind Node's own server:
 *
 *     durable dev                                       # the service, in another terminal
 *     node dist/examples/functions.js serve             # provisions the app, syncs its functions, and serves them
 *     node dist/examples/functions.js send o-17         # an order, and a moment later its parcel
 */

import { createServer } from "node:http";
import { Client, createApp, define, NonRetryable } from "../src/functions/index.js";

const { DURABLE_URL: url = "http://localhost:3030", DURABLE_ADMIN_TOKEN: adminToken, PORT = "8000" } = process.env;

const fulfil = define<{ id: string; total: number }>({
  id: "fulfil-order",
  event: "order/created",
  retries: 3,
  concurrency: { limit: 5, key: "customer" },
  async handler(step, { data: order }) {
    const charge = await step.run("charge", () => {
      if (order.total > 1000) throw new NonRetryable("card declined", { code: "card_declined" });
      return { receipt: `r-${order.id}`, total: order.total, key: step.key("charge") };
    });
    await step.sleep("cool-off", 0.2);
    const packed = await step.waitForEvent("packed", "order/packed", { match: { id: order.id }, timeout: "1 hour" });
    if (!packed) throw new Error("nobody has packed it");
    await step.sendEvent("tell", { name: "order/fulfilled", data: { id: order.id } });
    return { receipt: charge.receipt, box: packed.data.box };
  },
  async onFailure(step, _event, failed) {
    await step.run("apologise", () => `sorry: ${failed.message}`);
  },
});

// The same name and environment always answer with the same id and key. In production, keep the key as any other secret.
const appUrl = `http://localhost:${PORT}`;
const { appId, signingKey } = await Client.provision({ url, name: "shop", appUrl, ...(adminToken && { adminToken }) });
const app = createApp({ name: "shop", functions: [fulfil], keys: [signingKey] });
const client = new Client({ url, appId, signingKey });

const [what, id = `o-${Date.now()}`] = process.argv.slice(2);
if (what === "serve") {
  createServer(app.node).listen(Number(PORT), () => console.log(`functions at ${appUrl}`));
  await client.sync(app);
} else if (what === "send") {
  console.log(await client.send("order/created", { id, total: 42, customer: "c-1" }));
  await client.send("order/packed", { id, box: 7 });
} else {
  console.error("functions.js serve | send [ORDER]");
  process.exitCode = 2;
}
