<?php

declare(strict_types=1);

namespace Durable\Worker;

/** A claimed row. */
final class DbDelivery implements Delivery
{
    /** @param array<string, mixed> $row */
    public function __construct(private readonly DbTransport $transport, private readonly array $row)
    {
    }

    public function read(): mixed
    {
        $extra = isset($this->row['extra']) ? Json::decode($this->row['extra']) : new \stdClass();
        if ($this->isTurn()) {
            return $extra;
        }
        if (!$extra instanceof \stdClass) {
            throw new Unreadable('extra is not an object');
        }
        $message = clone $extra;
        $message->runId = $this->row['run_id'];
        $message->seq = $this->row['seq'];
        $message->stepId = $this->row['step_id'];
        $message->name = $this->row['name'];
        $message->group = $this->row['grp'];
        $message->input = Json::decode($this->row['input'] ?? 'null');
        $message->attempt = $this->row['attempt'];
        $message->token = $this->row['token'] ?? null;
        $message->priority = $this->row['priority'] ?? null;

        return $message;
    }

    public function keep(): bool
    {
        return $this->transport->asking(fn (): bool => $this->transport->keep($this->row));
    }

    public function answer(Answer $answer): void
    {
        $this->transport->asking(fn () => $this->transport->finish($this->row, $answer));
    }

    public function giveBack(): void
    {
        $this->transport->asking(fn () => $this->transport->giveBack($this->row));
    }

    public function drop(): void
    {
        $this->transport->asking(fn () => $this->transport->drop($this->row));
    }

    /** Whose it is stands in columns of its own, so it is answered whatever else is in it, and nobody waits for ever. */
    public function refuse(string $why): void
    {
        $this->fail(Failure::final('payload_type', "The task's row cannot be read: $why"));
    }

    /** Workers die of it. */
    public function giveUp(): void
    {
        $before = ($this->row['deliveries'] ?? 1) - 1;
        $message = "remote step worker failed: $before workers took the task and none finished it";
        $this->fail(['message' => $message, 'code' => 'worker_failed', 'type' => 'WorkerFailed', 'retryable' => true]);
    }

    /** @param array<string, mixed> $error */
    private function fail(array $error): void
    {
        if ($this->isTurn()) {
            $answer = Answer::refusedTurn($this->row['step_id'], $this->row['run_id'], $error);
        } else {
            $answer = Answer::failed((object) [
                'runId' => $this->row['run_id'],
                'seq' => $this->row['seq'],
                'stepId' => $this->row['step_id'],
                'attempt' => $this->row['attempt'],
                'token' => $this->row['token'] ?? null,
            ], $error);
        }
        $this->answer($answer);
    }

    private function isTurn(): bool
    {
        return ($this->row['kind'] ?? null) === 'turn';
    }
}
