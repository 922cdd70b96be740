<?php

declare(strict_types=1);

namespace Durable\Worker;

/** Where tasks come from and answers go. */
interface Transport
{
    /** The longest answer it carries, in bytes. */
    public function maxMessage(): int;

    /** Seconds between two calls of `Delivery::keep` while a handler runs. */
    public function keepEvery(): float;

    /**
     * Before the first `take`.
     *
     * @param list<string> $tokens
     * @param \Closure(string, string): void $log level and message
     */
    public function open(array $tokens, \Closure $log): void;

    /**
     * One task. Waits for a while where there is none, and gives null; soon, where `stopping` says true meanwhile. May throw what
     * the broker says, and is then called again after a pause.
     *
     * @param \Closure(): bool $stopping
     *
     * @throws ConnectionLost
     */
    public function take(\Closure $stopping): ?Delivery;
}
