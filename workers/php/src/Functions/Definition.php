<?php

declare(strict_types=1);

namespace Durable\Functions;

/** A function: what starts it, what it may do, and its code. Checked by the service when it is synced. */
final class Definition
{
    /**
     * @param string $id its name, the same for ever
     * @param \Closure(Step, Event): mixed $handler what it returns is the run's result
     * @param string|null $event the event that starts it, or
     * @param string|null $cron the cron line
     * @param string|null $version runs go on with the version they began with, as long as it is served
     * @param int $retries of each step that fails, 0 to 20
     * @param \Closure(Step, Event, Failed): mixed|null $onFailure called once when a run has failed for good; may use steps
     * @param array<string, mixed>|list<array<string, mixed>>|null $concurrency `['limit' => 5, 'key' => 'customer']`, up to ten
     * @param array<string, mixed>|null $throttle `['limit' => 10, 'periodMs' => 1000, 'key' => …]`; more wait
     * @param array<string, mixed>|null $rateLimit the same; more are dropped
     * @param array<string, mixed>|null $debounce `['periodMs' => 5000, 'key' => …]`
     * @param array<string, mixed>|null $batch `['maxSize' => 100, 'timeoutMs' => 5000, 'key' => …]`
     */
    public function __construct(
        public readonly string $id,
        public readonly \Closure $handler,
        public readonly ?string $event = null,
        public readonly ?string $cron = null,
        public readonly ?string $version = null,
        public readonly int $retries = 3,
        public readonly ?int $timeoutMs = null,
        public readonly ?\Closure $onFailure = null,
        public readonly int $priority = 0,
        public readonly bool $enabled = true,
        public readonly ?array $concurrency = null,
        public readonly ?array $throttle = null,
        public readonly ?array $rateLimit = null,
        public readonly ?array $debounce = null,
        public readonly ?array $batch = null,
    ) {
        if (($event === null) === ($cron === null)) {
            throw new \ValueError("Function $id is started by an event or by a cron line: give it one of them.");
        }
        if ($id === '' || str_contains($id, '@')) {
            throw new \ValueError("'$id' is no name of a function: it needs one, without @, which stands before a version.");
        }
        if ($retries < 0 || $retries > 20) {
            throw new \ValueError("Function $id has $retries retries, and 0 to 20 are possible.");
        }
    }

    /** As it is told apart: its id, and its version behind an @. */
    public function address(): string
    {
        return $this->version === null ? $this->id : "$this->id@$this->version";
    }

    /** @return array<string, mixed> as it is synced */
    public function wire(): array
    {
        $wire = [
            'id' => $this->id,
            'trigger' => $this->event !== null ? ['event' => $this->event] : ['cron' => $this->cron],
            'enabled' => $this->enabled,
            'retries' => $this->retries,
            'hasOnFailure' => $this->onFailure !== null,
            'priority' => $this->priority,
        ];
        foreach (['version', 'timeoutMs', 'concurrency', 'throttle', 'rateLimit', 'debounce', 'batch'] as $name) {
            if ($this->{$name} !== null) {
                $wire[$name] = $this->{$name};
            }
        }

        return $wire;
    }
}
