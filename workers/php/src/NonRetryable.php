<?php

declare(strict_types=1);

namespace Durable\Worker;

/** Throw it in a handler: this failure is final, the step is not tried again. */
class NonRetryable extends \RuntimeException
{
    /** @param mixed $details any JSON */
    public function __construct(
        string $message,
        public readonly string $errorCode = 'non_retryable',
        public readonly mixed $details = null,
        ?\Throwable $previous = null,
    ) {
        parent::__construct($message, 0, $previous);
    }
}
