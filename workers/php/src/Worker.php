<?php

declare(strict_types=1);

namespace Durable\Worker;

/**
 * Takes tasks one after the other, runs handlers, answers. It knows no broker, and keeps nothing.
 *
 *     delivery → read → handler → answer handed over → acknowledged
 *                          └─ cancelled or lost ──→ no answer
 *
 * While a handler runs its task is kept by an alarm (SIGALRM, by ext-pcntl) between two statements of the handler.
 */
final class Worker
{
    /** Bytes of an output that an engine keeps. */
    private const PAYLOAD_MAX = 1 << 20;
    private const ANSWER_TRIES = 8;
    private const PAUSE_FIRST = 0.1;
    private const PAUSE_MAX = 5.0;

    /** @var \Closure(string, string): void */
    private readonly \Closure $log;
    private bool $stopping = false;
    /** When a handler under way is cut short, in seconds of `microtime`. */
    private float $deadline = INF;
    private ?Step $step = null;
    private ?Delivery $delivery = null;

    /**
     * @param array<string, callable(mixed, Step): mixed> $handlers by step name
     * @param string|null $partition serve the tasks of this partition, and no others
     * @param int $max end after so many tasks; 0: never
     * @param int $memory end after a task that leaves the process with more bytes than these; 0: never
     * @param float $drain seconds that a handler under way has after SIGTERM; then its task is given back
     * @param \Closure(string, string): void|null $log level and message; to stderr where there is none
     */
    public function __construct(
        private readonly Transport $transport,
        private readonly array $handlers,
        private readonly ?string $partition = null,
        private readonly int $max = 0,
        private readonly int $memory = 0,
        private readonly float $drain = 30.0,
        ?\Closure $log = null,
    ) {
        if ($handlers === []) {
            throw new \ValueError('A worker needs at least one handler: [\'payments.charge\' => fn ($input, $step) => …].');
        }
        foreach ($handlers as $name => $handler) {
            if (!is_callable($handler)) {
                throw new \ValueError("The handler of $name cannot be called.");
            }
        }
        $this->log = $log ?? static function (string $level, string $message): void {
            file_put_contents('php://stderr', "$level: $message\n");
        };
    }

    /**
     * Work until `stop`, SIGTERM or SIGINT, or until `max` or `memory` is reached; a supervisor starts it again. A task under
     * way is finished first. A second signal ends the process at once, with status 1.
     *
     * @throws ConnectionLost
     */
    public function run(): void
    {
        $this->catchSignals();
        $tokens = [];
        foreach (array_keys($this->handlers) as $name) {
            $tokens[] = Names::token((string) $name, $this->partition);
        }
        $this->transport->open(array_values(array_unique($tokens)), $this->log);
        $done = 0;
        $failures = 0;
        while (!$this->stopping) {
            try {
                $delivery = $this->transport->take(fn (): bool => $this->stopping);
            } catch (ConnectionLost $error) {
                throw $error;
            } catch (\Throwable $error) {
                if ($failures++ === 0) {
                    ($this->log)('warn', "no tasks can be taken, which is tried again: {$error->getMessage()}");
                }
                $this->pause($failures);
                continue;
            }
            if ($failures > 0) {
                ($this->log)('info', 'tasks can be taken again');
                $failures = 0;
            }
            if ($delivery === null) {
                continue;
            }
            $this->settle($delivery);
            ++$done;
            if ($this->max > 0 && $done >= $this->max) {
                $this->leave("$done tasks are done");
            } elseif ($this->memory > 0 && memory_get_usage(true) > $this->memory) {
                $this->leave('it has more memory than it may');
            }
        }
    }

    /** Take nothing more; `run` returns after what is under way. */
    public function stop(): void
    {
        $this->stopping = true;
        $this->deadline = min($this->deadline, microtime(true) + $this->drain);
    }

    private function leave(string $why): void
    {
        ($this->log)('info', "stopping: $why");
        $this->stop();
    }

    // -- one task

    private function settle(Delivery $delivery): void
    {
        try {
            [$isTurn, $task] = Messages::readTask($delivery->read());
        } catch (Unreadable $error) {
            ($this->log)('error', "a message that cannot be read is put away: {$error->getMessage()}");
            $this->quietly(static fn () => $delivery->refuse($error->getMessage()));

            return;
        }
        if ($isTurn) {
            // A turn that nobody answers would come again for ever.
            $error = Failure::final('unknown_step', "no handler for {$task->workflow}");
            $answer = Answer::refusedTurn($task->taskId, $task->runId, $error);
        } else {
            $answer = $this->work($task, $delivery);
        }
        if ($answer === null) {
            $this->quietly($delivery->drop(...));
        } else {
            $this->handOver($delivery, $answer);
        }
    }

    private function work(\stdClass $task, Delivery $delivery): ?Answer
    {
        $handler = $this->handlers[$task->name] ?? null;
        if ($handler === null) {
            return Answer::failed($task, Failure::final('unknown_step', "no handler for {$task->name}"));
        }
        $startedAt = (int) (microtime(true) * 1000);
        $this->step = $step = new Step($task, fn (): bool => $this->keep($delivery));
        $this->delivery = $delivery;
        $this->alarm();
        try {
            $output = $handler($task->input, $step);
            $error = null;
        } catch (\Throwable $error) {
            $output = null;
        } finally {
            $this->step = $this->delivery = null;
            $this->alarm();
        }
        if ($step->cancelled()) {
            return null;
        }
        if ($error !== null) {
            return $this->fitting($task, Answer::failed($task, Failure::thrown($error), $startedAt, $step->events()));
        }
        try {
            return $this->fitting($task, Answer::completed($task, $output, $startedAt, $step->events()));
        } catch (\Throwable $error) { // a JsonSerializable may throw anything
            $utf8 = $error instanceof \JsonException && $error->getCode() === JSON_ERROR_UTF8;
            $why = $utf8 ? 'text that is not UTF-8: convert it, or encode it in base64'
                : "what JSON cannot say: {$error->getMessage()}";
            $failure = Failure::final($utf8 ? 'payload_text' : 'payload_type', "The step returned $why");

            return Answer::failed($task, $failure, $startedAt, $step->events());
        }
    }

    /** Itself; where it is too long less of it; where no wire carries what counts in it, a failure that says so. */
    private function fitting(\stdClass $task, Answer $answer): Answer
    {
        $startedAt = $answer->fields['startedAt'] ?? null;
        if ($answer->output !== null && preg_match('/(?<!\\\\)(?:\\\\\\\\)*+\\\\u0000/', $answer->output) === 1) {
            $why = 'The step returned text with a NUL character: leave it out, or encode it in base64';

            return Answer::failed($task, Failure::final('payload_text', $why), $startedAt);
        }
        $most = $this->transport->maxMessage();
        if (strlen($answer->output ?? '') <= self::PAYLOAD_MAX) {
            foreach ([$answer, $answer->without('events')] as $less) {
                if (strlen($less->json()) <= $most) {
                    return $less;
                }
            }
        }
        if ($answer->output === null) {
            $error = array_diff_key($answer->fields['error'], ['details' => 0, 'stack' => 0]);

            return Answer::failed($task, $error, $startedAt);
        }
        $size = strlen($answer->output);
        $most = min($most, self::PAYLOAD_MAX);
        $why = "The step's output has $size bytes, and at most $most are carried: return a reference to the data instead";

        return Answer::failed($task, Failure::final('payload_too_large', $why), $startedAt);
    }

    /** The result first, then the acknowledgement; the task is kept meanwhile. */
    private function handOver(Delivery $delivery, Answer $answer): void
    {
        for ($tries = 1; ; ++$tries) {
            if ($tries > 1 && !$this->keep($delivery)) {
                return;
            }
            try {
                $delivery->answer($answer);

                return;
            } catch (\Throwable $error) {
                ($this->log)('warn', "an answer could not be handed over: {$error->getMessage()}");
            }
            if ($tries >= self::ANSWER_TRIES || microtime(true) > $this->deadline) {
                $this->quietly($delivery->giveBack(...));

                return;
            }
            $this->pause($tries, false);
        }
    }

    private function keep(Delivery $delivery): bool
    {
        try {
            return $delivery->keep();
        } catch (\Throwable $error) {
            ($this->log)('warn', "a task could not be kept, which is tried again: {$error->getMessage()}");

            return true;
        }
    }

    private function quietly(\Closure $call): void
    {
        try {
            $call();
        } catch (\Throwable $error) {
            ($this->log)('warn', "a task could not be settled, and comes again: {$error->getMessage()}");
        }
    }

    private function pause(int $failures, bool $untilStopping = true): void
    {
        $seconds = min(self::PAUSE_MAX, self::PAUSE_FIRST * 2 ** min($failures, 10)) * random_int(50, 100) / 100;
        for ($until = microtime(true) + $seconds; microtime(true) < $until && !($untilStopping && $this->stopping);) {
            usleep(50_000);
        }
    }

    // -- signals

    private function catchSignals(): void
    {
        if (!function_exists('pcntl_signal')) {
            ($this->log)('warn', 'without ext-pcntl a task is kept only by $step->heartbeat(), and SIGTERM ends the process at once');

            return;
        }
        pcntl_async_signals(true);
        $stop = function (): void {
            if ($this->stopping && $this->deadline < INF) {
                exit(1); // the broker gives what is left to others
            }
            $this->leave('a task under way may finish; a second signal ends the process at once');
        };
        pcntl_signal(SIGTERM, $stop);
        pcntl_signal(SIGINT, $stop);
        pcntl_signal(SIGALRM, $this->tick(...));
    }

    private function alarm(): void
    {
        if (function_exists('pcntl_alarm')) {
            pcntl_alarm($this->step === null ? 0 : max(1, (int) $this->transport->keepEvery()));
        }
    }

    /** Between two statements of the handler. */
    private function tick(): void
    {
        if ($this->step === null || $this->delivery === null) {
            return; // it has just ended
        }
        if (microtime(true) > $this->deadline && !$this->step->beating()) {
            ($this->log)('warn', 'the step under way did not end in time; its task is given back');
            $this->quietly($this->delivery->giveBack(...));
            exit(1);
        }
        $this->step->beat();
        $this->alarm();
    }
}
