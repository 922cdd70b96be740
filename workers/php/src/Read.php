<?php

declare(strict_types=1);

namespace Durable\Worker;

/**
 * Readers: each takes decoded JSON and the place where it stood, and gives the value or throws Unreadable.
 *
 * @phpstan-type Reader \Closure(mixed, string): mixed
 */
final class Read
{
    /** @return Reader any JSON, null included */
    public static function anything(): \Closure
    {
        return static fn (mixed $value, string $at): mixed => $value;
    }

    /** @return Reader */
    public static function text(): \Closure
    {
        return static fn (mixed $value, string $at): string => is_string($value) ? $value : self::refuse($at, 'a text');
    }

    /** @return Reader */
    public static function flag(): \Closure
    {
        return static fn (mixed $value, string $at): bool => is_bool($value) ? $value : self::refuse($at, 'true or false');
    }

    /** @return Reader */
    public static function number(): \Closure
    {
        return static fn (mixed $value, string $at): int|float => is_int($value) || is_float($value)
            ? $value : self::refuse($at, 'a number');
    }

    /** @return Reader */
    public static function whole(int $least = PHP_INT_MIN): \Closure
    {
        return static function (mixed $value, string $at) use ($least): int {
            $whole = is_float($value) && floor($value) === $value && abs($value) < 2 ** 53 ? (int) $value : $value;

            return is_int($whole) && $whole >= $least ? $whole : self::refuse($at, 'such a whole number');
        };
    }

    /** @return Reader */
    public static function word(string ...$words): \Closure
    {
        return static fn (mixed $value, string $at): string => is_string($value) && in_array($value, $words, true)
            ? $value : self::refuse($at, implode(' or ', $words));
    }

    /**
     * @param Reader $item
     *
     * @return Reader
     */
    public static function list(\Closure $item): \Closure
    {
        return static function (mixed $value, string $at) use ($item): array {
            if (!is_array($value)) {
                self::refuse($at, 'a list');
            }
            $read = [];
            foreach ($value as $index => $each) {
                $read[] = $item($each, "{$at}[{$index}]");
            }

            return $read;
        };
    }

    /**
     * An object with whatever keys.
     *
     * @param Reader $item
     *
     * @return Reader
     */
    public static function map(\Closure $item): \Closure
    {
        return static function (mixed $value, string $at) use ($item): \stdClass {
            $read = new \stdClass();
            foreach (self::fields($value, $at) as $key => $each) {
                $read->{$key} = $item($each, "$at.$key");
            }

            return $read;
        };
    }

    /**
     * An object of these fields. Others are dropped; of what is optional null is absent, where null is not a value of its own
     * (`nullable`); `defaults` stand for what is absent.
     *
     * @param array<string, Reader> $required
     * @param array<string, Reader> $optional
     * @param list<string> $nullable
     * @param array<string, mixed> $defaults
     *
     * @return Reader
     */
    public static function object(array $required, array $optional = [], array $nullable = [], array $defaults = []): \Closure
    {
        return static function (mixed $value, string $at) use ($required, $optional, $nullable, $defaults): \stdClass {
            $given = self::fields($value, $at);
            $read = new \stdClass();
            foreach ($required as $key => $reader) {
                $read->{$key} = array_key_exists($key, $given)
                    ? $reader($given[$key], "$at.$key") : self::refuse("$at.$key", 'there');
            }
            foreach ($optional as $key => $reader) {
                if (isset($given[$key]) || (array_key_exists($key, $given) && in_array($key, $nullable, true))) {
                    $read->{$key} = $reader($given[$key], "$at.$key");
                } elseif (array_key_exists($key, $defaults)) {
                    $read->{$key} = $defaults[$key];
                }
            }

            return $read;
        };
    }

    /** @return never */
    public static function refuse(string $at, string $what): never
    {
        throw new Unreadable("$at is not $what");
    }

    /** @return array<string|int, mixed> */
    private static function fields(mixed $value, string $at): array
    {
        return $value instanceof \stdClass ? get_object_vars($value) : self::refuse($at, 'an object');
    }
}
