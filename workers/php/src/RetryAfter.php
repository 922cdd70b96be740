<?php

declare(strict_types=1);

namespace Durable\Worker;

/** Throw it in a handler: try again, but not before so many seconds have passed. */
class RetryAfter extends \RuntimeException
{
    /** @param mixed $details any JSON */
    public function __construct(
        string $message,
        public readonly float $seconds,
        public readonly string $errorCode = 'retry_after',
        public readonly mixed $details = null,
        ?\Throwable $previous = null,
    ) {
        if (!is_finite($seconds) || $seconds < 0) {
            throw new \ValueError('RetryAfter takes seconds, 0 or more.');
        }
        parent::__construct($message, 0, $previous);
    }
}
