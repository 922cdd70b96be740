<?php

declare(strict_types=1);

namespace Durable\Worker;

use AsyncAws\Core\Exception\Http\HttpException;
use AsyncAws\Sqs\Input\SendMessageRequest;
use AsyncAws\Sqs\SqsClient;
use AsyncAws\Sqs\ValueObject\Message;
use AsyncAws\Sqs\ValueObject\MessageAttributeValue;

/**
 * SQS by async-aws/sqs. Queues must be there: an engine makes them.
 *
 * One queue is polled long. Several are looked into one after the other, since one process does one task at a time and must not
 * sit on what it cannot begin: where that costs too many calls, start a process for each step.
 *
 * The client is the transport's own, and so is its HTTP client: a handler could be in the middle of a call when its task is kept.
 */
final class SqsTransport implements Transport
{
    /** SQS ends invisibility 12 h after a message was received. */
    private const HELD_MAX = 11.5 * 3600;
    private const ABSENT = ['QueueDoesNotExist', 'AWS.SimpleQueueService.NonExistentQueue', 'InvalidAddress', 'InvalidParameterValue'];
    private const LOST = ['ReceiptHandleIsInvalid', 'MessageNotInflight', 'AWS.SimpleQueueService.MessageNotInflight',
        'InvalidParameterValue'];
    private const REASON_MAX = 500;
    /** Seconds until an absent queue is looked for again: an engine may make it with its first task. */
    private const ABSENT_FOR = 1.0;

    private readonly string $prefix;
    /** @var array<string, string> URLs by name */
    private array $found = [];
    /** @var array<string, float> when to look again for those that are absent, by name */
    private array $absent = [];
    /** @var list<string> */
    private array $tokens = [];
    private int $next = 0;
    /** @var \Closure(string, string): void */
    private \Closure $log;

    /**
     * @param bool $fifo queues are FIFO ones
     * @param array<string, string> $queueUrls by routing token, where a queue is not to be found by name
     * @param string|null $resultsUrl of the queue of results, the same
     * @param string|null $marker the message attribute that tells ours in a queue shared with others
     * @param int $visibility seconds a message stays ours without a sign of life
     * @param int $wait seconds of a long poll
     */
    public function __construct(
        private readonly SqsClient $client,
        string $prefix = 'durable',
        ?string $namespace = null,
        private readonly bool $fifo = false,
        private readonly array $queueUrls = [],
        private readonly ?string $resultsUrl = null,
        private readonly ?string $marker = null,
        private readonly int $visibility = 30,
        private readonly int $wait = 20,
    ) {
        if ($visibility < 2) {
            throw new \ValueError('Visibility has 2 seconds at least: alarms come in whole seconds.');
        }
        $this->prefix = Names::prefix($prefix, $namespace);
        $this->log = static function (string $level, string $message): void {};
    }

    public function maxMessage(): int
    {
        return (1 << 20) - 4_096; // beside a body there are attributes
    }

    public function keepEvery(): float
    {
        return $this->visibility / 3;
    }

    public function open(array $tokens, \Closure $log): void
    {
        $this->tokens = $tokens;
        $this->log = $log;
    }

    public function take(\Closure $stopping): ?Delivery
    {
        $count = count($this->tokens);
        if ($count > 1) {
            for ($n = 0; $n < $count && !$stopping(); ++$n) {
                $delivery = $this->receive($this->turn(), 0, $stopping);
                if ($delivery !== null) {
                    return $delivery;
                }
            }
        }

        return $stopping() ? null : $this->receive($this->turn(), $count > 1 ? min(1, $this->wait) : $this->wait, $stopping);
    }

    /** Each in its turn. */
    private function turn(): string
    {
        $this->next = ($this->next + 1) % count($this->tokens);

        return $this->tokens[$this->next];
    }

    /** @param \Closure(): bool $stopping */
    private function receive(string $token, int $wait, \Closure $stopping): ?SqsDelivery
    {
        $name = Names::tasks($this->prefix, $token);
        if (($this->absent[$name] ?? 0) > microtime(true)) {
            usleep($wait > 0 ? 200_000 : 0);

            return null;
        }
        try {
            $url = $this->queueUrls[$token] ?? $this->url($name);
        } catch (QueueAbsent $error) {
            if (!isset($this->absent[$name])) {
                ($this->log)('warn', $error->getMessage());
            }
            $this->absent[$name] = microtime(true) + self::ABSENT_FOR;

            return null;
        }
        $received = $this->client->receiveMessage([
            'QueueUrl' => $url,
            'MaxNumberOfMessages' => 1,
            'WaitTimeSeconds' => $wait,
            'VisibilityTimeout' => $this->visibility,
            'MessageAttributeNames' => $this->marker === null ? [] : [$this->marker],
        ]);
        try {
            while (!$received->resolve(0.5)) {
                if ($stopping()) {
                    $received->cancel(); // what it may just have been given comes again when its visibility ends

                    return null;
                }
            }
            $message = $received->getMessages()[0] ?? null;
        } catch (\Throwable $error) {
            unset($this->found[$name]);
            throw $error;
        }
        if (!$message instanceof Message) {
            return null;
        }
        $delivery = new SqsDelivery($this, $url, (string) $message->getReceiptHandle(), (string) $message->getBody());
        if ($this->marker !== null) {
            $mark = $message->getMessageAttributes()[$this->marker] ?? null;
            if (!$mark instanceof MessageAttributeValue || $mark->getStringValue() !== '1') {
                $delivery->giveBack(); // somebody else's
                usleep(500_000);

                return null;
            }
        }

        return $delivery;
    }

    // -- for deliveries

    /** @throws \Throwable where it may still be ours */
    public function keep(string $url, string $receipt, float $received, float $kept): bool
    {
        if (microtime(true) - $received > self::HELD_MAX) {
            ($this->log)('warn', 'a task was held for as long as SQS allows, and is handed on');
            $this->change($url, $receipt, 0);

            return false;
        }
        try {
            $this->change($url, $receipt, $this->visibility);

            return true;
        } catch (\Throwable $error) {
            if (!self::says($error, self::LOST) && microtime(true) - $kept < $this->visibility) {
                throw $error;
            }
            ($this->log)('warn', "a task is no longer ours: {$error->getMessage()}");

            return false;
        }
    }

    public function change(string $url, string $receipt, int $visibility): void
    {
        $this->client->changeMessageVisibility([
            'QueueUrl' => $url,
            'ReceiptHandle' => $receipt,
            'VisibilityTimeout' => $visibility,
        ])->resolve();
    }

    public function delete(string $url, string $receipt): void
    {
        $this->client->deleteMessage(['QueueUrl' => $url, 'ReceiptHandle' => $receipt])->resolve();
    }

    public function answer(Answer $answer, string $url, string $receipt): void
    {
        $to = $this->resultsUrl;
        if ($to === null && $answer->isDecision) {
            try {
                $to = $this->url(Names::decisions($this->prefix));
            } catch (QueueAbsent) {
                // engines tell decisions by their shape
            }
        }
        $this->send($to ?? $this->url(Names::results($this->prefix)), $answer->json(), (string) $answer->fields['runId']);
        try {
            $this->delete($url, $receipt);
        } catch (\Throwable $error) {
            ($this->log)('warn', "an answered task could not be deleted, and comes again: {$error->getMessage()}");
        }
    }

    /** To the dead-letter queue, with the reason; where there is none the queue's redrive policy does what it does. */
    public function refuse(string $body, string $why, string $url, string $receipt): void
    {
        try {
            $dead = $this->url(Names::dead($this->prefix));
        } catch (QueueAbsent) {
            return;
        }
        $this->send($dead, $body, hash('sha256', $body), ['durable-reason' => Json::words($why, self::REASON_MAX)]);
        $this->delete($url, $receipt);
    }

    // -- calls

    /** @param array<string, string> $attributes */
    private function send(string $url, string $body, string $group, array $attributes = []): void
    {
        $body = str_replace(["\u{FFFE}", "\u{FFFF}"], ['\ufffe', '\uffff'], $body); // SQS refuses them
        if ($this->marker !== null) {
            $attributes[$this->marker] = '1';
        }
        $request = new SendMessageRequest(['QueueUrl' => $url, 'MessageBody' => $body]);
        if ($attributes !== []) {
            $request->setMessageAttributes(array_map(
                static fn (string $value): MessageAttributeValue => new MessageAttributeValue(
                    ['DataType' => 'String', 'StringValue' => $value],
                ),
                $attributes,
            ));
        }
        if (str_ends_with($url, '.fifo')) {
            $request->setMessageGroupId(preg_match('/^[!-~]{1,128}$/D', $group) === 1 ? $group : hash('sha256', $group));
            $request->setMessageDeduplicationId(hash('sha256', $body));
        }
        $this->client->sendMessage($request)->resolve();
    }

    private function url(string $name): string
    {
        if (isset($this->found[$name])) {
            return $this->found[$name];
        }
        $spelled = array_map(fn (string $each): string => $each . ($this->fifo ? '.fifo' : ''), Names::sqsNames($name));
        foreach ($spelled as $each) {
            try {
                $url = $this->client->getQueueUrl(['QueueName' => $each])->getQueueUrl();
                if ($url !== null) {
                    return $this->found[$name] = $url;
                }
            } catch (\Throwable $error) {
                if (!self::says($error, self::ABSENT)) {
                    throw $error;
                }
            }
        }
        $names = implode(' or ', $spelled);
        throw new QueueAbsent("SQS has no queue $names: create it, give its URL, or check region and endpoint");
    }

    /** @param list<string> $codes */
    private static function says(\Throwable $error, array $codes): bool
    {
        return $error instanceof HttpException && in_array($error->getAwsCode(), $codes, true);
    }
}
