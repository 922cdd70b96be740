<?php

declare(strict_types=1);

namespace Durable\Worker;

/** A received message. */
final class SqsDelivery implements Delivery
{
    private readonly float $received;
    private float $kept;

    public function __construct(
        private readonly SqsTransport $transport,
        private readonly string $url,
        private readonly string $receipt,
        private readonly string $body,
    ) {
        $this->received = $this->kept = microtime(true);
    }

    public function read(): mixed
    {
        return Json::decode($this->body);
    }

    public function keep(): bool
    {
        $asked = microtime(true);
        $ours = $this->transport->keep($this->url, $this->receipt, $this->received, $this->kept);
        $this->kept = $asked;

        return $ours;
    }

    public function answer(Answer $answer): void
    {
        $this->transport->answer($answer, $this->url, $this->receipt);
    }

    public function giveBack(): void
    {
        $this->transport->change($this->url, $this->receipt, 0);
    }

    public function drop(): void
    {
        $this->transport->delete($this->url, $this->receipt);
    }

    public function refuse(string $why): void
    {
        $this->transport->refuse($this->body, $why, $this->url, $this->receipt);
    }
}
