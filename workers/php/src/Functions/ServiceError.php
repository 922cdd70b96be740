<?php

declare(strict_types=1);

namespace Durable\Functions;

/** The service did not do what it was asked. `getCode` is HTTP's status, 0 where there was no answer. */
class ServiceError extends \RuntimeException
{
    public function __construct(string $message, int $status = 0, public readonly ?string $errorCode = null)
    {
        parent::__construct($message, $status);
    }
}
