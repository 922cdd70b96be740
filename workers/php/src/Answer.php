<?php

declare(strict_types=1);

namespace Durable\Worker;

/** What goes back for one task: a step's result, or the decision of a turn. Output and error are JSON text by now. */
final class Answer
{
    /** An engine keeps no output that is nested deeper. */
    private const LEVELS = 100;

    /** @param array<string, mixed> $fields of the message, all but `output` */
    private function __construct(
        public readonly bool $isDecision,
        public readonly array $fields,
        public readonly ?string $output = null,
    ) {
    }

    /**
     * @param mixed $output what the handler returned
     * @param list<array<string, mixed>> $events
     *
     * @throws \JsonException where JSON cannot say the output
     */
    public static function completed(\stdClass $task, mixed $output, int $startedAt, array $events): self
    {
        $fields = self::echo($task) + ['status' => 'completed', 'startedAt' => $startedAt];

        return new self(false, $fields + ($events === [] ? [] : ['events' => $events]), Json::encode($output, self::LEVELS));
    }

    /**
     * @param array<string, mixed> $error
     * @param list<array<string, mixed>> $events
     */
    public static function failed(\stdClass $task, array $error, ?int $startedAt = null, array $events = []): self
    {
        $fields = self::echo($task) + ['status' => 'failed', 'error' => $error];

        return new self(
            false,
            $fields + ($startedAt === null ? [] : ['startedAt' => $startedAt]) + ($events === [] ? [] : ['events' => $events]),
        );
    }

    /** @param array<string, mixed> $error */
    public static function refusedTurn(string $taskId, string $runId, array $error): self
    {
        $fields = ['taskId' => $taskId, 'runId' => $runId, 'status' => 'failed', 'commands' => [], 'error' => $error];

        return new self(true, $fields);
    }

    public function without(string ...$fields): self
    {
        return new self($this->isDecision, array_diff_key($this->fields, array_flip($fields)), $this->output);
    }

    /** The message. */
    public function json(): string
    {
        $text = Json::encode($this->fields);

        return $this->output === null ? $text : substr($text, 0, -1) . ',"output":' . $this->output . '}';
    }

    /** @return array<string, mixed> */
    private static function echo(\stdClass $task): array
    {
        $fields = ['runId' => $task->runId, 'seq' => $task->seq, 'stepId' => $task->stepId, 'attempt' => $task->attempt];

        return $fields + (isset($task->token) ? ['token' => $task->token] : []);
    }
}
