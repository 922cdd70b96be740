<?php

declare(strict_types=1);

namespace Durable\Worker;

/** What a handler is given beside its input. */
final class Step
{
    private const EVENTS_MAX = 1_000;
    private const MESSAGE_MAX = 4_000;

    /** The same for every delivery and every attempt: give it to whatever the step does to the world. */
    public readonly string $idempotencyKey;
    public readonly string $stepId;
    public readonly string $runId;
    public readonly string $name;
    /** From 1. */
    public readonly int $attempt;
    /** W3C trace context of the run, to be continued. */
    public readonly ?string $traceparent;
    /** Opaque; as the engine's side gave it. */
    public readonly \stdClass $context;

    /** @var list<array<string, mixed>> */
    private array $events = [];
    private bool $cancelled = false;
    private bool $beating = false;
    private float $kept;

    /** @param \Closure(): bool $keep keeps the task; false: nobody wants an answer */
    public function __construct(\stdClass $task, private readonly \Closure $keep)
    {
        $this->idempotencyKey = $this->stepId = $task->stepId;
        $this->runId = $task->runId;
        $this->name = $task->name;
        $this->attempt = $task->attempt;
        $this->traceparent = $task->traceparent ?? null;
        $this->context = $task->context ?? new \stdClass();
        $this->kept = microtime(true);
    }

    /**
     * A line for the run's timeline; it arrives with the answer.
     *
     * @param mixed $data any JSON
     */
    public function log(string $message, mixed $data = null, string $level = 'info'): void
    {
        if (!in_array($level, ['debug', 'info', 'warn', 'error'], true)) {
            throw new \ValueError("A level is debug, info, warn or error, not '$level'.");
        }
        $index = count($this->events);
        if ($index < self::EVENTS_MAX) {
            $event = ['at' => (int) (microtime(true) * 1000), 'level' => $level, 'index' => $index];
            $event['message'] = Json::words($message, self::MESSAGE_MAX);
            $this->events[] = $event + ($data === null ? [] : ['data' => Failure::kept($data)]);
        }
    }

    /**
     * Still at it: keeps the task. Call it as often as you like, before and after whatever blocks; it asks the broker once a
     * second at most.
     *
     * @throws StepCancelled
     */
    public function heartbeat(): void
    {
        if (microtime(true) - $this->kept >= 1) {
            $this->beat();
        }
        if ($this->cancelled) {
            throw new StepCancelled('The step was cancelled, or its task is another worker\'s by now.');
        }
    }

    /** Nobody wants the answer any more. */
    public function cancelled(): bool
    {
        return $this->cancelled;
    }

    /**
     * Sleeps the whole time, whatever signals come, and keeps the task meanwhile. `sleep()` ends early when a signal comes.
     *
     * @throws StepCancelled
     */
    public function sleep(float $seconds): void
    {
        $until = microtime(true) + $seconds;
        do {
            $this->heartbeat();
            $left = $until - microtime(true);
            if ($left > 0) {
                usleep((int) (min($left, 0.5) * 1e6));
            }
        } while ($left > 0);
    }

    /** The worker's: asks now. Whatever goes wrong is tried again with the next beat. */
    public function beat(): void
    {
        if ($this->cancelled || $this->beating) {
            return; // the alarm may come in the middle of a beat
        }
        $this->beating = true;
        try {
            $this->kept = microtime(true);
            $this->cancelled = !($this->keep)();
        } finally {
            $this->beating = false;
        }
    }

    /** The worker's: it is talking to the broker right now. */
    public function beating(): bool
    {
        return $this->beating;
    }

    /**
     * The worker's.
     *
     * @return list<array<string, mixed>>
     */
    public function events(): array
    {
        return $this->events;
    }
}
