/** The control plane over Redis pub/sub: cancels in, progress out. Hints: losing them costs time and nothing else. */

import { randomUUID } from "node:crypto";
import { Redis } from "ioredis";
import { readControlMessage, parse, type ControlMessage } from "./messages.js";
import * as names from "./names.js";

export interface Control {
  /** Connect and listen. */
  start(heard: (message: ControlMessage) => void): Promise<void>;
  /** Tell everybody. Dropped where nobody can be told. */
  publish(message: ControlMessage): void;
  close(): Promise<void>;
}

/** On the channel `<prefix>-control` of a Redis. For workers whose transport has no control plane of its own. */
export function redisControl(options: { url?: string; prefix?: string; namespace?: string } = {}): Control {
  const channel = names.control(names.effectivePrefix(options.prefix, options.namespace));
  const url = options.url ?? "redis://127.0.0.1:6379";
  let listening: Redis | undefined;
  let speaking: Redis | undefined;
  return {
    async start(heard) {
      listening = new Redis(url, { maxRetriesPerRequest: null });
      speaking = new Redis(url, { maxRetriesPerRequest: 1, enableOfflineQueue: false, lazyConnect: true });
      for (const client of [listening, speaking]) client.on("error", () => {}); // it connects again by itself
      listening.on("message", (_channel: string, data: string) => {
        try {
          heard(readControlMessage(parse(data), "the control message"));
        } catch {
          // not a message of this protocol
        }
      });
      await Promise.all([listening.subscribe(channel), speaking.connect().catch(() => {})]);
      await speaking.publish(`${channel}-probe`, randomUUID()).catch(() => {}); // engines speak where somebody listens
    },
    publish(message) {
      speaking?.publish(channel, JSON.stringify(message)).catch(() => {});
    },
    async close() {
      listening?.disconnect();
      await speaking?.quit().catch(() => speaking?.disconnect());
    },
  };
}
