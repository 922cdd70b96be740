<?php

declare(strict_types=1);

namespace Durable\Worker;

/** How queues and tables are called. A wrong name is a queue that somebody fills and nobody reads. */
final class Names
{
    private const MISLEADING = '/_(?=x[0-9A-F]{2}(?:_|[^A-Za-z0-9_-]))/u';

    /** Where tasks of a step's name wait. */
    public static function token(string $name, ?string $partition = null): string
    {
        return str_replace(':', '-', $name) . (self::said($partition) ? "@$partition" : '');
    }

    /** What all names begin with. */
    public static function prefix(string $prefix = 'durable', ?string $namespace = null): string
    {
        $whole = self::said($namespace) ? "$prefix-$namespace" : $prefix;
        if ($prefix === '' || preg_match('/[:\s]/', $whole) === 1) {
            throw new \ValueError("A prefix is a text without colons and spaces, not '$whole'.");
        }

        return $whole;
    }

    public static function tasks(string $prefix, string $token): string
    {
        return "$prefix-tasks-$token";
    }

    public static function results(string $prefix): string
    {
        return "$prefix-results";
    }

    public static function decisions(string $prefix): string
    {
        return "$prefix-decisions";
    }

    public static function dead(string $prefix): string
    {
        return "$prefix-dead";
    }

    public static function tasksTable(string $prefix): string
    {
        return "{$prefix}_transport_tasks";
    }

    public static function resultsTable(string $prefix): string
    {
        return "{$prefix}_transport_results";
    }

    /** A name as SQS takes it. */
    public static function sqs(string $name): string
    {
        return (string) preg_replace_callback(
            '/[^A-Za-z0-9_-]/u',
            static fn (array $found): string => '_x' . implode('__x', str_split(strtoupper(bin2hex($found[0])), 2)) . '_',
            (string) preg_replace(self::MISLEADING, '_x5F_', $name),
        );
    }

    /**
     * What a queue may be called in SQS, in the order to look: the plain name first, unless it reads as that of another queue.
     *
     * @return list<string>
     */
    public static function sqsNames(string $name): array
    {
        $spelled = self::sqs($name);

        return $spelled === $name || preg_match(self::MISLEADING, $name) === 1 ? [$spelled] : [$name, $spelled];
    }

    private static function said(?string $word): bool
    {
        return $word !== null && $word !== '' && $word !== 'default';
    }
}
