export { createApp, type Answered, type App, type AppOptions, type Asked } from "./app.js";
export { Client, ServiceError, type ClientOptions, type Run, type Sent } from "./client.js";
export { define, type FunctionDefinition, type Pace, type Rule } from "./definition.js";
export { NonRetryable } from "../errors.js";
export type { Step } from "./step.js";
export type { Duration } from "./time.js";
export type { Event, Failed, NewEvent } from "./wire.js";
