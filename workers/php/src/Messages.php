<?php

declare(strict_types=1);

namespace Durable\Worker;

/**
 * Every message of the protocol, by the name of its schema: decoded JSON in, a `stdClass` of its fields out.
 *
 * @phpstan-import-type Reader from Read
 */
final class Messages
{
    public const ALL = [
        'remote-task', 'step-result', 'heartbeat', 'control-message', 'workflow-task', 'workflow-decision',
        'workflow-step-event', 'start-run', 'worker-heartbeat', 'worker-descriptor',
    ];

    /** @var array<string, Reader> */
    private static array $readers = [];

    /** @throws Unreadable */
    public static function read(string $message, mixed $value): \stdClass
    {
        $reader = self::$readers[$message] ??= self::reader($message);

        return $reader($value, $message);
    }

    /**
     * A step's task or a turn of a workflow; `workflow` a text and `history` a list tell the turn.
     *
     * @return array{bool, \stdClass} is it a turn, and the message
     *
     * @throws Unreadable
     */
    public static function readTask(mixed $value): array
    {
        if ($value instanceof \stdClass && is_string($value->workflow ?? null) && is_array($value->history ?? null)) {
            return [true, self::read('workflow-task', $value)];
        }
        $task = self::read('remote-task', $value);
        if ($task->stepId !== "{$task->runId}:{$task->seq}") {
            throw new Unreadable('stepId is not <runId>:<seq>');
        }

        return [false, $task];
    }

    /** @return Reader */
    private static function reader(string $message): \Closure
    {
        $text = Read::text();
        $any = Read::anything();
        $seq = Read::whole(0);
        $attempt = Read::whole(1);
        $ms = Read::whole();
        $error = Read::object(
            ['message' => $text],
            ['code' => $text, 'type' => $text, 'retryable' => Read::flag(), 'retryAfter' => Read::number(),
                'details' => $any, 'stack' => $text],
        );
        $events = Read::list(Read::object(
            ['at' => $ms, 'level' => Read::word('debug', 'info', 'warn', 'error'), 'message' => $text],
            ['data' => $any, 'subId' => $text, 'name' => $text, 'group' => $text, 'phase' => $text, 'process' => $text,
                'status' => Read::word('ok', 'failed', 'skipped'), 'index' => $seq],
        ));

        return match ($message) {
            'remote-task' => Read::object(
                ['runId' => $text, 'seq' => $seq, 'stepId' => $text, 'name' => $text, 'group' => $text, 'input' => $any,
                    'attempt' => $attempt],
                ['traceparent' => $text, 'transport' => $text, 'priority' => $ms, 'context' => Read::map($any),
                    'token' => $text],
            ),
            'step-result' => Read::object(
                ['runId' => $text, 'seq' => $seq, 'stepId' => $text, 'status' => Read::word('completed', 'failed')],
                ['output' => $any, 'error' => $error, 'startedAt' => $ms, 'events' => $events, 'attempt' => $attempt,
                    'token' => $text],
                ['output'],
            ),
            'heartbeat' => Read::object(['runId' => $text, 'seq' => $seq, 'group' => $text], ['stepId' => $text]),
            'control-message' => Read::object(
                ['from' => $text, 'kind' => Read::word('event', 'cancel', 'enqueued')],
                ['runId' => $text, 'event' => Read::map($any)],
            ),
            'workflow-task' => Read::object(
                ['taskId' => $text, 'runId' => $text, 'workflow' => $text, 'workflowVersion' => $text, 'input' => $any,
                    'history' => Read::list(Read::object(
                        ['seq' => $seq, 'kind' => Read::word('step', 'call', 'timer', 'signal', 'child')],
                        ['name' => $text, 'output' => $any, 'error' => $error, 'order' => $seq, 'at' => $ms],
                        ['output'],
                    )), 'group' => $text, 'attempt' => $attempt],
                ['pendingSignals' => Read::list(Read::object(['seq' => $seq, 'signal' => $text, 'payload' => $any])),
                    'transport' => $text, 'traceparent' => $text, 'priority' => $ms, 'at' => $ms],
            ),
            'workflow-decision' => Read::object(
                ['taskId' => $text, 'runId' => $text, 'status' => Read::word('continue', 'completed', 'failed', 'cancelled')],
                ['commands' => Read::list(self::command($error, $events)), 'output' => $any, 'error' => $error],
                ['output'],
                ['commands' => []],
            ),
            'workflow-step-event' => Read::object(
                ['runId' => $text, 'seq' => $seq, 'name' => $text, 'startedAt' => $ms,
                    'phase' => Read::word('running', 'completed', 'failed')],
                ['finishedAt' => $ms, 'output' => $any, 'error' => $error, 'events' => $events],
                ['output'],
            ),
            'start-run' => Read::object(
                ['tenant' => $text, 'workflow' => $text],
                ['input' => $any, 'runId' => $text, 'tags' => Read::list($text),
                    'searchAttributes' => Read::map(static fn (mixed $value, string $at): mixed => is_scalar($value)
                        ? $value : Read::refuse($at, 'a text, a number, true or false'))],
                ['input'],
                ['input' => null],
            ),
            'worker-heartbeat' => self::beat(),
            'worker-descriptor' => Read::object(
                ['instanceId' => $text, 'runtime' => $text, 'sdk' => Read::object(['name' => $text, 'version' => $text]),
                    'protocol' => Read::object(['version' => $attempt, 'range' => self::range()]),
                    'capabilities' => Read::list($text), 'workflows' => Read::list($text), 'steps' => Read::list($text),
                    'startedAt' => $ms],
                ['partition' => $text, 'namespace' => $text, 'registrations' => Read::list(Read::object(
                    ['name' => $text],
                    ['version' => $text, 'group' => $text, 'requires' => Read::list($text), 'origin' => $text],
                ))],
            ),
            default => throw new \ValueError("There is no message $message."),
        };
    }

    /**
     * @param Reader $error
     * @param Reader $events
     *
     * @return Reader
     */
    private static function command(\Closure $error, \Closure $events): \Closure
    {
        $text = Read::text();
        $any = Read::anything();
        $head = ['kind' => $text, 'seq' => Read::whole(0)];
        $parallel = ['parallelGroup' => $text];
        $kinds = [
            'call' => Read::object(
                $head + ['name' => $text],
                $parallel + ['group' => $text, 'input' => $any],
                ['input'],
                ['group' => '', 'input' => null],
            ),
            'recordStep' => Read::object(
                $head + ['name' => $text],
                $parallel + ['output' => $any, 'error' => $error, 'startedAt' => Read::whole(), 'finishedAt' => Read::whole(),
                    'events' => $events],
                ['output'],
            ),
            'sleep' => Read::object($head + ['ms' => Read::whole()], $parallel),
            'waitSignal' => Read::object($head + ['signal' => $text], $parallel),
            'startChild' => Read::object(
                $head + ['workflow' => $text],
                $parallel + ['input' => $any],
                ['input'],
                ['input' => null],
            ),
        ];

        return static function (mixed $value, string $at) use ($kinds): \stdClass {
            $kind = $value instanceof \stdClass && is_string($value->kind ?? null) ? $value->kind : '';

            return ($kinds[$kind] ?? Read::refuse($at, 'a command of a known kind'))($value, $at);
        };
    }

    /** @return Reader a bare number too, and seconds */
    private static function beat(): \Closure
    {
        $whole = Read::object(
            ['ts' => Read::number()],
            ['status' => Read::anything(), 'descriptorHash' => Read::text()],
        );

        return static function (mixed $value, string $at) use ($whole): \stdClass {
            $beat = is_int($value) || is_float($value) ? (object) ['ts' => $value] : $whole($value, $at);
            $beat->ts = $beat->ts < 1e12 ? $beat->ts * 1000 : $beat->ts;

            return $beat;
        };
    }

    /** @return Reader */
    private static function range(): \Closure
    {
        $list = Read::list(Read::whole(1));

        return static function (mixed $value, string $at) use ($list): array {
            $range = $list($value, $at);

            return count($range) === 2 ? $range : Read::refuse($at, 'two versions');
        };
    }
}
