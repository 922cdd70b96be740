<?php

declare(strict_types=1);

namespace Durable\Functions;

/** What a run was started by. `data` is decoded JSON: an object is a `stdClass`. */
final class Event
{
    public function __construct(
        public readonly string $id,
        public readonly string $name,
        public readonly mixed $data,
    ) {
    }

    public static function read(mixed $given): self
    {
        return new self((string) ($given->id ?? ''), (string) ($given->name ?? ''), $given->data ?? null);
    }
}
