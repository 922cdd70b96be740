<?php

declare(strict_types=1);

namespace Durable\Functions;

/** Why a run has failed for good: what `onFailure` is told. */
final class Failed
{
    public function __construct(
        public readonly string $message,
        public readonly ?string $name,
        public readonly ?string $code,
        public readonly ?string $stepId,
        public readonly mixed $details,
    ) {
    }

    public static function read(\stdClass $given): self
    {
        return new self(
            (string) ($given->message ?? ''),
            $given->name ?? null,
            $given->code ?? null,
            $given->stepId ?? null,
            $given->details ?? null,
        );
    }
}
