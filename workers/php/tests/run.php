<?php

// Runs every *.test.php here: `php tests/run.php [part of a name]`.

declare(strict_types=1);

require __DIR__ . '/../autoload.php';

error_reporting(E_ALL);
set_error_handler(static fn (int $level, string $message, string $file, int $line) => throw new ErrorException($message, 0, $level, $file, $line));

/** @var array<string, Closure(): void> $tests */
$tests = [];

function test(string $claim, Closure $body): void
{
    global $tests;
    if (isset($tests[$claim])) {
        throw new LogicException("There are two tests '$claim'.");
    }
    $tests[$claim] = $body;
}

function same(mixed $expected, mixed $found, string $what = ''): void
{
    // Objects by their fields, in any order; 1 is not 1.0, and {} is not [].
    $flat = static function (mixed $value) use (&$flat): mixed {
        if ($value instanceof stdClass) {
            $fields = array_map($flat, get_object_vars($value));
            ksort($fields, SORT_STRING);

            return ['{}' => $fields];
        }

        return is_array($value) ? array_map($flat, $value) : $value;
    };
    $texts = array_map(static fn (mixed $value): string => var_export($flat($value), true), [$expected, $found]);
    if ($texts[0] !== $texts[1]) {
        throw new LogicException("$what\nexpected: {$texts[0]}\nfound: {$texts[1]}");
    }
}

/** @param class-string<Throwable> $class */
function throws(string $class, Closure $body): Throwable
{
    try {
        $body();
    } catch (Throwable $error) {
        if ($error instanceof $class) {
            return $error;
        }
        throw $error;
    }
    throw new LogicException("Nothing was thrown, $class was expected.");
}

foreach (glob(__DIR__ . '/*.test.php') as $file) {
    require $file;
}
$failed = 0;
$wanted = array_filter($tests, static fn (string $claim): bool => str_contains($claim, $argv[1] ?? ''), ARRAY_FILTER_USE_KEY);
foreach ($wanted as $claim => $body) {
    try {
        $body();
    } catch (Throwable $error) {
        ++$failed;
        echo "FAILED $claim\n", $error::class, ": {$error->getMessage()}\n{$error->getTraceAsString()}\n\n";
    }
}
echo count($wanted) - $failed, " passed, $failed failed\n";
exit($failed === 0 && $wanted !== [] ? 0 : 1);
