<?php

declare(strict_types=1);

namespace Durable\Worker;

/** Errors as data. */
final class Failure
{
    private const MESSAGE_MAX = 4_000;
    private const STACK_MAX = 8_000;
    private const LEVELS = 90;

    /**
     * What was thrown. Whatever it is, it becomes an answer.
     *
     * @return array<string, mixed>
     */
    public static function thrown(\Throwable $error): array
    {
        $ours = $error instanceof NonRetryable || $error instanceof RetryAfter;
        $type = (new \ReflectionClass($error))->isAnonymous() ? 'class@anonymous' : $error::class;
        // Without arguments: they are what the handler was given, and may be secret.
        $stack = "{$error->getFile()}:{$error->getLine()}\n";
        foreach ($error->getTrace() as $frame) {
            $place = isset($frame['file']) ? $frame['file'] . ':' . ($frame['line'] ?? 0) : '(PHP)';
            $stack .= "$place " . ($frame['class'] ?? '') . ($frame['type'] ?? '') . $frame['function'] . "()\n";
        }
        $data = [
            'message' => Json::words($error->getMessage() === '' ? $type : $error->getMessage(), self::MESSAGE_MAX),
            'code' => $ours ? Json::words($error->errorCode, 200) : 'error',
            'type' => Json::words($type, 200),
            'retryable' => !$error instanceof NonRetryable,
        ];
        if ($error instanceof RetryAfter) {
            $data['retryAfter'] = $error->seconds;
        }
        if ($ours && $error->details !== null) {
            $data['details'] = self::kept($error->details);
        }

        return $data + ['stack' => Json::words($stack, self::STACK_MAX)];
    }

    /** @return array<string, mixed> */
    public static function final(string $code, string $message): array
    {
        return ['message' => Json::words($message, self::MESSAGE_MAX), 'code' => $code, 'retryable' => false];
    }

    /** As it is now, or its type where JSON cannot say it: a line is no reason to fail. */
    public static function kept(mixed $value): mixed
    {
        try {
            return Json::decode(str_replace('\u0000', '\ufffd', Json::encode($value, self::LEVELS)));
        } catch (\Throwable) {
            return get_debug_type($value);
        }
    }
}
