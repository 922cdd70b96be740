<?php

// The worker's rules, over a transport in memory.

declare(strict_types=1);

use Durable\Worker\Answer;
use Durable\Worker\Delivery;
use Durable\Worker\Json;
use Durable\Worker\Messages;
use Durable\Worker\NonRetryable;
use Durable\Worker\RetryAfter;
use Durable\Worker\Step;
use Durable\Worker\StepCancelled;
use Durable\Worker\Transport;
use Durable\Worker\Worker;

/** Gives the messages it has, notes what becomes of them, then ends. */
final class Memory implements Transport
{
    /** @var list<array{string, mixed}> */
    public array $notes = [];
    public bool $wanted = true;
    /** @var list<Throwable> thrown by the next calls of `answer` */
    public array $trouble = [];
    public ?Worker $worker = null;
    /** @var list<string> */
    public array $tokens = [];

    /** @param list<string> $messages */
    public function __construct(private array $messages, private readonly int $most = 100_000)
    {
    }

    public function maxMessage(): int
    {
        return $this->most;
    }

    public function keepEvery(): float
    {
        return 1;
    }

    public function open(array $tokens, Closure $log): void
    {
        $this->tokens = $tokens;
    }

    public function take(Closure $stopping): ?Delivery
    {
        $message = array_shift($this->messages);
        if ($message === null) {
            $this->worker?->stop();

            return null;
        }

        return new class($this, $message) implements Delivery {
            public function __construct(private readonly Memory $memory, private readonly string $message)
            {
            }

            public function read(): mixed
            {
                return Json::decode($this->message);
            }

            public function keep(): bool
            {
                $this->memory->notes[] = ['kept', null];

                return $this->memory->wanted;
            }

            public function answer(Answer $answer): void
            {
                if ($this->memory->trouble !== []) {
                    throw array_shift($this->memory->trouble);
                }
                $value = Json::decode($answer->json());
                $this->memory->notes[] = [$answer->isDecision ? 'decision' : 'result', $value];
                Messages::read($answer->isDecision ? 'workflow-decision' : 'step-result', $value);
            }

            public function giveBack(): void
            {
                $this->memory->notes[] = ['given back', null];
            }

            public function drop(): void
            {
                $this->memory->notes[] = ['dropped', null];
            }

            public function refuse(string $why): void
            {
                $this->memory->notes[] = ['refused', $why];
            }
        };
    }
}

/** @param array<string, mixed> $more */
function task(string $name = 'a', string $input = 'null', array $more = []): string
{
    $fields = ['runId' => 'r', 'seq' => 0, 'stepId' => 'r:0', 'name' => $name, 'group' => $name, 'attempt' => 2];

    return substr(json_encode($more + $fields), 0, -1) . ",\"input\":$input}";
}

/**
 * What becomes of the messages.
 *
 * @param list<string> $messages
 *
 * @return list<array{string, mixed}>
 */
function served(array $messages, callable $handler, ?Memory $memory = null, int $max = 0): array
{
    $memory ??= new Memory($messages);
    $memory->worker = new Worker($memory, ['a' => $handler], max: $max, log: static function (): void {});
    $memory->worker->run();

    return $memory->notes;
}

test('a result echoes what it answers', static function (): void {
    [[$what, $result]] = served([task('a', '{"n":1}', ['token' => 'secret'])], static fn (stdClass $input): array => ['n' => $input->n]);
    same('result', $what);
    same(['r', 0, 'r:0', 2, 'secret', 'completed'], [
        $result->runId, $result->seq, $result->stepId, $result->attempt, $result->token, $result->status,
    ]);
    same(1, $result->output->n);
    same(true, abs($result->startedAt - microtime(true) * 1000) < 10_000);
});

test('values keep their shape through a handler', static function (): void {
    $text = '{"empty":{},"list":[],"one":1.0,"big":12345678901234567890123,"text":"ünï ☃","none":null,"nested":[{}]}';
    [[, $result]] = served([task('a', $text)], static fn (mixed $input): mixed => $input);
    same($text, Json::encode($result->output));
});

test('nothing returned is null', static function (): void {
    [[, $result]] = served([task()], static function (): void {});
    same(true, property_exists($result, 'output') && $result->output === null);
});

test('what a step is told', static function (): void {
    $more = ['traceparent' => '00-x', 'context' => ['k' => 'v']];
    [[, $result]] = served([task('a', '1', $more)], static fn (int $input, Step $step): array => [
        $step->idempotencyKey, $step->stepId, $step->runId, $step->name, $step->attempt, $step->traceparent, $step->context,
    ]);
    same(['r:0', 'r:0', 'r', 'a', 2, '00-x', (object) ['k' => 'v']], $result->output);
});

test('a failure says what failed', static function (): void {
    [[, $result]] = served([task()], static fn () => throw new DomainException("bad \xff luck"));
    same(['failed', "bad \u{FFFD} luck", 'error', 'DomainException', true], [
        $result->status, $result->error->message, $result->error->code, $result->error->type, $result->error->retryable,
    ]);
    same(true, str_contains($result->error->stack, 'worker.test.php'));
    same(false, property_exists($result, 'output'));
});

test('a handler that does not take what it is given fails', static function (): void {
    [[, $result]] = served([task('a', '{}')], static fn (array $input): int => 1);
    same('TypeError', $result->error->type);
});

test('a failure may be final', static function (): void {
    [[, $result]] = served([task()], static fn () => throw new NonRetryable('no', 'card_declined', ['limit' => 5]));
    same([false, 'card_declined', 5], [$result->error->retryable, $result->error->code, $result->error->details->limit]);
});

test('a failure may say when to come back', static function (): void {
    [[, $result]] = served([task()], static fn () => throw new RetryAfter('busy', 2.5));
    same([true, 2.5, 'retry_after'], [$result->error->retryable, $result->error->retryAfter, $result->error->code]);
});

test('a name without a handler is answered', static function (): void {
    [[, $result]] = served([task('b')], static fn () => 1);
    same(['no handler for b', 'unknown_step', false, 2], [
        $result->error->message, $result->error->code, $result->error->retryable, $result->attempt,
    ]);
});

test('a turn is answered, since it would come again for ever', static function (): void {
    $turn = ['taskId' => 'r:wf:0', 'runId' => 'r', 'workflow' => 'w', 'workflowVersion' => '1', 'input' => null, 'history' => [],
        'group' => 'w', 'attempt' => 1];
    [[$what, $decision]] = served([json_encode($turn)], static fn () => 1);
    same(['decision', 'failed', 'r:wf:0', 'no handler for w', []], [
        $what, $decision->status, $decision->taskId, $decision->error->message, $decision->commands,
    ]);
});

test('what cannot be read is put away, and the next is served', static function (): void {
    $notes = served(['nope', '{}', '[]', task('a', '1', ['stepId' => 'x']), str_replace('"seq":0', '"seq":3', task()), task()],
        static fn () => 1);
    same(['refused', 'refused', 'refused', 'refused', 'refused', 'result'], array_column($notes, 0));
});

test('what no wire carries is a final failure', static function (): void {
    $loop = new ArrayObject();
    $loop['self'] = $loop;
    $deep = 1;
    for ($n = 0; $n < 101; ++$n) {
        $deep = [$deep];
    }
    foreach ([
        'payload_text' => ["a\xff", "a\0b", ['k' => ["\\\0"]]],
        'payload_type' => [NAN, fopen('php://memory', 'r'), $loop, $deep],
        'payload_too_large' => [str_repeat('x', 100_001)],
    ] as $code => $values) {
        foreach ($values as $value) {
            [[, $result]] = served([task()], static fn (): mixed => $value);
            same(['failed', $code, false], [$result->status, $result->error->code, $result->error->retryable]);
        }
    }
    same('a\\u0000b', served([task()], static fn (): string => 'a\\u0000b')[0][1]->output);
});

test('lines go with the answer, and fewer where there is no room', static function (): void {
    [[, $result]] = served([task()], static function (mixed $input, Step $step): void {
        $step->log('begun', ['part' => 1]);
        $step->log("slow \xff", NAN, 'warn');
        throws(ValueError::class, static fn () => $step->log('x', null, 'fatal'));
    });
    same(['begun', 'info', 0, 1], [
        $result->events[0]->message, $result->events[0]->level, $result->events[0]->index, $result->events[0]->data->part,
    ]);
    same(["slow \u{FFFD}", 'warn', 1, 'float'], [
        $result->events[1]->message, $result->events[1]->level, $result->events[1]->index, $result->events[1]->data,
    ]);
    [[, $result]] = served([task()], static function (mixed $input, Step $step): int {
        for ($n = 0; $n < 2_000; ++$n) {
            $step->log(str_repeat('x', 1_000));
        }

        return 1;
    });
    same([1, false], [$result->output, isset($result->events)]);
});

test('an answer is tried again, while the task is kept', static function (): void {
    $memory = new Memory([task()]);
    $memory->trouble = [new RuntimeException('away'), new RuntimeException('away')];
    same(['kept', 'kept', 'result'], array_column(served([], static fn () => 1, $memory), 0));
});

test('what is cancelled is not answered', static function (): void {
    $memory = new Memory([task()]);
    $memory->wanted = false;
    $body = static function (mixed $input, Step $step): never {
        $step->sleep(60);
        throw new LogicException('not reached');
    };
    same(['kept', 'dropped'], array_column(served([], $body, $memory), 0));
});

test('an alarm keeps the task of a handler that does not ask', static function (): void {
    $memory = new Memory([task()]);
    $body = static function () use ($memory): int {
        while ($memory->notes === []) {
            usleep(10_000);
        }

        return 1;
    };
    same(['kept', 'result'], array_column(served([], $body, $memory), 0));
});

test('an exception for cancels passes those who catch exceptions', static function (): void {
    same(false, is_a(StepCancelled::class, Exception::class, true));
});

test('a worker ends after as many tasks as it may', static function (): void {
    $memory = new Memory([task(), task(), task()]);
    same(2, count(served([], static fn () => 1, $memory, max: 2)));
});

test('a signal lets the task under way finish', static function (): void {
    $memory = new Memory([task(), task()]);
    $notes = served([], static function (): int {
        posix_kill(getmypid(), SIGTERM);

        return 1;
    }, $memory);
    same(['result'], array_column($notes, 0));
});

test('tasks wait under the tokens of their names', static function (): void {
    $memory = new Memory([]);
    $memory->worker = new Worker($memory, ['a:b' => fn () => 1, 'a-b' => fn () => 1, 'c' => fn () => 1], 'eu', log: fn () => null);
    $memory->worker->run();
    same(['a-b@eu', 'c@eu'], $memory->tokens);
});
