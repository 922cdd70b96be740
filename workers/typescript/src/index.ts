export { Worker, type Handler, type WorkerOptions } from "./worker.js";
export { Step, type Level } from "./step.js";
export { NonRetryable, RetryAfter } from "./errors.js";
export { redisControl, type Control } from "./control.js";
export type { Answer, Delivery, Host, Log, Transport } from "./transports/transport.js";
