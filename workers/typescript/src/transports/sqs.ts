/** SQS: long polls, visibility for as long as a handler runs, and no deletion before the answer was sent. */

import {
  ChangeMessageVisibilityCommand,
  DeleteMessageCommand,
  GetQueueUrlCommand,
  ReceiveMessageCommand,
  SendMessageCommand,
  SQSClient,
  type Message,
} from "@aws-sdk/client-sqs";
import { createHash } from "node:crypto";
import { setMaxListeners } from "node:events";
import { parse } from "../messages.js";
import * as names from "../names.js";
import { pause, sleep, type Answer, type Delivery, type Host, type Transport } from "./transport.js";

const HELD_MAX_MS = 11.5 * 3_600_000;
const ABSENT = ["QueueDoesNotExist", "AWS.SimpleQueueService.NonExistentQueue", "InvalidAddress", "InvalidParameterValue"];
const LOST = ["ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue"];
const STRANGERS_MS = 500;

export interface SqsOptions {
  region?: string;
  /** Another endpoint than Amazon's; SQS_ENDPOINT_URL where there is none. Credentials: what the environment says, as ever. */
  endpoint?: string;
  prefix?: string;
  namespace?: string;
  /** Queues are FIFO ones. */
  fifo?: boolean;
  /** Queues by routing token, and that of results, where they are not to be found by name. */
  queueUrls?: Record<string, string>;
  resultsUrl?: string;
  /** The message attribute that tells ours in a queue shared with others. */
  marker?: string;
  /** Seconds a message stays ours without a sign of life. */
  visibility?: number;
  /** Seconds of a long poll. */
  wait?: number;
  client?: SQSClient;
}

export function sqs(options: SqsOptions = {}): Transport {
  const prefix = names.effectivePrefix(options.prefix, options.namespace);
  const visibility = options.visibility ?? 30;
  const endpoint = options.endpoint ?? process.env.SQS_ENDPOINT_URL;
  const region = options.region ?? process.env.AWS_REGION ?? process.env.AWS_DEFAULT_REGION;
  const client = options.client ?? new SQSClient({ ...(region && { region }), ...(endpoint && { endpoint }) });
  const stopping = new AbortController();
  setMaxListeners(0, stopping.signal); // each queue's poll is one
  const urls = new Map<string, string>();
  let loops: Promise<void>[] = [];

  async function find(name: string): Promise<string> {
    const known = urls.get(name);
    if (known) return known;
    const spelled = names.sqsNames(name).map((each) => (options.fifo ? `${each}.fifo` : each));
    for (const each of spelled) {
      try {
        const { QueueUrl } = await client.send(new GetQueueUrlCommand({ QueueName: each }));
        if (QueueUrl) {
          urls.set(name, QueueUrl);
          return QueueUrl;
        }
      } catch (error) {
        if (!says(error, ABSENT)) throw error;
      }
    }
    throw new Error(`SQS has no queue ${spelled.join(" or ")}: create it, give its URL, or check region and endpoint`);
  }

  async function send(answer: Answer): Promise<void> {
    const url = options.resultsUrl ?? (await find(names.results(prefix)));
    const { runId } = "result" in answer ? answer.result : answer.decision;
    const body = JSON.stringify("result" in answer ? answer.result : answer.decision).replace(
      /[\ufffe\uffff]/g,
      (character) => `\\u${character.charCodeAt(0).toString(16)}`,
    );
    await client.send(
      new SendMessageCommand({
        QueueUrl: url,
        MessageBody: body,
        ...(options.marker && { MessageAttributes: { [options.marker]: { DataType: "String", StringValue: "1" } } }),
        ...(options.fifo && {
          MessageGroupId: /^[!-~]{1,128}$/.test(runId) ? runId : sha256(runId),
          MessageDeduplicationId: sha256(body),
        }),
      }),
    );
  }

  function held(host: Host, url: string, message: Message): Delivery & { end(): void } {
    const receipt = message.ReceiptHandle ?? "";
    const lost = new AbortController();
    const change = (seconds: number) =>
      client.send(
        new ChangeMessageVisibilityCommand({ QueueUrl: url, ReceiptHandle: receipt, VisibilityTimeout: seconds }),
      );
    const received = Date.now();
    let kept = received;
    const prolong = async () => {
      if (Date.now() - received > HELD_MAX_MS) {
        host.log("warn", "a task was held for as long as SQS allows, and is handed on");
        end();
        lost.abort();
        await change(0).catch(() => {});
        return;
      }
      const asked = Date.now();
      try {
        await change(visibility);
        kept = asked;
      } catch (error) {
        if (!says(error, LOST) && Date.now() - kept < visibility * 1_000) return; // tried again
        host.log("warn", `a task is no longer ours: ${String(error)}`);
        end();
        lost.abort();
      }
    };
    const timer = setInterval(() => void prolong(), (visibility * 1_000) / 3);
    const end = () => clearInterval(timer);
    const remove = () => client.send(new DeleteMessageCommand({ QueueUrl: url, ReceiptHandle: receipt }));
    return {
      read: () => parse(message.Body ?? ""),
      signal: lost.signal,
      end,
      async answer(answer) {
        await send(answer);
        await remove().catch((error: unknown) => {
          host.log("warn", `an answered task could not be deleted, and comes again: ${String(error)}`);
        });
      },
      async giveBack() {
        end();
        await change(0);
      },
      async refuse() {
        // the redrive policy puts it away
      },
    };
  }

  async function poll(host: Host, token: string): Promise<void> {
    const name = names.tasks(prefix, token);
    for (let failures = 0; !stopping.signal.aborted; ) {
      const room = await host.room();
      if (!room) return;
      let url;
      let messages: Message[];
      try {
        url = options.queueUrls?.[token] ?? (await find(name));
        const received = await client.send(
          new ReceiveMessageCommand({
            QueueUrl: url,
            MaxNumberOfMessages: Math.min(10, room),
            WaitTimeSeconds: options.wait ?? 20,
            VisibilityTimeout: visibility,
            MessageAttributeNames: options.marker ? [options.marker] : [],
          }),
          { abortSignal: stopping.signal },
        );
        messages = received.Messages ?? [];
        failures = 0;
      } catch (error) {
        if (stopping.signal.aborted) return;
        if (!failures) host.log("warn", `queue ${name} cannot be read, which is tried again: ${String(error)}`);
        urls.delete(name);
        await sleep(pause(failures++), stopping.signal);
        continue;
      }
      let ours = 0;
      for (const message of messages) {
        const delivery = held(host, url, message);
        const mine = !options.marker || message.MessageAttributes?.[options.marker]?.StringValue === "1";
        if (!mine || !(await host.room())) {
          await delivery.giveBack().catch(() => {}); // it comes again by itself
          continue;
        }
        ours += 1;
        void host.take(delivery).finally(() => delivery.end());
      }
      if (messages.length && !ours) await sleep(STRANGERS_MS, stopping.signal);
    }
  }

  return {
    maxMessage: (1 << 20) - 4_096,

    async start(host) {
      if (!options.resultsUrl) await find(names.results(prefix)).catch((error: unknown) => host.log("warn", String(error)));
      const served = new Set<string>();
      loops = host.tokens.flatMap((token) => {
        const url = options.queueUrls?.[token];
        if (url && served.has(url)) return [];
        if (url) served.add(url);
        return [poll(host, token)];
      });
    },

    async stop() {
      stopping.abort();
      await Promise.all(loops);
    },

    async close() {
      if (!options.client) client.destroy();
    },
  };
}

const says = (error: unknown, codes: string[]) => codes.includes((error as { name?: string }).name ?? "");

const sha256 = (text: string) => createHash("sha256").update(text).digest("hex");
