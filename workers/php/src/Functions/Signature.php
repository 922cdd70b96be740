<?php

declare(strict_types=1);

namespace Durable\Functions;

/** `x-durable-signature`: HMAC-SHA256 of the raw body with the workspace's key, in hex. */
final class Signature
{
    public const HEADER = 'x-durable-signature';
    public const TIMESTAMP = 'x-durable-timestamp';
    /** Seconds by which the time of a manifest's request may be off. */
    public const WINDOW = 300;

    public static function of(string $body, string $key): string
    {
        return hash_hmac('sha256', $body, $key);
    }

    /**
     * The key that has signed it; null: none of them.
     *
     * @param list<string> $keys two live while a key is changed
     */
    public static function signer(string $body, ?string $given, array $keys): ?string
    {
        $found = null;
        foreach ($keys as $key) {
            if (hash_equals(self::of($body, $key), $given ?? '')) {
                $found ??= $key;
            }
        }

        return $found;
    }

    /** Whether a time in milliseconds is now, give or take the window. */
    public static function isNow(?string $milliseconds): bool
    {
        return $milliseconds !== null
            && preg_match('/^\d{1,15}$/', $milliseconds) === 1
            && abs((int) $milliseconds / 1000 - microtime(true)) <= self::WINDOW;
    }
}
