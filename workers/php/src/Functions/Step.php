<?php

declare(strict_types=1);

namespace Durable\Functions;

use Durable\Worker\Failure;
use Durable\Worker\NonRetryable;

/**
 * What a function does that must happen once. Each operation has an id, unique in the function; what has been done before is
 * answered from memory, and the first that has not ends this call of the function: it is called again when it is done.
 *
 * So code between operations runs again and again. It must do nothing but lead to the same operations.
 */
final class Step
{
    /** @var array<string, string> type by id, of what this call has asked for */
    private array $asked = [];
    /** The step whose body runs. */
    private ?string $inside = null;

    /** @param array<string, \stdClass> $memory `{type, data}` by id */
    public function __construct(private readonly array $memory, public readonly string $runId)
    {
    }

    /**
     * Does it once and keeps what it returns, which must be JSON. It may run twice if the process dies in it: use `key` with what
     * it calls. What it throws is tried again, unless it is a `NonRetryable`.
     *
     * @template T
     * @param \Closure(): T $body
     * @return T as JSON gives it back
     */
    public function run(string $id, \Closure $body): mixed
    {
        if ($this->remembers($id, 'run')) {
            return $this->memory[$id]->data ?? null;
        }
        $this->inside = $id;
        try {
            $data = $body();
        } catch (\Throwable $error) {
            throw self::ended(['op' => 'error', 'id' => $id] + self::describe($error));
        }
        throw self::ended(['op' => 'step', 'id' => $id, 'data' => $data]);
    }

    /** The same for every attempt of an operation: hand it to what the step calls. */
    public function key(string $id): string
    {
        return "$this->runId/$id";
    }

    /** @param int|float|string|\DateInterval $time seconds, or a text like '3 days' */
    public function sleep(string $id, int|float|string|\DateInterval $time): void
    {
        $this->sleepUntil($id, self::after($time));
    }

    public function sleepUntil(string $id, \DateTimeInterface $moment): void
    {
        if (!$this->remembers($id, 'sleep')) {
            throw self::ended(['op' => 'sleep', 'id' => $id, 'until' => self::iso($moment)]);
        }
    }

    /**
     * The next event of that name whose data has all that `match` has; null when none has come in time.
     *
     * @param array<string, mixed>|null $match
     * @param int|float|string|\DateInterval $timeout seconds, or a text like '3 days'
     */
    public function waitForEvent(
        string $id,
        string $event,
        ?array $match = null,
        int|float|string|\DateInterval $timeout = '7 days',
    ): ?Event {
        if (!$this->remembers($id, 'wait')) {
            throw self::ended([
                'op' => 'wait',
                'id' => $id,
                'event' => $event,
                'match' => $match === null ? null : (object) $match,
                'until' => self::iso(self::after($timeout)),
            ]);
        }
        $found = $this->memory[$id]->data ?? null;

        return $found === null ? null : Event::read($found);
    }

    /**
     * Sends events once.
     *
     * @param array<string, mixed>|list<array<string, mixed>> $events `['name' => …, 'data' => …]`, or up to 100 of them
     */
    public function sendEvent(string $id, array $events): void
    {
        if (!$this->remembers($id, 'sendEvent')) {
            throw self::ended([
                'op' => 'sendEvent',
                'id' => $id,
                'events' => array_map(
                    static fn (array $event): array => ['data' => (object) ($event['data'] ?? [])] + $event,
                    array_is_list($events) ? $events : [$events],
                ),
            ]);
        }
    }

    /** @return array{message: string, name: string, code?: string, details?: mixed, retryable: bool} */
    public static function describe(\Throwable $error): array
    {
        $thrown = Failure::thrown($error);
        $said = ['message' => $thrown['message'], 'name' => $thrown['type'], 'retryable' => $thrown['retryable']];
        if ($thrown['code'] !== 'error') {
            $said['code'] = $thrown['code'];
        }
        if (isset($thrown['details'])) {
            $said['details'] = $thrown['details'];
        }

        return $said;
    }

    private function remembers(string $id, string $type): bool
    {
        if ($this->inside !== null) {
            $message = "Operation '$id' stands in step '$this->inside': a step has no operations of its own. Put it behind the step.";
            throw new NonRetryable($message, 'nested_step');
        }
        if ($id === '') {
            throw self::misused('An operation needs an id.', 'bad_step_id');
        }
        if (isset($this->asked[$id])) {
            throw self::misused("There are two operations '$id' in one run: give each an id of its own.", 'duplicate_step');
        }
        $this->asked[$id] = $type;
        $known = $this->memory[$id]->type ?? null;
        if ($known !== null && $known !== $type) {
            throw self::misused("Operation '$id' was a $known before, and is a $type now.", 'step_type_changed');
        }

        return $known !== null;
    }

    /** A mistake in the function's code is the function's failure, and no `catch` of its own is to hide it. */
    private static function misused(string $message, string $code): \LogicException
    {
        return self::ended(['op' => 'error', 'id' => null] + self::describe(new NonRetryable($message, $code)));
    }

    /**
     * Ends the call of the function where it stands. The fiber is never resumed, so no `catch` sees it; `finally` runs when it
     * is let go.
     *
     * @param array<string, mixed> $operation
     */
    private static function ended(array $operation): \LogicException
    {
        \Fiber::suspend($operation);

        return new \LogicException('A function was resumed behind an operation.');
    }

    private static function after(int|float|string|\DateInterval $time): \DateTimeImmutable
    {
        $now = new \DateTimeImmutable('now', new \DateTimeZone('UTC'));
        if ($time instanceof \DateInterval) {
            return $now->add($time);
        }
        if (is_string($time)) {
            $ahead = str_starts_with($time, '+') ? $time : "+$time";
            $later = strtotime($ahead) === false ? false : $now->modify($ahead); // which would warn
            if ($later === false || $later < $now) {
                throw new NonRetryable("'$time' is no length of time: write seconds, or '3 days'.", 'bad_duration');
            }

            return $later;
        }
        if (!is_finite((float) $time) || $time < 0 || $time > 100 * 366 * 86400) {
            throw new NonRetryable("$time seconds are no length of time.", 'bad_duration');
        }

        return $now->modify(sprintf('+%d microseconds', (int) round($time * 1_000_000))) ?: $now;
    }

    private static function iso(\DateTimeInterface $moment): string
    {
        return \DateTimeImmutable::createFromInterface($moment)->setTimezone(new \DateTimeZone('UTC'))->format('Y-m-d\TH:i:s.v\Z');
    }
}
