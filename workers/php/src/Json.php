<?php

declare(strict_types=1);

namespace Durable\Worker;

/**
 * JSON that comes back as it went: objects are `stdClass` (so `{}` stays an object), `1.0` stays a float, and whole numbers
 * beyond PHP's are a `BigInteger`.
 */
final class Json
{
    private const FLAGS = JSON_THROW_ON_ERROR | JSON_UNESCAPED_SLASHES | JSON_UNESCAPED_UNICODE | JSON_PRESERVE_ZERO_FRACTION;

    private static string $mark = '';

    /** @throws Unreadable */
    public static function decode(string $text): mixed
    {
        $big = 0;
        if (preg_match('/\d{19}/', $text) === 1) {
            // Whole strings are skipped; of the rest, numbers without fraction and exponent that PHP would round.
            $text = preg_replace_callback(
                '~"(?:[^"\\\\]++|\\\\.)*+"(*SKIP)(*FAIL)|(?<![\d.eE+-])-?[1-9]\d{18,}+(?![.eE])~s',
                static function (array $found) use (&$big): string {
                    if (filter_var($found[0], FILTER_VALIDATE_INT) !== false) {
                        return $found[0];
                    }
                    ++$big;

                    return '"' . self::mark() . $found[0] . '"';
                },
                $text,
            ) ?? throw new Unreadable('its numbers cannot be read: ' . preg_last_error_msg());
        }
        try {
            $value = json_decode($text, false, 512, JSON_THROW_ON_ERROR);
        } catch (\JsonException $error) {
            throw new Unreadable("it is not JSON: {$error->getMessage()}", 0, $error);
        }

        return $big > 0 ? self::withBig($value) : $value;
    }

    /** @throws \JsonException */
    public static function encode(mixed $value, int $levels = 512): string
    {
        $text = json_encode($value, self::FLAGS, $levels);

        return self::$mark === '' ? $text : (string) preg_replace('/"' . self::$mark . '(-?\d+)"/', '$1', $text);
    }

    /** Text that is certainly UTF-8, without NUL, and of at most so many characters. For what is said, not for what counts. */
    public static function words(string $text, int $most): string
    {
        $text = str_replace("\0", "\u{FFFD}", $text);
        /** @var string $clean */
        $clean = json_decode((string) json_encode($text, JSON_INVALID_UTF8_SUBSTITUTE));

        return strlen($clean) > $most && preg_match('/^.{' . $most . '}/su', $clean, $found) === 1 ? $found[0] : $clean;
    }

    /** What stands before the digits of a big number, inside JSON only. Random, so that no text has it by chance. */
    public static function mark(): string
    {
        return self::$mark = self::$mark ?: bin2hex(random_bytes(12)) . ':';
    }

    private static function withBig(mixed $value): mixed
    {
        if (is_string($value) && str_starts_with($value, self::$mark)) {
            return new BigInteger(substr($value, strlen(self::$mark)));
        }
        if (is_array($value)) {
            return array_map(self::withBig(...), $value);
        }
        if ($value instanceof \stdClass) {
            foreach (get_object_vars($value) as $key => $item) {
                $value->{$key} = self::withBig($item);
            }
        }

        return $value;
    }
}
