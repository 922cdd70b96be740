/** One step over BullMQ; examples/one_workflow_three_ways.py starts it. */

import { Worker } from "../src/index.js";
import { bullmq } from "../src/transports/bullmq.js";

const { REDIS_URL: url = "redis://localhost:6379", PREFIX: prefix = "durable-example" } = process.env;

const worker = new Worker({
  transport: bullmq({ url, prefix }),
  steps: {
    "images.thumbnail": (name: string, step) => {
      step.log("scaled", { width: 160 });
      return `${name}, 160 px wide, by Node`;
    },
  },
});
await worker.run();
