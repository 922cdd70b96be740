<?php

// Steps that show what a worker must do, for the conformance tests: `bin/durable-worker tests/serve.php …`. DIARY names a file.

declare(strict_types=1);

use Durable\Worker\NonRetryable;
use Durable\Worker\RetryAfter;
use Durable\Worker\Step;

/** What happened here, for the test to read. */
$note = static function (string $what, Step $step): void {
    file_put_contents((string) getenv('DIARY'), "$what {$step->stepId} {$step->attempt}\n", FILE_APPEND);
};

return [
    'php.echo' => static fn (mixed $input): mixed => $input,
    'php.who' => static fn (mixed $input, Step $step): array => [
        'stepId' => $step->stepId, 'idempotencyKey' => $step->idempotencyKey, 'runId' => $step->runId, 'attempt' => $step->attempt,
        'name' => $step->name, 'traceparent' => $step->traceparent,
    ],
    'php.flaky' => static fn (mixed $input, Step $step): int => $step->attempt < 2 ? throw new RuntimeException('not yet') : $step->attempt,
    'php.later' => static fn (mixed $input, Step $step): int => $step->attempt < 2 ? throw new RetryAfter('come back', 0.05) : $step->attempt,
    'php.decline' => static fn () => throw new NonRetryable('card declined', 'card_declined', ['limit' => 5]),
    'php:large' => static fn (stdClass $input): string => strrev(strrev($input->text)),
    'php.too_large' => static fn (): string => str_repeat('x', 2 << 20),
    'php.bytes' => static fn (): string => "\xff\xfe",
    'php.talk' => static function (mixed $input, Step $step): void {
        $step->log('begun', ['part' => 1]);
        $step->log('slow', level: 'warn');
    },
    'php.until_cancelled' => static function (mixed $input, Step $step) use ($note): void {
        $note('started', $step);
        while (!$step->cancelled()) {
            usleep(10_000);
        }
        $note('cancelled', $step);
    },
    // Stuck the first time it is begun, wherever that is.
    'php.stuck_once' => static function (stdClass $input, Step $step) use ($note): int {
        $note('started', $step);
        while (!is_file($input->again)) {
            usleep(10_000);
            clearstatcache();
        }

        return $step->attempt;
    },
    'php.note' => static fn (mixed $input, Step $step) => $note('did', $step),
    // Longer than the lease, without a word to the worker.
    'php.long' => static function (float $seconds, Step $step) use ($note): int {
        $note('started', $step);
        for ($until = microtime(true) + $seconds; microtime(true) < $until;) {
            usleep(10_000);
        }

        return $step->attempt;
    },
];
